"""The matrix of attention a few query rows at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.ops.attend import merge_masks, scores

T = TypeVar("T")


def single(x: Tensor) -> Tensor:
    """``x`` in single precision or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cut(x: Tensor | None, chunk: int, parts: int) -> list[Tensor | None]:
    """A mask or bias that broadcasts to (b, h, l, s), cut along l; one without that axis serves every part."""
    if x is None or x.ndim < 2 or x.shape[-2] == 1:
        return [x] * parts
    return list(x.split(chunk, -2))


def by_rows(
    function: Callable[[Tensor, Tensor | None, slice], T],
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    chunk: int = 256,
) -> Iterator[T]:
    """``function(scores, mask, rows)`` for ``chunk`` query rows at a time.

    ``scores`` are (b, h, rows, s) in single precision or better; ``mask`` includes the causal one. The backward pass
    computes a chunk again, so that no more than one is ever held.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    l, s = q.shape[2], k.shape[2]
    if causal and l > s:
        raise ValueError(f"causal=True needs at least as many keys as queries; got l={l}, s={s}")
    keys = single(k)

    def part(x: Tensor, allowed: Tensor | None, added: Tensor | None, start: int) -> T:
        rows = slice(start, start + x.shape[2])
        if causal:
            here = torch.arange(rows.start, rows.stop, device=x.device)[:, None] + s - l
            allowed = merge_masks(allowed, torch.arange(s, device=x.device) <= here)
        return function(scores(single(x), keys, scale=scale, bias=added), allowed, rows)

    parts = range(0, max(l, 1), chunk)
    for start, x, m, a in zip(parts, q.split(chunk, 2), cut(mask, chunk, len(parts)), cut(bias, chunk, len(parts))):
        if torch.is_grad_enabled():
            yield checkpoint(part, x, m, a, start, use_reentrant=False, preserve_rng_state=False)
        else:
            yield part(x, m, a, start)
