"""The outcome of a comparison: figures, what follows from them, and how they are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from regard.bench.cost import Cost, Flops, Timing
from regard.bench.scaling import Power, Scaling
from regard.view.maps import Map
from regard.view.saved import Saved

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions


@dataclass
class Row:
    """One layer: its finished runs, its cost, or the ``reason`` why there is none (``status`` says which kind of reason)."""

    layer: str
    family: str
    status: str = "done"
    reason: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost | None = None
    scaling: Scaling | None = None

    @property
    def accuracies(self) -> list[float]:
        """Share of test images classified rightly after the last epoch, one a seed."""
        return [run["accuracy"][-1] for run in self.runs]

    @property
    def accuracy(self) -> float:
        return fmean(self.accuracies) if self.runs else math.nan

    @property
    def deviation(self) -> float:
        """Sample deviation of the accuracy over seeds; NaN with one seed."""
        return stdev(self.accuracies) if len(self.runs) > 1 else math.nan


def gap(best: Row, other: Row) -> tuple[float, float]:
    """By how much ``other`` is less accurate than ``best``, and the standard error of that.

    Both saw the same test images, so the difference is taken image by image; the error is that of the mean over images,
    with the spread over seeds added in squares.
    """
    right = [
        [fmean(map(int, column)) for column in zip(*(run["correct"] for run in row.runs))] for row in (best, other)
    ]
    differences = [a - b for a, b in zip(*right)]
    variance = stdev(differences) ** 2 / len(differences) if len(differences) > 1 else 0.0
    for row in (best, other):
        if len(row.runs) > 1:
            variance += row.deviation**2 / len(row.runs)
    return fmean(differences), math.sqrt(variance)


def within(best: Row, other: Row) -> bool:
    """Whether ``other`` is no more than one standard error behind ``best``."""
    behind, error = gap(best, other)
    return behind <= error


@dataclass
class Comparison(Saved):
    """Rows, one a layer, and what was run on what (``info``); ``maps`` show where layers look in the images ``samples``."""

    rows: list[Row]
    samples: list[Any] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    def ranked(self) -> list[Row]:
        """Rows with results, most accurate first."""
        return sorted((row for row in self.rows if row.runs), key=lambda row: -row.accuracy)

    def measured(self) -> list[Row]:
        """Ranked rows that have a cost too."""
        return [row for row in self.ranked() if row.cost is not None]

    def close(self, among: Sequence[Row] | None = None) -> list[Row]:
        """The most accurate row, of ``among`` or of all, those no more than one standard error behind it, and all between them.

        Without those between, a layer would be preferred for an error that is larger than another's.
        """
        ranked = [row for row in self.ranked() if among is None or row in among]
        last = max((i for i, row in enumerate(ranked) if i == 0 or within(ranked[0], row)), default=-1)
        return ranked[: last + 1]

    def choice(self, among: Sequence[Row] | None = None) -> Row | None:
        """The fastest of the most accurate, of ``among`` or of all: what the figures speak for."""
        close = [row for row in self.close(among) if row.cost is not None]
        return min(close, key=lambda row: row.cost.forward.median) if close else None  # type: ignore[union-attr]

    def front(self) -> set[str]:
        """Layers than which no other is both faster and at least as accurate."""
        names, fastest = set(), math.inf
        for row in self.measured():
            assert row.cost is not None
            if row.cost.forward.median < fastest:
                fastest = row.cost.forward.median
                names.add(row.layer)
        return names

    def summary(self) -> list[dict[str, Any]]:
        """One flat record a layer, most accurate first, those without results last; missing figures are None."""
        ranked = self.ranked()
        records = []
        for row in ranked + [row for row in self.rows if not row.runs]:
            cost, fit = row.cost, row.scaling.time_fit if row.scaling else None
            difference, error = gap(ranked[0], row) if row.runs else (None, None)
            records.append(
                {
                    "layer": row.layer,
                    "status": row.status,
                    "accuracy": row.accuracy if row.runs else None,
                    "deviation": None if math.isnan(row.deviation) else row.deviation,
                    "accuracies": row.accuracies,
                    "behind": difference,
                    "behind_error": error,
                    "parameters": cost and cost.parameters,
                    "flops": cost and cost.flops.total,
                    "forward_ms": cost and cost.forward.median,
                    "step_ms": cost and cost.step.median,
                    "step_bytes": cost and cost.step_memory,
                    "exponent": fit and fit.exponent,
                    "exponent_error": fit and fit.error,
                    "reason": row.reason,
                }
            )
        return records

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """The ranking as a table, with as many columns as there is room for, and the advice."""
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
        table.add_column("layer", no_wrap=True)
        heads = [
            "accuracy\n%",
            "behind\npoints",
            "forward\nms",
            "step\nms",
            "memory\nMB",
            "time\n~ n^",
            "params\nk",
            "FLOPs\nM",
        ]
        heads = heads[: max(2, (options.max_width - 28) // 11)]
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        choice, front = self.choice(), self.front()
        ranked = self.ranked()
        for row in ranked:
            behind, error = gap(ranked[0], row)
            distance = "" if row is ranked[0] else f"{100 * behind:.1f} ± {100 * error:.1f}"
            cells = [format_percent(row.accuracy, row.deviation), distance]
            if row.cost is not None:
                cost, fit = row.cost, row.scaling.time_fit if row.scaling else None
                cells += [f"{cost.forward.median:.2f}", f"{cost.step.median:.1f}", f"{cost.step_memory / 1e6:.1f}"]
                cells += [
                    f"{fit.exponent:.2f}" if fit else "",
                    f"{cost.parameters / 1e3:.1f}",
                    f"{cost.flops.total / 1e6:.2f}",
                ]
            mark = "* " if row.layer in front else "  "
            table.add_row(mark + row.layer, *cells[: len(heads)], style="bold" if row is choice else None)
        yield table
        yield "* no other layer is both faster and more accurate"
        yield self.advice()

    @property
    def title(self) -> str:
        data, settings = self.info["data"], self.info["settings"]
        return f"{data['name']}: {data['train']} images to learn from, {data['test']} to test on, {settings['seeds']} seeds"

    def advice(self) -> str:
        """What the figures speak for, in words."""
        ranked = self.ranked()
        if not ranked:
            return "No layer finished a run."
        said = self._advise(ranked)
        said = said[0].upper() + said[1:]
        attention = [row for row in ranked if row.layer not in ("convolution", "identity")]
        choice = self.choice()
        if choice is None or choice in attention or not attention:
            return said
        return f"{said} Among the attention layers: {self._advise(attention)}"

    def _advise(self, among: list[Row]) -> str:
        best, choice, close = among[0], self.choice(among), self.close(among)
        top = f"{best.layer} is the most accurate ({100 * best.accuracy:.1f} %)"
        if choice is None or best.cost is None or choice.cost is None:
            return f"{top}. Nothing was measured."
        if choice is best:
            alike = sum(row is best or within(best, row) for row in close)
            rest = f"the fastest of the {alike} within one standard error of it" if alike > 1 else "ahead of the others"
            return f"use {best.layer}, the most accurate ({100 * best.accuracy:.1f} %) and {rest}."
        behind, error = gap(best, choice)
        near = "within one standard error of it"
        return (
            f"use {choice.layer}: {top}, but {choice.layer} ({100 * choice.accuracy:.1f} %, {100 * behind:.1f} ± "
            f"{100 * error:.1f} points behind) is {near if behind <= error else f'ahead of {close[-1].layer}, which is {near},'} "
            f"and {best.cost.forward.median / choice.cost.forward.median:.1f} times as fast."
        )

    def page(self) -> str:
        from regard.view.report import html

        return html(self)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """A comparison that was saved in ``folder``."""
        facts = json.loads((Path(folder) / "compare.json").read_text())
        rows = [
            Row(**{**row, "cost": read_cost(row["cost"]), "scaling": read_scaling(row["scaling"])})
            for row in facts["rows"]
        ]
        maps = [Map(m["layer"], tuple(m["grid"]), m["received"]) for m in facts["maps"]]
        return cls(facts["info"], rows, facts["samples"], maps, facts["failures"])


def format_percent(mean: float, deviation: float) -> str:
    return f"{100 * mean:.1f}" if math.isnan(deviation) else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def read_cost(facts: dict[str, Any] | None) -> Cost | None:
    """A :class:`Cost` from what ``asdict`` made of it."""
    if facts is None:
        return None
    timings = {key: Timing(**facts[key]) for key in ("forward", "step")}
    return Cost(**{**facts, **timings, "flops": Flops(**facts["flops"])})


def read_scaling(facts: dict[str, Any] | None) -> Scaling | None:
    """A :class:`Scaling` from what ``asdict`` made of it."""
    if facts is None:
        return None
    fits = {key: facts[key] and Power(**facts[key]) for key in ("time_fit", "memory_fit")}
    left_out = [(n, reason) for n, reason in facts["left_out"]]
    return Scaling(**{**facts, **fits, "time": [Timing(**t) for t in facts["time"]], "left_out": left_out})
