"""Run the central claim of a paper at small scale, and keep what came out."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from regard.catalog.registry import ROOT, modules
from regard.claims.claim import Budget, ClaimResult, Row
from regard.train.files import write_whole


class ClaimModule(Protocol):
    """A file in this folder: ``run(budget, seeds)`` gives rows; ``SEEDS`` is the default number of seeds."""

    SEEDS: int

    def run(self, budget: Budget, seeds: int) -> list[Row]: ...


def claims() -> list[str]:
    """Slugs whose claim can be run."""
    folder = Path(__file__).parent
    return sorted(
        p.stem.replace("_", "-") for p in folder.glob("*.py") if p.stem not in ("claim", "plot", "reproduce") and not p.stem.startswith("_")
    )


def load(slug: str) -> ClaimModule:
    if slug not in claims():
        near = difflib.get_close_matches(slug, claims(), n=4, cutoff=0.3) or claims()
        raise ValueError(f"slug={slug!r} has no claim; nearest: {', '.join(near)}")
    return importlib.import_module(f"regard.claims.{slug.replace('-', '_')}")  # type: ignore[return-value]


def code_hash(slug: str) -> str:
    """Hash of the paper's own code and of its claim: a result of other code is stale."""
    stem = slug.replace("-", "_")
    files = sorted(p for p in ROOT.rglob(f"{stem}.py"))
    assert slug in modules() or files
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


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
    if budget not in ("smoke", "cpu", "gpu"):
        raise ValueError(f"budget={budget!r} is not one of smoke, cpu, gpu")
    claim = load(slug)
    seeds = (1 if budget == "smoke" else claim.SEEDS) if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    start = time.perf_counter()
    rows = claim.run(budget, seeds)
    result = ClaimResult(
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
    if out is not None and budget != "smoke":
        store(result, Path(out))
    return result


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
