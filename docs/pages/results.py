"""Stored results of claims, and the scoreboard made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages.docstring import code

from regard.catalog.papers import papers
from regard.claims.reproduce import claims, stored

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def rows(result: dict[str, Any]) -> str:
    """The figures of one claim as a table."""
    lines = ["| metric | ours | baseline | bar | |", "| --- | --: | --: | --: | --- |"]
    for row in result["rows"]:
        bar = "" if row["bar"] is None else f"{row['direction']} {row['bar']:g}"
        state = {True: "met", False: "**not met**", None: "reported"}[row["passed"]]
        cells = (code(row["metric"]), _number(row["ours"]), _number(row["baseline"]), bar, state)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def state(slug: str) -> str:
    """Met, not met, or why there is no answer."""
    result = stored(slug, RESULTS)
    if result is None:
        return "claim not run yet" if slug in claims() else "no claim yet"
    return ("met" if result["passed"] else "not met") + (", of earlier code" if result["stale"] else "")


def circumstances(result: dict[str, Any]) -> str:
    stale = " The code has changed since: run it again." if result["stale"] else ""
    return (
        f"{result['seeds']} seed{'s' if result['seeds'] > 1 else ''}, {result['seconds']:.0f} s on {result['machine']}, "
        f"torch {result['torch']}, commit {code(result['commit'])}, {result['date']}.{stale}"
    )


def claim(slug: str) -> str:
    """What a method's page says of its claim."""
    run = f"```console\n$ regard reproduce {slug}\n```"
    result = stored(slug, RESULTS)
    if result is None:
        return f"Claim not run yet.\n\n{run}" if slug in claims() else "Claim not run yet: it has not been written."
    verdict = "Met." if result["passed"] else "**Not met.**"
    return f"{verdict} {circumstances(result)}\n\n{rows(result)}\n\n{run}"


ORDER = ("not met", "met", "not met, of earlier code", "met, of earlier code", "claim not run yet")


def scoreboard() -> str:
    """Every claim with what came out, those that are not met first."""
    titles = {paper.slug: paper.title for paper in papers(built=True)}
    results = {slug: stored(slug, RESULTS) for slug in claims()}
    by_state = {name: [slug for slug in results if state(slug) == name] for name in ORDER}
    lines = [
        "# Scoreboard",
        "",
        "The central claim of each paper, run again at small scale against the same network without the paper's idea. The bar "
        "is set before the figure is seen; a claim that is not met is shown as not met. *Of earlier code* are results whose "
        "code has changed since they were made.",
        "",
        "| claims | of code as it is | of earlier code | |",
        "| --- | --: | --: | --: |",
        *(
            f"| {name} | {now} | {before} | {now + before} |"
            for name in ("met", "not met")
            for now, before in [(len(by_state[name]), len(by_state[f"{name}, of earlier code"]))]
        ),
        f"| not run yet | | | {len(by_state[ORDER[-1]])} |",
        f"| **all**, of {len(titles)} papers built | | | **{len(results)}** |",
        "",
        "```console\n$ regard reproduce --all --jobs 2\n```",
        "",
        "| claim | | bars met | seeds | seconds | machine | date | code changed since |",
        "| --- | --- | --: | --: | --: | --- | --- | --- |",
        *(_line(slug, results[slug]) for slugs in by_state.values() for slug in slugs),
    ]
    for name, slugs in by_state.items():
        run = {slug: result for slug in slugs if (result := results[slug])}
        if run:
            lines += ["", f"## {name.capitalize()}"]
        for slug, result in run.items():
            link = f"[{titles[slug]}](methods/{slug}.md)"
            lines += ["", f"### {slug}", "", f"{link}. {circumstances(result)}", "", rows(result)]
    return "\n".join(lines)


def _line(slug: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"| {slug} | not run yet | | | | | | |"
    barred = [row["passed"] for row in result["rows"] if row["passed"] is not None]
    cells = (
        f"[{slug}](#{slug})",
        "met" if result["passed"] else "**not met**",
        f"{sum(barred)} of {len(barred)}",
        str(result["seeds"]),
        f"{result['seconds']:.0f}",
        result["machine"],
        result["date"],
        "yes" if result["stale"] else "no",
    )
    return "| " + " | ".join(cells) + " |"


def measurements(slug: str) -> str:
    """Times beside peers from ``results/bench``; empty when there are none."""
    import csv

    lines = []
    for file in sorted((RESULTS / "bench").glob("*.csv")):
        with file.open() as text:
            for row in csv.DictReader(text):
                if row["subject"] == slug:
                    cells = (row["shape"], row["mode"], row["peer"], row["milliseconds"], row["peer_milliseconds"])
                    ratio = f"{float(row['ratio']):.2f}"
                    lines.append("| " + " | ".join((*cells, ratio, f"{row['device']}, torch {row['torch']}")) + " |")
    if not lines:
        return ""
    head = (
        "| shape | mode | peer | ms | peer's ms | peer / ours | machine |\n| --- | --- | --- | --: | --: | --: | --- |"
    )
    return "\n".join([head, *lines])
