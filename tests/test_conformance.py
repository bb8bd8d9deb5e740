"""Every registered method through every check that its record calls for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from regard.catalog import Method, methods
from regard.checks.contract import Check
from regard.checks.run import Result, run_check, selected

METHODS = methods()
# Compiled code and run-time shape checks exclude each other, so this check runs in processes of its own.
ELSEWHERE = "compiled"
PER_PROCESS = 20


def _judge(result: Result) -> None:
    match result.outcome:
        case "failed":
            pytest.fail(result.reason, pytrace=False)
        case "skipped":
            pytest.skip(result.reason)
        case "expected failure":
            pytest.xfail(result.reason)


def _cases() -> list[Any]:
    pairs = [(m, c) for m in METHODS for c in selected(m) if c.name != ELSEWHERE]
    return [pytest.param(m, c, id=f"{m.name}-{c.name}") for m, c in pairs]


@pytest.mark.parametrize(("method", "check"), _cases())
def test_method(method: Method, check: Check) -> None:
    _judge(run_check(check, method))


LAYERS = [m.name for m in METHODS if m.kind == "layer"]
SHARE = """
import json, sys, warnings
warnings.simplefilter("error")
from regard.catalog import get
from regard.checks.contract import CHECKS
from regard.checks.run import run_check
print(json.dumps({name: run_check(CHECKS["compiled"], get(name))[:3] for name in sys.argv[1:]}))
"""


@pytest.mark.parametrize("first", range(0, len(LAYERS), PER_PROCESS))
def test_compiled(first: int) -> None:
    names = LAYERS[first : first + PER_PROCESS]
    done = subprocess.run(
        [sys.executable, "-c", SHARE, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "REGARD_TYPECHECK": "0"},
    )
    assert not done.returncode, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == set(names)
    bad = [f"{name}: {reason}" for name, (_, outcome, reason) in results.items() if outcome == "failed"]
    bad += [
        f"{name} was not compiled: {reason}" for name, (_, outcome, reason) in results.items() if outcome == "skipped"
    ]
    assert not bad, "\n".join(bad)
