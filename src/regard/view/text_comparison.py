"""The outcome of a text comparison: figures, what follows from them, and how they are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from regard.view.saved import Saved

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions


@dataclass
class TextRow:
    """One layer: its finished runs on either task, its cost, or the ``reason`` why there is none."""

    layer: str
    family: str
    status: str = "done"
    reason: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] | None = None

    def last(self, figure: str) -> list[float]:
        """``figure`` after the last epoch, one a seed: ``perplexity`` or ``recall``."""
        return [run[figure][-1] for run in self.runs if figure in run]

    def mean(self, figure: str) -> float:
        return fmean(self.last(figure)) if self.last(figure) else math.nan

    def deviation(self, figure: str) -> float:
        """Sample deviation over seeds; NaN with one seed."""
        return stdev(self.last(figure)) if len(self.last(figure)) > 1 else math.nan

    def rate(self, what: str) -> float:
        """Tokens a second, ``training`` or ``decoding``; NaN where it was not measured."""
        found = self.cost and self.cost[what]
        return found["median"] if found else math.nan


def within(best: TextRow, other: TextRow) -> bool:
    """Whether the perplexity of ``other`` is within the spread over seeds of that of ``best``."""
    spreads = [row.deviation("perplexity") for row in (best, other)]
    errors = [s**2 / len(best.last("perplexity")) for s in spreads if not math.isnan(s)]
    return other.mean("perplexity") - best.mean("perplexity") <= math.sqrt(sum(errors))


@dataclass
class TextComparison(Saved):
    """Rows, one a layer, and what was run on what (``info``)."""

    rows: list[TextRow]
    failures: list[dict[str, str]] = field(default_factory=list)

    def ranked(self) -> list[TextRow]:
        """Rows with a perplexity, lowest first."""
        return sorted((row for row in self.rows if row.last("perplexity")), key=lambda row: row.mean("perplexity"))

    def front(self) -> set[str]:
        """Layers than which no other both decodes faster and has at most their perplexity."""
        names, fastest = set(), 0.0
        for row in self.ranked():
            if row.rate("decoding") > fastest:
                fastest = row.rate("decoding")
                names.add(row.layer)
        return names

    def close(self) -> list[TextRow]:
        """The row of lowest perplexity, those within the spread over seeds of it, and all between them."""
        ranked = self.ranked()
        return ranked[: 1 + max(i for i, row in enumerate(ranked) if i == 0 or within(ranked[0], row))]

    def advice(self) -> str:
        """What the figures speak for, in words."""
        ranked = self.ranked()
        if not ranked:
            return "No layer finished a run."

        def speed(row: TextRow) -> float:
            return -1.0 if math.isnan(row.rate("decoding")) else row.rate("decoding")

        close = self.close()
        choice = max(close, key=speed)
        best = ranked[0]
        said = f"Use {choice.layer}: perplexity {choice.mean('perplexity'):.2f} a byte"
        if choice is not best:
            near = f"within the spread over seeds of {best.layer} ({best.mean('perplexity'):.2f})"
            if not within(best, choice):
                near = f"better than {close[-1].layer}, which is {near}"
            said += f", {near}, and faster in decoding"
        recalled = [row for row in ranked if row.last("recall")]
        if recalled:
            most = max(recalled, key=lambda row: (row.mean("recall"), row is choice, speed(row)))
            said += f". Of what was said before it recalls {100 * choice.mean('recall'):.0f} %"
            if most is not choice:
                said += f"; most is recalled by {most.layer}, {100 * most.mean('recall'):.0f} %"
        return said + "."

    def summary(self) -> list[dict[str, Any]]:
        """One flat record a layer, lowest perplexity first, those without results last; missing figures are None."""
        ranked = self.ranked()
        records = []
        for row in ranked + [row for row in self.rows if row not in ranked]:
            record: dict[str, Any] = {"layer": row.layer, "status": row.status}
            for figure in ("perplexity", "recall"):
                record |= {
                    figure: row.mean(figure),
                    f"{figure}_deviation": row.deviation(figure),
                    f"{figure}_seeds": row.last(figure),
                }
            cost = row.cost or {}
            record |= {
                "parameters": cost.get("parameters"),
                "training_tokens_per_second": row.rate("training"),
                "decoding_tokens_per_second": row.rate("decoding"),
                "cache_bytes_per_token": cost.get("cache_bytes"),
                "reason": row.reason,
            }
            records.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()})
        return records

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
        table.add_column("layer", no_wrap=True)
        for head in HEADS:
            table.add_column("\n".join(head), justify="right", no_wrap=True)
        front = self.front()
        for row in self.ranked():
            table.add_row(("* " if row.layer in front else "  ") + row.layer, *cells(row))
        yield table
        yield "* no other layer both decodes faster and has a perplexity as low"
        yield self.advice()

    @property
    def title(self) -> str:
        data, settings = self.info["data"], self.info["settings"]
        return f"{data['name']}: {data['train']:,} bytes to learn from, {data['test']:,} to test on, {settings['seeds']} seeds"

    def page(self) -> str:
        from regard.view.text_report import html

        return html(self)

    @classmethod
    def load(cls, folder: str | Path) -> TextComparison:
        """A comparison that was saved in ``folder``."""
        facts = json.loads((Path(folder) / "compare.json").read_text())
        return cls(facts["info"], [TextRow(**row) for row in facts["rows"]], facts["failures"])


HEADS = (
    ("perplexity", "a byte"),
    ("recall", "%"),
    ("params", "k"),
    ("training", "tokens/s"),
    ("decoding", "tokens/s"),
    ("cache", "bytes/token"),
)


def cells(row: TextRow) -> list[str]:
    """The figures of ``row`` under :data:`HEADS`, empty where there is none."""
    found = [_spread(row, "perplexity", 1, 2), _spread(row, "recall", 100, 1)]
    if row.cost is None:
        return [*found, "", "", "", ""]
    bytes_a_token = row.cost["cache_bytes"]
    rates = ["" if math.isnan(row.rate(what)) else f"{row.rate(what):,.0f}" for what in ("training", "decoding")]
    return [
        *found,
        f"{row.cost['parameters'] / 1e3:.1f}",
        *rates,
        "" if bytes_a_token is None else f"{bytes_a_token:,.0f}",
    ]


def _spread(row: TextRow, figure: str, factor: float, digits: int) -> str:
    mean, deviation = factor * row.mean(figure), factor * row.deviation(figure)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"
