"""Calls on Ray: the same results and files as without it, also when a worker is killed in the middle of a run."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import regard
from regard.claims.reproduce import reproduce, reproduce_many
from regard.train import ray as module
from regard.train.loop import Recipe
from regard.train.pool import Call, Event
from regard.train.ray import run_on_ray
from regard.train.run import Run, train
from regard.view import runs as view
from regard.worlds.digits import small_digits
from regard.worlds.images import pack

TASKS = """
import os
def double(report, *, x):
    report({"half": x})
    return 2 * x
def fail(report, *, x):
    raise KeyError(x)
def die(report):
    os._exit(3)
def copy(report, *, source, folder):
    open(os.path.join(folder, "copy-of"), "w").write(open(source).read() + os.path.basename(source))
    return [os.path.dirname(source), folder]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    (tmp_path / "tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))


def runs(folder: Path) -> list[Call]:
    """Two trainings of 3 epochs on the same file of data."""
    data = folder.parent / "data.safetensors"
    images, test = small_digits("train"), small_digits("test")
    data.write_bytes(pack(images, test))
    folder.mkdir()
    calls = []
    for layer in ("attention", "identity"):
        run = Run(layer, 0, "data", "code", dim=8, depth=(1,), patch=2, recipe=Recipe(epochs=3))
        arguments = {"run": asdict(run), "folder": str(folder), "data": str(data)}
        calls.append(Call(run.key, "regard.train.run:train", arguments, files=("data",), folder="folder"))
    return calls


def of(events: Sequence[Event], key: str) -> list[Event]:
    return [event for event in events if event.key == key]


def test_a_killed_worker_loses_nothing(tasks: None, tmp_path: Path) -> None:
    for call in (alone := runs(tmp_path / "alone")):
        train(lambda facts: None, **call.arguments)
    calls = runs(tmp_path / "ray")
    (tmp_path / "source").write_text("text of ")
    (tmp_path / "there").mkdir()
    more = [
        Call(
            "copy",
            "tasks:copy",
            {"source": str(tmp_path / "source"), "folder": str(tmp_path / "there")},
            ("source",),
            "folder",
        ),
        Call("double", "tasks:double", {"x": 4}),
        Call("fail", "tasks:fail", {"x": "why"}),
    ]
    victim, events, pids = calls[0].key, list[Event](), dict[str, int]()
    for event in run_on_ray([*calls, *more], "local", 2):
        events.append(event)
        if event.kind == "started":
            pids[event.key] = event.facts["pid"]
        if event.key == victim and event.kind == "progress" and event.facts["epoch"] == 1:
            os.kill(pids[victim], signal.SIGKILL)
    assert [e.facts["attempt"] for e in of(events, victim) if e.kind == "started"] == [1, 2]
    assert of(events, victim)[-1].kind == "done"
    for call in calls:
        assert [e.facts["epoch"] for e in of(events, call.key) if e.kind == "progress"] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "ray").iterdir()) == sorted(
        p.name for p in (tmp_path / "alone").iterdir()
    )
    for call in alone:
        for name in (f"{call.key}.json", f"{call.key}.safetensors"):
            ours, theirs = (tmp_path / "ray" / name).read_bytes(), (tmp_path / "alone" / name).read_bytes()
            if name.endswith("json"):
                ours, theirs = ({**json.loads(x), "seconds": 0} for x in (ours, theirs))  # type: ignore[assignment]
            assert ours == theirs
    assert (tmp_path / "there" / "copy-of").read_text() == "text of source"
    assert str(tmp_path) not in "".join(of(events, "copy")[-1].facts["result"])
    assert of(events, "double")[-1].facts == {"result": 8}
    assert of(events, "fail")[-1].facts["reason"] == "KeyError: 'why'"
    assert "in fail" in of(events, "fail")[-1].facts["traceback"]


@pytest.fixture
def connected(tasks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")

    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=path)
    yield ray
    ray.shutdown()


def test_a_connection_is_used_and_left(connected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(reproduce_many(["biformer"], seeds=1, out=tmp_path / "ray", ray="auto"))
    assert [event.kind for event in events] == ["started", "done"]
    reproduce("biformer", seeds=1, out=tmp_path / "alone")
    ours, theirs = (json.loads((tmp_path / name / "biformer.json").read_text()) for name in ("ray", "alone"))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}

    monkeypatch.setattr(module, "RETRIES", 0)
    done = {e.key: e for e in run_on_ray([Call("die", "tasks:die"), Call("x", "tasks:double", {"x": 1})], "auto", 1)}
    assert done["die"].facts["reason"].startswith("WorkerCrashedError")
    assert done["x"].facts == {"result": 2}

    monkeypatch.setattr(module, "version", lambda package: "other")
    (_, refused) = run_on_ray([Call("x", "tasks:double", {"x": 1})], "auto")
    assert refused.facts["reason"].startswith("torch is ")
    assert connected.is_initialized()


def test_an_address_that_is_none() -> None:
    pytest.importorskip("ray")
    call = [Call("x", "tasks:double", {"x": 1})]
    with pytest.raises(ValueError, match="ray='ray://here:1' is not auto, local or host:port"):
        next(run_on_ray(call, "ray://here:1"))
    with pytest.raises(ValueError, match="workers=0 must be positive"):
        next(run_on_ray(call, "local", 0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"ray='{address}' cannot be reached: .*refused"):
            next(run_on_ray(call, address))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"regard\[ray\]"):
        next(run_on_ray([Call("x", "tasks:double", {"x": 1})], "local"))
    assert list(run_on_ray([], "local")) == []


@pytest.mark.parametrize(
    ("verb", "arguments", "files"),
    [
        (regard.compare, {"data": "small-digits", "patch": 2, "depth": (1,), "sides": (14, 15)}, ("data",)),
        (regard.compare_text, {"steps": 1, "depth": 1, "num_heads": 1}, ()),
    ],
)
def test_comparisons_hand_their_runs_over(
    verb: Any, arguments: dict[str, Any], files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Call] = []

    def cluster(calls: Sequence[Call], address: str, workers: int | None) -> Iterator[Event]:
        assert (address, workers) == ("there:6379", None)
        handed.extend(calls)
        for call in calls:
            yield Event(call.key, "started", {"attempt": 1})
            yield Event(call.key, "started", {"attempt": 2})
            yield Event(call.key, "failed", {"reason": "no machine left", "traceback": ""})

    monkeypatch.setattr(view, "run_on_ray", cluster)
    small = {"seeds": 1, "epochs": 1, "dim": 8, "out": tmp_path, "progress": False, **arguments}
    found = verb(["attention"], ray="there:6379", **small)
    assert [failure["reason"] for failure in found.failures] == ["no machine left"] * len(handed)
    assert {(call.files, call.folder) for call in handed} == {(files, "folder")}
    assert found.info["settings"]["workers"] == "all Ray"
