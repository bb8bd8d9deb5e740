"""What is known of a model's sites: learned from a probe or from any watched forward, and what the user says of tokens."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from regard.core.tokens import Tokens

Seam = Literal["function", "interface", "own"]
KINDS = ("self", "cross", "joint", "pool", "channel")


@dataclass
class Known:
    """One site of one model: how it is met, and what its token axes mean."""

    seam: Seam
    kind: str = "self"
    reason: str | None = None
    qk: frozenset[int] = frozenset()
    """Which matrix products of a hand-written site are q k^T, counted from the start of its forward."""
    tokens_q: Tokens | None = None
    tokens_k: Tokens | None = None


@dataclass
class Knowledge:
    sites: dict[str, Known] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    said: list[tuple[str, Tokens | None, Tokens | None]] = field(default_factory=list)

    def tokens(self, name: str, kind: str, l: int, s: int) -> tuple[Tokens | None, Tokens | None]:
        """What the user said of this site's tokens, where the sizes fit."""
        q = k = None
        for where, said_q, said_k in self.said:
            if matches(name, kind, where):
                q = said_q if said_q is not None and said_q.size == l else q
                k = said_k if said_k is not None and said_k.size == s else k
        return q, k


_KNOWLEDGE: WeakKeyDictionary[nn.Module, Knowledge] = WeakKeyDictionary()


def knowledge(model: nn.Module) -> Knowledge:
    return _KNOWLEDGE.setdefault(model, Knowledge())


def matches(name: str, kind: str, where: str | Sequence[str]) -> bool:
    patterns = [where] if isinstance(where, str) else where
    return any(p == kind or p == "*" or fnmatchcase(name, p) for p in patterns)


def names(model: nn.Module, where: str | Sequence[str]) -> list[str]:
    """Known sites, or all candidate modules before the first probe, that ``where`` names; ValueError with the nearest."""
    known = knowledge(model).sites
    if known:
        found = [n for n, site in known.items() if matches(n, site.kind, where)]
        choices = list(known)
    else:
        choices = [n for n, _ in model.named_modules() if n]
        kinds = {where} if isinstance(where, str) else set(where)
        everything = bool(kinds & {*KINDS, "*"})
        found = ["", *choices] if everything else [n for n in choices if matches(n, "", where)]
    if not found:
        shown = where if isinstance(where, str) else ", ".join(where)
        near = difflib.get_close_matches(shown, choices, n=4, cutoff=0.3) or choices[:8]
        kinds_here = sorted({s.kind for s in known.values()})
        extra = f"; kinds here: {', '.join(kinds_here)}" if kinds_here else ""
        for name, reason in knowledge(model).refused.items():
            if matches(name, "", where):
                raise ValueError(f"where={shown!r}: {name} is opaque: {reason}")
        raise ValueError(
            f"where={shown!r} names no attention site of {type(model).__name__}; nearest: {', '.join(near)}{extra}"
        )
    return found


def describe(model: nn.Module, where: str, q: Tokens | None, k: Tokens | None) -> None:
    knowledge(model).said.append((where, q, k))
