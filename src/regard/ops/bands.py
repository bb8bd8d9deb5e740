"""Attention under masks that let neighbouring queries see neighbouring keys: the work inside row bands, no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.ops.attend import Backend, attend
from regard.ops.masks import Device, Mask, evaluate


class Band(NamedTuple):
    """Consecutive queries, the keys that any of them sees, and which of these pairs are allowed (None: all)."""

    rows: slice
    keys: slice | Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Bands:
    """A mask on l queries and s keys, cut into row bands that together cover every query."""

    l: int
    s: int
    parts: tuple[Band, ...]

    @property
    def pairs(self) -> int:
        """Entries of the matrix that are computed per head."""
        return sum((p.rows.stop - p.rows.start) * _length(p.keys) for p in self.parts)


def _length(keys: slice | Tensor) -> int:
    return keys.numel() if isinstance(keys, Tensor) else keys.stop - keys.start


def bands(mask: Mask, l: int, s: int, rows: int = 64, *, b: int = 1, h: int = 1, device: Device = None) -> Bands:
    """Plan the work of a mask whose neighbouring queries see neighbouring keys, ``rows`` queries at a time.

    The keys of a band are a slice when they fill at least three quarters of their range, else an index. A mask that
    differs between sequences or heads needs ``b`` or ``h``; the keys of a band are then those that any of them sees.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    parts = []
    for start in range(0, l, rows):
        stop = min(start + rows, l)
        allowed = evaluate(mask, b, h, range(start, stop), s, device)
        allowed = allowed.expand(*allowed.shape[:-2], stop - start, s)
        seen = allowed.reshape(-1, s).any(0).nonzero()[:, 0]
        keys: slice | Tensor = seen
        if not len(seen):
            keys = slice(0, 0)
        elif 4 * len(seen) >= 3 * (int(seen[-1]) + 1 - int(seen[0])):
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
        inner = allowed[..., keys].clone()
        parts.append(Band(slice(start, stop), keys, None if inner.all() else inner))
    return Bands(l, s, tuple(parts))


class _Take(torch.autograd.Function):
    """Several, possibly overlapping, pieces of the token axis; their gradients are added into one buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, *keys: slice | Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def,override]
        ctx.keys, ctx.shape = keys, x.shape
        return tuple(x[:, :, key] for key in keys)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def,override]
        total = grads[0].new_zeros(ctx.shape)
        for key, grad in zip(ctx.keys, grads):
            if isinstance(key, Tensor):
                total.index_add_(2, key, grad)
            else:
                total[:, :, key] += grad
        return total, *(None for _ in ctx.keys)


def attend_banded(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    plan: Bands,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "sdpa",
) -> Float[Tensor, "b h l e"]:
    """:func:`attend` under the mask of ``plan``, computing the pairs of its bands and no others.

    Raises:
        ValueError: a plan made for another number of queries or keys.
    """
    if (plan.l, plan.s) != (q.shape[2], k.shape[2]):
        raise ValueError(f"plan is for l={plan.l}, s={plan.s}; got q, k with l={q.shape[2]}, s={k.shape[2]}")
    if not plan.parts:
        return attend(q, k, v, scale=scale)
    queries = q.split([p.rows.stop - p.rows.start for p in plan.parts], 2)
    keys = [p.keys for p in plan.parts]
    pieces = zip(queries, _Take.apply(k, *keys), _Take.apply(v, *keys), plan.parts)
    return torch.cat(
        [attend(x, y, z, mask=p.mask, scale=scale, dropout=dropout, backend=backend) for x, y, z, p in pieces], 2
    )
