"""Worker processes: results, progress, and calls that fail, print or kill their process."""

import os
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from regard.train.pool import Call, Event, run_calls, run_here

TASKS = """
import os, sys, time
def double(report, *, x):
    report({"half": x})
    print("noise")
    os.write(1, b"more noise\\n")
    return 2 * x
def fail(report, *, x):
    raise KeyError(x)
def die(report, *, x):
    sys.stderr.write("last words\\n")
    sys.stderr.flush()
    os._exit(x)
def linger(report, *, file):
    open(file, "w").write(str(os.getpid()))
    report({})
    time.sleep(60)
def tuples(report):
    return {1: (2, 3)}
def unsayable(report):
    return {object()}
def threads(report):
    return os.environ["OMP_NUM_THREADS"]
"""


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))


def last(events: list[Event]) -> dict[str, Event]:
    return {event.key: event for event in events if event.last}


def test_results_progress_and_noise() -> None:
    calls = [Call(str(x), "tasks:double", {"x": x}) for x in range(5)]
    events = list(run_calls(calls, 2))
    assert {key: event.facts["result"] for key, event in last(events).items()} == {str(x): 2 * x for x in range(5)}
    assert sorted(event.facts["half"] for event in events if event.kind == "progress") == list(range(5))


def test_one_worker_keeps_the_order() -> None:
    calls = [Call(str(x), "tasks:double", {"x": x}) for x in (3, 1, 2)]
    assert list(last(list(run_calls(calls, 1)))) == ["3", "1", "2"]


def test_a_call_that_fails_or_dies_takes_no_other_with_it() -> None:
    calls = [
        Call("fails", "tasks:fail", {"x": "why"}),
        Call("dies", "tasks:die", {"x": 3}),
        Call("missing", "tasks:nothing"),
        Call("lives", "tasks:double", {"x": 4}),
    ]
    found = last(list(run_calls(calls, 1)))
    assert found["fails"].facts["reason"] == "KeyError: 'why'"
    assert "in fail" in found["fails"].facts["traceback"]
    assert found["dies"].facts["reason"] == "the worker process ended with code 3: last words"
    assert found["missing"].facts["reason"].startswith("AttributeError")
    assert found["lives"].facts["result"] == 8


def test_leaving_early_stops_the_processes(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    start = time.monotonic()
    with closing(run_calls([Call("a", "tasks:linger", {"file": str(file)})], 1)) as events:
        assert [next(events).kind, next(events).kind] == ["started", "progress"]
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_without_processes_every_call_fails_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = last(list(run_calls([Call("a", "tasks:threads"), Call("b", "tasks:threads")], 2)))
    assert all(found[key].facts["reason"].startswith("no worker process: FileNotFoundError") for key in "ab")


def test_one_thread_each_and_no_calls() -> None:
    assert last(list(run_calls([Call("a", "tasks:threads")], 4)))["a"].facts["result"] == "1"
    assert list(run_calls([], 2)) == []
    with pytest.raises(ValueError, match="workers=0"):
        next(run_calls([], 0))


def test_every_call_starts_once() -> None:
    events = list(run_calls([Call(str(x), "tasks:double", {"x": x}) for x in range(3)], 2))
    assert sorted(event.key for event in events if event.kind == "started") == ["0", "1", "2"]
    for key in "012":
        assert [event.kind for event in events if event.key == key] == ["started", "progress", "done"]


def test_here_or_in_a_worker_the_outcome_is_the_same() -> None:
    calls = [Call(name, f"tasks:{name}", {}) for name in ("tuples", "unsayable", "nothing")]
    calls += [Call("double", "tasks:double", {"x": 3}), Call("fail", "tasks:fail", {"x": "why"})]
    here, away = last(list(run_here(calls))), last(list(run_calls(calls, 1)))
    assert list(here) == [call.key for call in calls]
    for key in here:
        assert here[key].kind == away[key].kind
        assert here[key].facts.get("result") == away[key].facts.get("result")
        assert (
            here[key].facts.get("reason", "").split(" at 0x")[0] == away[key].facts.get("reason", "").split(" at 0x")[0]
        )
    assert here["tuples"].facts["result"] == {"1": [2, 3]}
    assert here["unsayable"].facts["reason"].startswith("TypeError")
