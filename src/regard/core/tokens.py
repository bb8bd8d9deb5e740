"""What the positions of a token axis mean: named segments, their grids, and names for parts of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

Rows = int | slice | Sequence[int] | Tensor | str


@dataclass(frozen=True)
class Segment:
    """``role`` over ``prod(shape)`` tokens; a shape of two or three numbers is a grid (H, W) or (T, H, W)."""

    role: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


_SEGMENT = re.compile(r"^\s*([A-Za-z_][\w-]*)\s*(?:\[([\d\s,]+)\])?\s*$")
_SLICE = re.compile(r"^\s*([A-Za-z_][\w-]*)\s*(?:\[(-?\d*)(:)?(-?\d*)\])?\s*$")


@dataclass(frozen=True)
class Tokens:
    """The segments of one token axis in order, written ``"cls + register[4] + image[14,14]"``.

    Raises ValueError for a description that cannot be read or a role used twice.
    """

    segments: tuple[Segment, ...]

    @staticmethod
    def parse(text: str) -> Tokens:
        segments = []
        for part in text.split("+"):
            found = _SEGMENT.match(part)
            if not found:
                raise ValueError(
                    f"tokens={text!r}: {part.strip()!r} is not a segment such as cls, text[77] or image[14,14]"
                )
            shape = tuple(int(n) for n in found[2].split(",")) if found[2] else (1,)
            segments.append(Segment(found[1], shape))
        roles = [s.role for s in segments]
        if len(set(roles)) < len(roles):
            raise ValueError(f"tokens={text!r} names a role twice")
        return Tokens(tuple(segments))

    @property
    def size(self) -> int:
        return sum(s.size for s in self.segments)

    def span(self, role: str) -> slice:
        """Where ``role`` stands on the axis."""
        start = 0
        for s in self.segments:
            if s.role == role:
                return slice(start, start + s.size)
            start += s.size
        raise ValueError(self._unknown(role))

    def grid(self, role: str) -> tuple[int, ...]:
        for s in self.segments:
            if s.role == role:
                return s.shape
        raise ValueError(self._unknown(role))

    def _unknown(self, role: str) -> str:
        roles = [s.role for s in self.segments]
        near = difflib.get_close_matches(role, roles, n=1)
        return f"role={role!r} is not in {self}" + (f"; did you mean {near[0]!r}?" if near else "")

    def index(self, rows: Rows, device: torch.device | str | None = None) -> Tensor:
        """Positions as a 1-D index: a number, a slice, a list, a boolean or index tensor, or names: ``"text[3:5] + cls"``."""
        everything = torch.arange(self.size, device=device)
        if isinstance(rows, str):
            return torch.cat([everything[self._named(part)] for part in rows.split("+")])
        return pick(everything, rows)

    def _named(self, part: str) -> slice | list[int]:
        found = _SLICE.match(part)
        if not found:
            raise ValueError(f"tokens {part.strip()!r} is not a name such as cls, text[3] or text[3:5]")
        role, low, colon, high = found.groups()
        span = self.span(role)
        inside = list(range(span.start, span.stop))
        if low is None:
            return span
        if colon:
            chosen = inside[slice(int(low) if low else None, int(high) if high else None)]
            if not chosen:
                raise ValueError(f"tokens {part.strip()!r} are none: {role} has {len(inside)} tokens")
            return chosen
        if low == "" or not -len(inside) <= int(low) < len(inside):
            raise ValueError(f"tokens {part.strip()!r}: {role} has {len(inside)} tokens")
        return [inside[int(low)]]

    def split(self, x: Tensor, dim: int = 1) -> dict[str, Tensor]:
        """One tensor a role."""
        return {s.role: x.narrow(dim, self.span(s.role).start, s.size) for s in self.segments}

    def __str__(self) -> str:
        return " + ".join(
            s.role if s.shape == (1,) else f"{s.role}[{','.join(map(str, s.shape))}]" for s in self.segments
        )


def pick(everything: Tensor, rows: Any) -> Tensor:
    """``everything`` at ``rows``, always 1-D; ValueError when outside."""
    if isinstance(rows, int):
        if not -len(everything) <= rows < len(everything):
            raise ValueError(f"row {rows} is outside 0..{len(everything) - 1}")
        return everything[rows : rows + 1] if rows != -1 else everything[-1:]
    if isinstance(rows, slice):
        return everything[rows]
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        if rows.shape != everything.shape:
            raise ValueError(f"a boolean selection must have {len(everything)} entries; got {tuple(rows.shape)}")
        return everything[rows.to(everything.device)]
    numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    size = len(everything)
    if any(not -size <= n < size for n in numbers):
        raise ValueError(f"rows {numbers} are outside 0..{size - 1}")
    return everything[torch.tensor([n % size for n in numbers], dtype=torch.long, device=everything.device)]


def tokens(model: Any, *, q: str | None = None, k: str | None = None, where: str = "*") -> None:
    """Say what the token axes of ``model``'s sites mean, where the host cannot tell.

    Args:
        q, k: descriptions such as ``"cls + register[4] + image[14,14]"``; ``k`` defaults to ``q``.
        where: sites meant, a name with ``*``, or a kind (``"cross"``).
    """
    from regard.core.known import describe

    describe(model, where, None if q is None else Tokens.parse(q), Tokens.parse(k or q or "") if (k or q) else None)
