"""Run the central claim of a paper at small scale, and keep what came out."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from regard.catalog.papers import papers
from regard.catalog.registry import ROOT, modules
from regard.claims.claim import Budget, ClaimResult, Row
from regard.train.files import write_whole
from regard.train.machine import machine
from regard.train.pool import Call, Event, run_calls, run_here
from regard.train.pretrained import card, trained
from regard.train.ray import run_on_ray


class ClaimModule(Protocol):
    """A file in this folder: ``run(budget, seeds)`` gives rows; ``SEEDS`` is the default number of seeds."""

    SEEDS: int

    def run(self, budget: Budget, seeds: int) -> list[Row]: ...


def claims() -> list[str]:
    """Slugs whose claim can be run: the files of this folder that are named after a paper."""
    stems = {p.stem.replace("_", "-") for p in Path(__file__).parent.glob("*.py")}
    return sorted(paper.slug for paper in papers() if paper.slug in stems)


def known(slug: str) -> str:
    """``slug``, if it has a claim."""
    if slug not in claims():
        near = difflib.get_close_matches(slug, claims(), n=4, cutoff=0.3) or claims()
        raise ValueError(f"slug={slug!r} has no claim; nearest: {', '.join(near)}")
    return slug


def load(slug: str) -> ClaimModule:
    return importlib.import_module(f"regard.claims.{known(slug).replace('-', '_')}")  # type: ignore[return-value]


def code_hash(slug: str) -> str:
    """Hash of what a claim's result depends on; a result with another hash is stale.

    That is the code, without docstrings, of the paper, of its claim and of what that uses in this folder, and the trained
    models that it names.
    """
    stem = slug.replace("-", "_")
    own = sorted(ROOT.rglob(f"{stem}.py"))
    assert slug in modules() or own
    code = [_code(path) for path in [*own, *_helpers(stem)]]
    models = sorted({name for text in code for name in re.findall(r"""\bpretrained\("([\w-]+)"\)""", text)})
    digests = [card(name)["sha256"] for name in models if name in trained()]
    return hashlib.sha256("\n".join([*code, *digests]).encode()).hexdigest()[:16]


def _code(path: Path) -> str:
    """The lines of a file that are neither blank nor of a docstring."""
    text = path.read_text()
    spans = [
        (node.body[0].lineno, node.body[0].end_lineno or 0)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    ]
    said = {line for first, last in spans for line in range(first, last + 1)}
    return "\n".join(line for i, line in enumerate(text.splitlines(), 1) if i not in said and line.strip())


def _helpers(stem: str) -> list[Path]:
    """The other files of this folder whose code a claim uses, directly or through one another."""
    folder, found, todo = ROOT / "claims", {stem, "claim"}, [stem]
    while todo:
        path = folder / f"{todo.pop()}.py"
        text = path.read_text() if path.exists() else ""
        new = set(re.findall(r"^\s*from regard\.claims(?:\.| import )(\w+)", text, re.MULTILINE)) - found
        found |= new
        todo += new
    return [folder / f"{name}.py" for name in sorted(found - {stem, "claim"})]


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def reproduce(
    slug: str, *, budget: Budget = "cpu", seeds: int | None = None, out: str | Path | None = "results"
) -> ClaimResult:
    """Run the claim of paper ``slug`` and store the result as ``OUT/SLUG.json``.

    Args:
        budget: ``smoke`` (seconds: does it run), ``cpu`` (ten minutes on two cores: the stored figure), ``gpu``.
        seeds: default the claim's own.
        out: folder for the result; None keeps it in memory. A smoke run is never stored.

    Raises:
        ValueError: no such claim (with the nearest names), unknown budget, fewer than one seed.
    """
    result = _measured(slug, budget, seeds)
    _keep(result, out)
    return result


def reproduce_many(
    slugs: Iterable[str],
    *,
    budget: Budget = "cpu",
    seeds: int | None = None,
    out: str | Path | None = "results",
    jobs: int | None = None,
    ray: str | None = None,
) -> Generator[Event, None, None]:
    """Run the claims of several papers, store each result as it comes, and yield what happens.

    A claim that fails, or whose process dies, is a ``failed`` event; the others go on. The ``result`` of a ``done`` event
    is a :class:`ClaimResult`.

    Args:
        slugs: each is run once.
        budget: as in :func:`reproduce`.
        seeds: default each claim's own.
        out: as in :func:`reproduce`.
        jobs: claims at a time, each in a worker process of one thread; default: one after another in this process, with
            all its threads; on a cluster as many as it has cores.
        ray: run on the Ray cluster ``auto``, ``local`` or ``host:port``, see :func:`regard.train.ray.run_on_ray`.

    Raises:
        ValueError: no such claim, unknown budget, fewer than one seed or job, a cluster that does not answer.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    _check(budget, seeds)
    calls = [
        Call(known(slug), f"{__name__}:work", {"slug": slug, "budget": budget, "seeds": seeds}, gpu=budget == "gpu")
        for slug in dict.fromkeys(slugs)
    ]
    here = run_here(calls) if jobs is None else run_calls(calls, jobs)
    with closing(here if ray is None else run_on_ray(calls, ray, jobs)) as events:
        for event in events:
            if event.kind == "done":
                result = ClaimResult.from_json(event.facts["result"])
                _keep(result, out)
                event = replace(event, facts={"result": result})
            yield event


