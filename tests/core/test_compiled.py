"""Edits and captures in compiled code, in processes whose functions carry no shape checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("host", ["fused", "written", "multihead", "own"])
def test_compiled_is_eager(host: str) -> None:
    script = Path(__file__).with_name("compiled_edits.py")
    environment = {**os.environ, "REGARD_TYPECHECK": "0"}
    done = subprocess.run([sys.executable, str(script), host], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{host}: as eager\n"
