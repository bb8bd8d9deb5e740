"""What a claim gives back: rows of a metric, ours, the baseline's, the bar and whether it was met."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any, Literal

Budget = Literal["smoke", "cpu", "gpu"]
Direction = Literal[">=", "<=", ">", "<", "=="]
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Row:
    """One measured figure against its bar; ``values`` are the figures of the single seeds behind ``ours``.

    ``direction`` None: reported without a bar.
    """

    metric: str
    ours: float
    bar: float | None = None
    direction: Direction | None = None
    baseline: float | None = None
    values: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if (self.bar is None) != (self.direction is None):
            raise ValueError(f"metric={self.metric!r}: bar and direction go together")

    @property
    def passed(self) -> bool | None:
        if self.bar is None or self.direction is None:
            return None
        return _HOLDS[self.direction](self.ours, self.bar)


def mean_row(metric: str, values: list[float], bar: float, direction: Direction, **more: Any) -> Row:
    """A row whose figure is the mean over seeds."""
    return Row(metric, fmean(values), bar, direction, values=tuple(values), **more)


@dataclass(frozen=True)
class ClaimResult:
    """One run of a paper's claim, with what is needed to tell whether it is still true of the code."""

    slug: str
    rows: tuple[Row, ...]
    budget: Budget
    seeds: int
    seconds: float
    commit: str
    machine: str
    torch: str
    code: str
    date: str
    finished: bool = field(default=True)

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table

        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        title = f"{self.slug}: {'met' if self.passed else 'NOT met'} ({seeds}, {self.seconds:.0f} s)"
        table = Table("metric", "ours", "baseline", "bar", "", title=title, title_justify="left")
        for row in self.rows:
            bar = "" if row.bar is None else f"{row.direction} {row.bar:g}"
            state = {True: "met", False: "NOT met", None: "reported"}[row.passed]
            baseline = "" if row.baseline is None else f"{row.baseline:.4g}"
            table.add_row(row.metric, f"{row.ours:.4g}", baseline, bar, state)
        yield table

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> ClaimResult:
        """What :meth:`to_json` made, once more."""
        rows = tuple(
            Row(**{**{f.name: row[f.name] for f in fields(Row)}, "values": tuple(row["values"])})
            for row in facts["rows"]
        )
        return cls(**{**{f.name: facts[f.name] for f in fields(cls)}, "rows": rows})

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {**asdict(self), "rows": rows, "passed": self.passed}
