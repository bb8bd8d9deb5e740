"""The 231 papers: read from one TOML file, found by their facts and facets, compared, counted, validated."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from regard.catalog import registry
from regard.catalog.facets import (
    FLAGS,
    MULTIPLE,
    SINGLE,
    Domain,
    Facets,
    Kind,
    nearest,
    one_of,
    read_facets,
    read_value,
)

if TYPE_CHECKING:
    from rich.table import Table

FILE = Path(__file__).with_name("papers.toml")
BIBLIOGRAPHY = ("title", "authors", "arxiv", "year", "kind", "domain", "official", "depends_on")
_ENUMS: dict[str, type[StrEnum]] = {"kind": Kind, "domain": Domain, **SINGLE, **MULTIPLE}
FILTERS = ("kind", "domain", "year", *SINGLE, *MULTIPLE, *FLAGS, "host")


@dataclass(frozen=True)
class Paper:
    """One paper: what it is called, where it is, what it does.

    Args:
        slug: name in this catalogue, and of the file that holds its code.
        authors: "First Last", or "Family, First" where the family name has several words; empty where not recorded.
        arxiv: identifier there.
        official: "owner/name" of the authors' repository.
        depends_on: slugs of the papers whose code it builds on.
    """

    slug: str
    title: str
    year: int
    kind: Kind
    domain: Domain
    facets: Facets
    authors: tuple[str, ...] = ()
    arxiv: str | None = None
    official: str | None = None
    depends_on: tuple[str, ...] = ()

    @property
    def module(self) -> str | None:
        """Dotted name of the module that holds the code; None while it is not built."""
        found = registry.modules().get(self.slug)
        return found[0] if found else None

    @property
    def built(self) -> bool:
        return self.module is not None

    def as_dict(self) -> dict[str, Any]:
        """Everything known, ready for JSON."""
        return {**asdict(self), "built": self.built, "module": self.module}


class Papers(list[Paper]):
    """A list of papers that shows itself as a table."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Paper: ...
    @overload
    def __getitem__(self, index: slice) -> Papers: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Paper | Papers:
        return Papers(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def table(self) -> Table:
        """The list as a rich table, one line a paper; titles are cut where the terminal ends."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        caption = f"{len(self)} found, {sum(paper.built for paper in self)} built"
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
        for column in ("slug", "year", "kind", "domain", "built"):
            table.add_column(column, no_wrap=True)
        table.add_column("title")
        for p in self:
            title = Text(p.title, no_wrap=True, overflow="ellipsis")
            table.add_row(p.slug, str(p.year), p.kind, p.domain, "yes" if p.built else "", title)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(color_system=None, width=None if sys.stdout.isatty() else 120)
        with console.capture() as text:
            console.print(self.table())
        return text.get()


def _read_paper(slug: str, row: Mapping[str, Any]) -> Paper:
    """One row of the file, every value checked; ValueError names slug, key and value."""

    def words(key: str) -> tuple[str, ...]:
        value = row.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise ValueError(f"{slug}: {key}={value!r} must be a list of names")
        return tuple(value)

    def like(key: str, pattern: str, wanted: str) -> str | None:
        value = row.get(key)
        if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
            raise ValueError(f"{slug}: {key}={value!r} must be {wanted}")
        return value

    title, year = like("title", r"\S(.*\S)?", "a line of text"), row.get("year")
    if title is None or type(year) is not int or not 2014 <= year <= 2100:
        raise ValueError(f"{slug}: title={title!r} and year={year!r} must be a line of text and a year since 2014")
    return Paper(
        slug,
        title,
        year,
        one_of(Kind, f"{slug}: kind", row.get("kind")),
        one_of(Domain, f"{slug}: domain", row.get("domain")),
        read_facets(slug, {key: value for key, value in row.items() if key not in BIBLIOGRAPHY}),
        words("authors"),
        like("arxiv", r"\d{4}\.\d{4,5}", 'an identifier such as "1911.02150"'),
        like("official", r"[\w.-]+/[\w.-]+", '"owner/name"'),
        words("depends_on"),
    )


@cache
def _catalogue() -> dict[str, Paper]:
    rows = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {slug: _read_paper(slug, row) for slug, row in rows.items()}


def get(slug: str) -> Paper:
    """The paper called ``slug``; underscores count as hyphens. Raises ValueError with the nearest slugs."""
    known = _catalogue()
    if (wanted := slug.replace("_", "-")) not in known:
        raise ValueError(f"slug={slug!r} is not in the catalogue; nearest: {nearest(wanted, known, 4)}")
    return known[wanted]


def _values(paper: Paper, key: str) -> tuple[Any, ...]:
    value = getattr(paper if key in ("kind", "domain", "year") else paper.facets, key)
    return value if isinstance(value, tuple) else (value,)


def _wanted(key: str, value: Any) -> tuple[Any, ...]:
    """A filter's value as a tuple of checked alternatives."""
    values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if key == "year":
        if not all(type(v) is int for v in values):
            raise ValueError(f"year={value!r} must be a year or several")
        return values
    return tuple(one_of(_ENUMS[key], key, v) if key in _ENUMS else read_value("", key, v) for v in values)


def _check_names(asked: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, value in asked.items():
        if key not in known:
            raise ValueError(f"{key}={value!r} is not something to filter by; nearest: {nearest(key, known, 4)}")


def find(**facets: Any) -> Papers:
    """Papers that match every facet given; a list of values means one of them.

    Args:
        facets: any of ``FILTERS``: ``kind``, ``domain``, ``year`` or a facet. A paper with several values matches by
            any of them; ``host`` matches by a part of it.

    Raises:
        ValueError: an unknown facet or value; the message has the nearest names.

    Example:
        >>> [paper.slug for paper in find(distribution="relu", kind=["layer", "model"])]
        ['rela']
    """
    _check_names(facets, FILTERS)
    asked = {key: _wanted(key, value) for key, value in facets.items()}

    def matches(paper: Paper) -> bool:
        return all(
            any(host.lower() in paper.facets.host.lower() for host in wanted)
            if key == "host"
            else not set(wanted).isdisjoint(_values(paper, key))
            for key, wanted in asked.items()
        )

    return Papers(paper for paper in _catalogue().values() if matches(paper))


def papers(text: str | None = None, *, built: bool | None = None, **facets: Any) -> Papers:
    """The catalogue, or the part of it that matches.

    Args:
        text: part of the title or of the slug, upper and lower case alike.
        built: only papers with code here (True), or only those without (False).
        facets: as in :func:`find`.

    Raises:
        ValueError: an unknown facet or value; the message has the nearest names.

    Example:
        >>> [paper.slug for paper in papers("neighborhood", kind="layer")]
        ['faster-neighborhood-attention']
    """
    _check_names(facets, ("text", "built", *FILTERS))
    found = find(**facets)
    if text is not None:
        found = Papers(p for p in found if text.lower() in p.title.lower() or text.lower() in p.slug)
    return found if built is None else Papers(p for p in found if p.built == built)


def table(rows: str, cols: str) -> dict[Any, dict[Any, int]]:
    """How many papers have each pair of values of two facets, zeros included.

    A paper with several values of a facet counts in each of them: ``table("cost", "kind")["N"]["layer"]``.
    """
    for name, key in (("rows", rows), ("cols", cols)):
        if key not in FILTERS or key == "host":
            raise ValueError(f"{name}={key!r} is not a facet to count; nearest: {nearest(key, FILTERS[:-1], 4)}")
    everything = list(_catalogue().values())

    def axis(key: str) -> list[Any]:
        values = {value for paper in everything for value in _values(paper, key)}
        return list(_ENUMS[key]) if key in _ENUMS else sorted(values)

    counts = {row: dict.fromkeys(axis(cols), 0) for row in axis(rows)}
    for paper in everything:
        for row in _values(paper, rows):
            for col in _values(paper, cols):
                counts[row][col] += 1
    return counts


def distance(a: Paper, b: Paper) -> float:
    """Single-valued facets that differ, kind among them, plus one minus the Jaccard index of each multi-valued one."""
    single = sum(_values(a, key) != _values(b, key) for key in ("kind", *SINGLE, *FLAGS))
    pairs = [(set(_values(a, key)), set(_values(b, key))) for key in MULTIPLE]
    return single + sum(1 - len(x & y) / len(x | y) for x, y in pairs)


def neighbours(slug: str, n: int = 5) -> Papers:
    """The ``n`` papers that do most alike by :func:`distance`, nearest first; equals stand in the catalogue's order."""
    if n < 0:
        raise ValueError(f"n={n} must not be negative")
    me = get(slug)
    others = [paper for paper in _catalogue().values() if paper is not me]
    return Papers(sorted(others, key=lambda paper: distance(me, paper))[:n])


def validate(rows: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Everything that is wrong with the catalogue, one line each; empty when nothing is.

    Args:
        rows: tables as TOML gives them; default those of the file.
    """
    from graphlib import CycleError, TopologicalSorter

    problems: list[str] = []
    if rows is None:
        rows = tomllib.loads(FILE.read_text(encoding="utf-8"))
    read: dict[str, Paper] = {}
    for slug, row in rows.items():
        try:
            read[slug] = _read_paper(slug, row)
        except ValueError as error:
            problems.append(str(error))
    for key in ("title", "arxiv"):
        first: dict[str, str] = {}
        for slug, paper in read.items():
            if (value := getattr(paper, key)) is not None and first.setdefault(value, slug) != slug:
                problems.append(f"{slug}: {key}={value!r} is also that of {first[value]}")
    for slug, paper in read.items():
        for other in paper.depends_on:
            if other not in rows:
                problems.append(f"{slug}: depends_on={other!r} is not here; nearest: {nearest(other, rows, 4)}")
    try:
        TopologicalSorter({slug: paper.depends_on for slug, paper in read.items()}).prepare()
    except CycleError as error:
        problems.append(f"depends_on goes in a circle: {' <- '.join(error.args[1])}")
    return problems
