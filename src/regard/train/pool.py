"""Calls in worker processes of their own: one that dies takes only its call with it. On a cluster: :mod:`regard.train.ray`."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from regard.train.worker import perform


@dataclass(frozen=True)
class Call:
    """A function that a worker is to call with a progress callback and ``arguments``; JSON must hold these and the result.

    Args:
        key: name of the call, and what the names of all files that it leaves in ``folder`` begin with.
        function: ``module:name``.
        arguments: passed by name.
        files: which of the arguments name a file to read.
        folder: which of the arguments names a folder to leave files in; empty: none.
        gpu: it wants a GPU of its own, where there is one.
    """

    key: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    folder: str = ""
    gpu: bool = False


@dataclass(frozen=True)
class Event:
    """What became of a call: ``started`` with the ``attempt`` (from 1; a call whose worker is lost may start again),
    ``progress`` (any number of times), then ``done`` with a ``result`` or ``failed`` with a ``reason``."""

    key: str
    kind: Literal["started", "progress", "done", "failed"]
    facts: dict[str, Any]

    @property
    def last(self) -> bool:
        return self.kind in ("done", "failed")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that runs one call after another, with one thread, in a session of its own (Ctrl-C does not reach it)."""

    def __init__(self) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "regard.train.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                start_new_session=True,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        except OSError:
            self.errors.close()
            raise

    def run(self, call: Call) -> Iterator[Event]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"function": call.function, "arguments": call.arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died between two calls; there is nothing to read below
        for line in self.process.stdout:
            facts = json.loads(line)
            kind = facts.pop("kind")
            yield Event(call.key, kind, facts)
            if kind != "progress":
                return
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        reason = f"the worker process ended with code {self.process.wait()}" + "".join(f": {text}" for text in last)
        yield Event(call.key, "failed", {"reason": reason, "traceback": ""})

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()


def run_here(calls: Sequence[Call]) -> Generator[Event, None, None]:
    """Run ``calls`` one after another in this process, with all its threads; their progress is not heard."""
    for call in calls:
        yield Event(call.key, "started", {"attempt": 1})
        yield Event(call.key, *perform(call.function, call.arguments, lambda facts: None))


def run_calls(calls: Sequence[Call], workers: int) -> Generator[Event, None, None]:
    """Run ``calls`` in ``workers`` processes, in order, and yield what happens; leaving the loop early stops them all.

    Raises:
        ValueError: fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be positive")
    todo: queue.SimpleQueue[Call] = queue.SimpleQueue()
    for call in calls:
        todo.put(call)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    stopped = threading.Event()
    staff: list[_Worker] = []
    lock = threading.Lock()

    def hire() -> _Worker | None:
        with lock:
            if stopped.is_set():
                return None
            staff.append(_Worker())
            return staff[-1]

    def serve() -> None:
        worker = None
        while not stopped.is_set():
            try:
                call = todo.get_nowait()
            except queue.Empty:
                return
            try:
                if worker is None or not worker.alive:
                    worker = hire()
                if worker is None:
                    return
                events.put(Event(call.key, "started", {"attempt": 1}))
                for event in worker.run(call):
                    events.put(event)
            except Exception as error:  # whoever waits for this call must hear of it, whatever went wrong
                reason = f"no worker process: {type(error).__name__}: {error}"
                events.put(Event(call.key, "failed", {"reason": reason, "traceback": ""}))

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(calls)))]
    for thread in threads:
        thread.start()
    left = len(calls)
    try:
        while left:
            event = events.get()
            left -= event.last
            yield event
    finally:
        with lock:
            stopped.set()
            for worker in staff:
                worker.process.kill()
        for thread in threads:
            thread.join()
        for worker in staff:
            worker.stop()
