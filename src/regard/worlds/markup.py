"""Formula markup: tokens, the tree that they stand for, the one spelling of a tree, and how far two spellings differ."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

LETTERS = tuple("abcdefghijkmnpqrstuvwxyz")
DIGITS = tuple("0123456789")
GREEK = tuple(
    rf"\{name}"
    for name in ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "pi", "rho", "sigma", "phi", "omega")
)
OPERATORS = ("+", "-", "=", "<", ">", r"\times", r"\cdot", r"\leq", r"\geq", r"\neq", r"\rightarrow")
LARGE = (r"\sum", r"\prod", r"\int")
STACKED = (r"\sum", r"\prod")
SIGNS = (*LETTERS, *DIGITS, *GREEK, *OPERATORS, *LARGE, "(", ")", "[", "]", ",")
PAD, START, END = 0, 1, 2
TOKENS = ("<pad>", "<s>", "</s>", "{", "}", "_", "^", r"\frac", r"\sqrt", *SIGNS)
_IDS = {token: i for i, token in enumerate(TOKENS)}
_SYNONYMS = {r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow"}
_SILENT = {r"\left", r"\right", r"\,", r"\;", r"\:", r"\!", "\\ ", r"\quad"}


@dataclass(frozen=True)
class Sign:
    token: str


@dataclass(frozen=True)
class Fraction:
    above: Row
    below: Row


@dataclass(frozen=True)
class Root:
    body: Row


@dataclass(frozen=True)
class Group:
    """What scripts stand at when it is more than one node."""

    body: Row


@dataclass(frozen=True)
class Scripts:
    base: Node
    below: Row | None
    above: Row | None


Node = Sign | Fraction | Root | Group | Scripts
Row = tuple[Node, ...]


def split(markup: str) -> list[str]:
    """Commands and single signs, as they are written; spaces between them are dropped."""
    return re.findall(r"\\[A-Za-z]+|\\.|\S", markup, re.DOTALL)


def tokenise(markup: str) -> list[str]:
    """Tokens without what changes looks alone: spacing commands, ``\\left``, ``\\right``, and second names of a sign."""
    return [_SYNONYMS.get(token, token) for token in split(markup) if token not in _SILENT]


def compact(tokens: Sequence[str]) -> str:
    """Tokens set side by side, with a space only where a command would run into a letter."""
    pairs = zip(tokens, [*tokens[1:], ""])
    return "".join(f"{a} " if a[:1] == "\\" and a[-1:].isalpha() and b[:1].isalpha() else a for a, b in pairs)


def parse(markup: str) -> Row:
    """The tree of a formula.

    Raises:
        ValueError: a brace without its partner, two scripts of one kind, a script or command without what it needs.
    """
    tokens = tokenise(markup)
    row, end = _row(tokens, 0, markup)
    if end < len(tokens):
        raise ValueError(f"markup={markup!r} closes a brace that was not opened")
    return row


def _row(tokens: list[str], i: int, markup: str) -> tuple[Row, int]:
    nodes: list[Node] = []
    while i < len(tokens) and tokens[i] != "}":
        body, i = _argument(tokens, i, markup)
        scripts: dict[str, Row] = {}
        while i < len(tokens) and tokens[i] in ("_", "^"):
            if tokens[i] in scripts:
                raise ValueError(f"markup={markup!r} has two scripts {tokens[i]!r} at one place")
            sign = tokens[i]
            scripts[sign], i = _argument(tokens, i + 1, markup)
        if scripts:
            base = body[0] if len(body) == 1 and not isinstance(body[0], Scripts) else Group(body)
            nodes.append(Scripts(base, scripts.get("_"), scripts.get("^")))
        else:
            nodes += body
    return tuple(nodes), i


def _argument(tokens: list[str], i: int, markup: str) -> tuple[Row, int]:
    """A group in braces, a command with its arguments, or a single sign."""
    if i == len(tokens) or tokens[i] in ("_", "^", "}"):
        raise ValueError(f"markup={markup!r} lacks something at token {i}")
    if tokens[i] == "{":
        row, end = _row(tokens, i + 1, markup)
        if end == len(tokens):
            raise ValueError(f"markup={markup!r} opens a brace that is not closed")
        return row, end + 1
    if tokens[i] == r"\frac":
        above, i = _argument(tokens, i + 1, markup)
        below, i = _argument(tokens, i, markup)
        return (Fraction(above, below),), i
    if tokens[i] == r"\sqrt":
        body, i = _argument(tokens, i + 1, markup)
        return (Root(body),), i
    return (Sign(tokens[i]),), i + 1


def spell(row: Row) -> list[str]:
    """The tokens of a tree: every argument in braces, the lower script first, no other braces."""
    return [token for node in row for token in _spell(node)]


def _spell(node: Node) -> Iterator[str]:
    match node:
        case Sign(token):
            yield token
        case Fraction(above, below):
            yield from (r"\frac", "{", *spell(above), "}", "{", *spell(below), "}")
        case Root(body):
            yield from (r"\sqrt", "{", *spell(body), "}")
        case Group(body):
            yield from ("{", *spell(body), "}")
        case Scripts(base, below, above):
            yield from _spell(base)
            if below is not None:
                yield from ("_", "{", *spell(below), "}")
            if above is not None:
                yield from ("^", "{", *spell(above), "}")


def normalise(markup: str) -> str:
    """The one spelling of a formula, its tokens parted by spaces.

    Raises:
        ValueError: see :func:`parse`.
    """
    return " ".join(spell(parse(markup)))


def equivalent(a: str, b: str) -> bool:
    """Whether two markups stand for the same tree; one that cannot be parsed is equivalent to none."""
    try:
        return parse(a) == parse(b)
    except ValueError:
        return False


def encode(tokens: Iterable[str]) -> Int[Tensor, "n"]:
    """Numbers in :data:`TOKENS`, between those of the start and the end.

    Raises:
        ValueError: tokens that are not among them.
    """
    tokens = list(tokens)
    unknown = sorted(set(tokens) - set(TOKENS[3:]))
    if unknown:
        raise ValueError(f"tokens {unknown} are not in the vocabulary")
    return torch.tensor([START, *(_IDS[token] for token in tokens), END])


def decode(ids: Int[Tensor, "n"]) -> list[str]:
    """The tokens up to the end; start and padding are left out."""
    numbers = ids.tolist()
    numbers = numbers[: numbers.index(END)] if END in numbers else numbers
    return [TOKENS[i] for i in numbers if i not in (PAD, START)]


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Insertions, deletions and replacements that turn ``a`` into ``b`` (Levenshtein)."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
        last = row
    return last[-1]


def edit_score(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """One minus the edit distance over the greater length: 1 for equal sequences, 0 for nothing in common."""
    return 1.0 - edit_distance(a, b) / max(len(a), len(b), 1)
