"""Calls on a Ray cluster, whose machines share no folder: files travel with the calls, and back with what they report.

A call whose worker is lost starts again, elsewhere if need be, from the files of its last report.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import regard
from regard.train.files import write_whole
from regard.train.pool import Call, Event, cores
from regard.train.worker import perform

RETRIES, PAUSE, PATIENCE = 3, 0.2, 10.0
Files = dict[str, bytes]


class _Mailbox:
    """An actor on the driver's machine: what calls report until the driver takes it, and the newest files of each."""

    def __init__(self) -> None:
        self.letters: list[tuple[Event, Files]] = []
        self.files: dict[str, Files] = {}
        self.attempts: Counter[str] = Counter()

    def begin(self, key: str, facts: dict[str, Any]) -> Files:
        self.attempts[key] += 1
        self.letters.append((Event(key, "started", {"attempt": self.attempts[key], **facts}), {}))
        return self.files.get(key, {})

    def put(self, key: str, facts: dict[str, Any], files: Files) -> None:
        self.files[key] = files
        self.letters.append((Event(key, "progress", facts), files))

    def forget(self, key: str) -> None:
        self.files.pop(key, None)

    def take(self) -> list[tuple[Event, Files]]:
        letters, self.letters = self.letters, []
        return letters


def _contents(folder: str | Path, key: str = "") -> Files:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name.startswith(key)}


def _work(mailbox: Any, call: Call, inputs: dict[str, Any], kept: Files, torch: str) -> tuple[Event, Files]:
    """Runs on a worker: lay out the files, call, and give back the outcome with the files that are there then."""
    import ray

    facts = {"machine": platform.node(), "pid": os.getpid()}
    kept |= ray.get(mailbox.begin.remote(call.key, facts))
    if version("torch") != torch:
        reason = f"torch is {version('torch')} on {facts['machine']} and {torch} here; results would not be the same"
        return Event(call.key, "failed", {"reason": reason, "traceback": ""}), {}
    with tempfile.TemporaryDirectory() as read, tempfile.TemporaryDirectory() as folder:
        arguments = dict(call.arguments)
        for name, content in inputs.items():
            arguments[name] = str(Path(read) / Path(arguments[name]).name)
            Path(arguments[name]).write_bytes(ray.get(content))
        for name, content in kept.items():
            (Path(folder) / name).write_bytes(content)
        if call.folder:
            arguments[call.folder] = folder
        outcome = perform(
            call.function,
            arguments,
            lambda facts: ray.get(mailbox.put.remote(call.key, facts, _contents(folder))),
        )
        return Event(call.key, *outcome), _contents(folder)


@contextmanager
def _connected(address: str, workers: int | None) -> Iterator[Any]:
    """The module ``ray``, connected; a connection that was there already is left as it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError("running on a cluster needs Ray: pip install 'regard[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # as worker processes without Ray
        same = {"env_vars": {**threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
        ray.init("local", num_cpus=workers or cores(), include_dashboard=False, runtime_env=same, **quiet)
    else:
        try:
            if address != "auto":
                host, port = address.split(":")
                socket.create_connection((host, int(port)), PATIENCE).close()
            ray.init(address, runtime_env={"env_vars": threads, "py_modules": [regard]}, **quiet)
        except (OSError, RuntimeError) as error:
            said = str(error).strip().splitlines()[0]
            raise ValueError(f"ray={address!r} cannot be reached: {said}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def run_on_ray(calls: Sequence[Call], address: str, workers: int | None = None) -> Generator[Event, None, None]:
    """Run ``calls`` on a Ray cluster, in order, one core each, and yield what happens, like :func:`regard.train.pool.run_calls`.

    This process reads and writes all files: those that a call reads are sent along, those that it leaves in its folder
    come back with every report and at the end. A ``started`` event says ``machine`` and ``pid``; its ``attempt`` is above 1
    for a call whose worker was lost, at most three times.

    Args:
        calls: what to run.
        address: ``auto`` (the cluster that this machine is part of), its ``host:port``, or ``local`` (one started for
            these calls, on this machine).
        workers: calls at a time; default: as many as the cluster has cores.

    Raises:
        ValueError: an address of another form or where nobody answers, fewer than one worker.
        ModuleNotFoundError: Ray is not installed.
    """
    if address not in ("auto", "local") and not re.fullmatch(r"[^\s:/]+:\d+", address):
        raise ValueError(f"ray={address!r} is not auto, local or host:port")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be positive")
    if calls:
        with _connected(address, workers) as ray:
            yield from _drive(ray, calls, len(calls) if workers is None else workers)


def _drive(ray: Any, calls: Sequence[Call], workers: int) -> Generator[Event, None, None]:
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    work = ray.remote(num_cpus=1, max_retries=RETRIES)(_work)
    mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    gpus = min(1, ray.cluster_resources().get("GPU", 0))
    sent = {
        name: ray.put(Path(name).read_bytes()) for name in {call.arguments[f] for call in calls for f in call.files}
    }
    todo, running, written = list(calls)[::-1], dict[Any, Call](), dict[str, set[str]]()
    by_key = {call.key: call for call in calls}

    def submit(call: Call) -> None:
        kept = _contents(call.arguments[call.folder], call.key) if call.folder else {}
        written[call.key] = set(kept)
        inputs = {name: sent[call.arguments[name]] for name in call.files}
        on = work.options(num_gpus=gpus if call.gpu else 0)
        running[on.remote(mailbox, call, inputs, kept, version("torch"))] = call

    def keep(call: Call, files: Files) -> None:
        if call.folder:
            folder = Path(call.arguments[call.folder])
            for name, content in files.items():
                write_whole(folder / name, content)
            for name in written[call.key] - files.keys():
                (folder / name).unlink(missing_ok=True)
            written[call.key] = set(files)

    def read() -> Iterator[Event]:
        for event, files in ray.get(mailbox.take.remote()):
            if event.kind == "progress":
                keep(by_key[event.key], files)
            yield event

    try:
        while todo or running:
            while todo and len(running) < workers:
                submit(todo.pop())
            ended, _ = ray.wait(list(running), timeout=PAUSE)
            yield from read()
            for reference in ended:
                call = running.pop(reference)
                try:
                    event, files = ray.get(reference)
                except RayError as error:
                    said = str(error).strip().splitlines()[0]
                    event = Event(call.key, "failed", {"reason": f"{type(error).__name__}: {said}", "traceback": ""})
                else:
                    keep(call, files)
                mailbox.forget.remote(call.key)
                yield event
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.kill(mailbox)
