"""The figure of a study, and what it shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

from regard.catalog.registry import methods
from regard.train.files import write_whole


def plot(slug: str, out: str | Path = "results", *, scale: Literal["toy", "full"] = "full") -> tuple[Path, str]:
    """Run the study of a paper, draw it to ``OUT/SLUG.png``, and say in a sentence what it shows.

    Args:
        slug: of a paper that has a study.
        out: folder of the picture.
        scale: ``toy`` (seconds) or ``full`` (a minute or so).

    Raises:
        ValueError: the paper has no study.
        ModuleNotFoundError: matplotlib is not installed.
    """
    studies = {record.paper: record for record in methods("study")}
    if slug not in studies:
        raise ValueError(f"slug={slug!r} has no study to draw; there are {', '.join(sorted(studies))}")
    study = studies[slug].create()
    table = study.run(scale)
    picture = io.BytesIO()
    study.plot(table).savefig(picture, dpi=150, format="png")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}.png"
    write_whole(path, picture.getvalue())
    return path, study.finding(table)
