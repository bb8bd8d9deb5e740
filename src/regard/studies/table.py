"""What a study gives back: rows of plain values under named columns, and which claims hold of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = bool | int | float | str


@dataclass(frozen=True)
class Table:
    """Rows by column; each column holds one type. Iterating gives each row as a mapping.

    Attributes:
        title: what was measured.
        columns: their names, in order.
        rows: one tuple a row.
        claims: whether each claim of the study holds of this table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    claims: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{i}]={row} has {len(row)} values for {len(self.columns)} columns")
            for name, value, first in zip(self.columns, row, self.rows[0]):
                if type(value) not in (bool, int, float, str) or type(value) is not type(first):
                    expected = type(first).__name__ if i else "plain value"
                    raise ValueError(f"rows[{i}], column {name!r} is {value!r}; expected a {expected}")

    @classmethod
    def build(
        cls,
        title: str,
        rows: Sequence[Mapping[str, Value]],
        claims: Mapping[str, Callable[[Table], bool]] | None = None,
    ) -> Table:
        """A table of mappings with equal keys, each claim tried on it."""
        if not rows:
            raise ValueError("rows is empty: the columns cannot be known")
        columns = tuple(rows[0])
        for i, row in enumerate(rows):
            if tuple(row) != columns:
                raise ValueError(f"rows[{i}] has columns {tuple(row)}; expected {columns}")
        bare = cls(title, columns, tuple(tuple(row.values()) for row in rows))
        return cls(title, columns, bare.rows, {name: bool(holds(bare)) for name, holds in (claims or {}).items()})

    def __iter__(self) -> Iterator[dict[str, Value]]:
        return (dict(zip(self.columns, row)) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **values: Value) -> Table:
        """The rows with these values; no claims."""
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not in {self.columns}")
        kept = [row for row in self if all(row[name] == value for name, value in values.items())]
        return Table(self.title, self.columns, tuple(tuple(row.values()) for row in kept))

    def column(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise ValueError(f"column {name!r} is not in {self.columns}")
        return [row[self.columns.index(name)] for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        rows = [list(row) for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "claims": dict(self.claims)}

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table as Grid

        grid = Grid(*self.columns, title=self.title)
        for row in self.rows:
            grid.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
        yield grid
        for name, holds in self.claims.items():
            yield f"{'holds' if holds else 'fails'}: {name}"

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=120, force_terminal=False)
        with console.capture() as text:
            console.print(self)
        return text.get()
