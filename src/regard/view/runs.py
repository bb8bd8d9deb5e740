"""Many runs in worker processes: what is done is kept, what was done is not repeated."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from regard.train.pool import Call, Event, cores, run_calls
from regard.train.ray import run_on_ray
from regard.train.run import Keyed, finished
from regard.view.bars import Bars


class Runs:
    """The runs of a comparison by key, with their results and failures.

    Args:
        runs: in the order in which they are to be made.
        folder: where results are kept.
        resume: take over the results that are there, and go on with unfinished runs.
    """

    def __init__(self, runs: Mapping[str, Keyed], folder: Path, resume: bool) -> None:
        self.runs, self.folder, self.resume = runs, folder, resume
        self.results = {key: found for key, run in runs.items() if resume and (found := finished(run, folder))}
        self.reused = len(self.results)
        self.failures: list[dict[str, str]] = []

    def make(
        self,
        function: str,
        files: Mapping[str, str | None],
        workers: int | None,
        bars: Bars,
        epochs: int,
        said: Callable[[dict[str, Any]], str],
        ray: str | None = None,
    ) -> None:
        """Call ``function`` with ``run``, ``folder`` and ``files`` for every run that has no result yet.

        Args:
            function: ``module:name``.
            files: to read, the same for all runs, by the name of the argument; None for one that there is not.
            workers: processes; default: one a core.
            bars: that move on with every epoch.
            epochs: of one run.
            said: what a report of an epoch looks like in words.
            ray: the address of a Ray cluster to run on, see :func:`regard.train.ray.run_on_ray`.
        """
        calls = []
        for key in [key for key in self.runs if key not in self.results]:
            if not self.resume:
                (self.folder / f"{key}.part.safetensors").unlink(missing_ok=True)
            own = {"run": asdict(self.runs[key]), "folder": str(self.folder.resolve())}  # type: ignore[call-overload]
            read = tuple(name for name, path in files.items() if path is not None)
            calls.append(Call(key, function, {**own, **files}, files=read, folder="folder"))
        bars.trained(len(self.results) * epochs)
        with closing(
            run_calls(calls, workers or cores()) if ray is None else run_on_ray(calls, ray, workers)
        ) as events:
            for event in events:
                self._take(event, bars, said)

    def _take(self, event: Event, bars: Bars, said: Callable[[dict[str, Any]], str]) -> None:
        run = self.runs[event.key]
        if event.kind == "started":
            if event.facts["attempt"] > 1:
                bars.trained(0, f"{run.layer} again: its worker was lost")
        elif event.kind == "progress":
            bars.trained(1, f"{run.layer} {said(event.facts)}")
        elif event.kind == "done":
            self.results[event.key] = event.facts["result"]
        else:
            self.failures.append({"layer": run.layer, "seed": str(run.seed), **event.facts})

    def interrupted(self) -> KeyboardInterrupt:
        kept = f"{len(self.results)} of {len(self.runs)} runs are finished and kept in {self.folder}"
        return KeyboardInterrupt(f"{kept}; the same call with resume goes on from there")


def staff(workers: int | None, ray: str | None) -> int | str:
    """How many processes the runs are spread over, as a report says it."""
    return workers or cores() if ray is None else f"{workers or 'all'} Ray"


def machine() -> dict[str, Any]:
    """What the runs were made on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    versions = {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {"processor": name, "cores": cores(), "memory": memory, **versions}


def measure(call: Call, bars: Bars) -> dict[str, Any]:
    """The result of one measuring call, made while nothing else runs, or ``{"failed": reason}``."""
    bars.measure()
    with closing(run_calls([call], 1)) as events:
        for event in events:
            if event.kind == "progress":
                bars.measured(event.facts)
            elif event.kind == "failed":
                return {"failed": event.facts["reason"]}
    return event.facts["result"]


def names(layers: list[str | type] | tuple[str | type, ...], check: Callable[[str], object]) -> list[str]:
    """Names of layers, classes among them as ``module:Class``, each once; ``check`` raises for those that do not fit."""
    found = []
    for layer in layers:
        if isinstance(layer, type):
            if layer.__module__ == "__main__":
                raise ValueError(
                    f"{layer.__name__} is defined in the script itself; put it into a module, so that workers find it"
                )
            layer = f"{layer.__module__}:{layer.__qualname__}"
        check(layer)
        found.append(layer)
    if not found:
        raise ValueError("layers is empty; give at least one")
    return list(dict.fromkeys(found))