def work(report: Callable[[dict[str, Any]], None], *, slug: str, budget: Budget, seeds: int | None) -> dict[str, Any]:
    """What a worker does for one claim; the result is stored by who asked for it."""
    return _measured(slug, budget, seeds).to_json()


def _check(budget: str, seeds: int | None) -> None:
    if budget not in ("smoke", "cpu", "gpu"):
        raise ValueError(f"budget={budget!r} is not one of smoke, cpu, gpu")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")


def _measured(slug: str, budget: Budget, seeds: int | None) -> ClaimResult:
    _check(budget, seeds)
    claim = load(slug)
    seeds = (1 if budget == "smoke" else claim.SEEDS) if seeds is None else seeds
    start = time.perf_counter()
    rows = claim.run(budget, seeds)
    return ClaimResult(
        slug=slug,
        rows=tuple(rows),
        budget=budget,
        seeds=seeds,
        seconds=round(time.perf_counter() - start, 1),
        commit=commit(),
        machine=machine(),
        torch=torch.__version__,
        code=code_hash(slug),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _keep(result: ClaimResult, out: str | Path | None) -> None:
    if out is not None and result.budget != "smoke":
        store(result, Path(out))


def store(result: ClaimResult, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.slug}.json"
    write_whole(path, json.dumps(result.to_json(), indent=1) + "\n")
    return path


def stored(slug: str, folder: str | Path = "results") -> dict[str, Any] | None:
    """The stored result, with ``stale`` saying whether the code has changed since."""
    path = Path(folder) / f"{slug}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    result["stale"] = result["code"] != code_hash(slug)
    return result


def choose(
    slugs: Sequence[str] = (),
    *,
    every: bool = False,
    stale: bool = False,
    kinds: Sequence[str] = (),
    out: str | Path = "results",
) -> list[str]:
    """Slugs of the claims to run.

    Args:
        slugs: these.
        every: and all that are stale or were never run.
        stale: and all that are stale.
        kinds: of these only papers of these kinds; alone, every claim of them.
        out: folder of the results.

    Raises:
        ValueError: a slug without a claim, a kind that is none.
    """
    chosen = [known(slug) for slug in slugs]
    if every or stale:
        results = {slug: stored(slug, out) for slug in claims()}
        chosen += [slug for slug, result in results.items() if (result["stale"] if result else every)]
    elif not slugs:
        chosen = claims()
    if kinds:
        fitting = {paper.slug for paper in papers(kind=list(kinds))}
        chosen = [slug for slug in chosen if slug in fitting]
    return list(dict.fromkeys(chosen))
