"""Edits and captures in compiled code, in processes whose functions carry no shape checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


# Two hosts in one process: the first is gone while the second is compiled.
@pytest.mark.parametrize("hosts", [("fused",), ("multihead",), ("written", "own")], ids=" ".join)
def test_compiled_is_eager(hosts: tuple[str, ...]) -> None:
    script = Path(__file__).with_name("compiled_edits.py")
    environment = {**os.environ, "REGARD_TYPECHECK": "0"}
    done = subprocess.run([sys.executable, str(script), *hosts], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{host}: as eager" for host in hosts]
