"""Masks as functions of four indices, their composition, and the forms that backends eat.

A mask is a function ``mask(b, h, q, kv)`` from integer tensors that broadcast against each other to a boolean tensor,
True where query ``q`` may look at key ``kv`` (the signature of flex attention). Nothing here holds a matrix until
:func:`dense` is asked for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_, or_
from typing import no_type_check

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Device = torch.device | str | None


def both(*masks: Mask) -> Mask:
    """True where every one of ``masks`` is."""
    if not masks:
        raise ValueError("both() needs at least one mask; got none")
    return lambda b, h, q, kv: reduce(and_, [m(b, h, q, kv) for m in masks])


def either(*masks: Mask) -> Mask:
    """True where at least one of ``masks`` is."""
    if not masks:
        raise ValueError("either() needs at least one mask; got none")
    return lambda b, h, q, kv: reduce(or_, [m(b, h, q, kv) for m in masks])


def inverse(mask: Mask) -> Mask:
    """True where ``mask`` is not."""
    return lambda b, h, q, kv: ~mask(b, h, q, kv)


def causal(offset: int = 0) -> Mask:
    """No later key; query i stands at key i + ``offset`` (s - l when the last query stands at the last key)."""
    return lambda b, h, q, kv: kv <= q + offset


def window(left: int | Int[Tensor, "h"], right: int | Int[Tensor, "h"]) -> Mask:
    """``left`` keys before the query, itself, ``right`` keys after it; an (h,) tensor gives each head its own reach."""
    for name, reach in (("left", left), ("right", right)):
        if (reach.min() if isinstance(reach, Tensor) else reach) < 0:
            raise ValueError(f"{name}={reach} must not be negative")

    def of_head(reach: int | Tensor) -> Callable[[Tensor], int | Tensor]:
        return (lambda h: reach[h]) if isinstance(reach, Tensor) else (lambda h: reach)

    before, after = of_head(left), of_head(right)
    return lambda b, h, q, kv: (kv >= q - before(h)) & (kv <= q + after(h))


def dilated(window: int, step: int) -> Mask:
    """Every ``step``-th key: the query itself and ``window`` keys on either side."""
    _positive("step", step)
    if window < 0:
        raise ValueError(f"window={window} must not be negative")
    return lambda b, h, q, kv: ((kv - q) % step == 0) & ((kv - q).abs() <= window * step)


def blocks(size: int) -> Mask:
    """Keys of the query's own block of ``size`` tokens."""
    _positive("size", size)
    return lambda b, h, q, kv: q // size == kv // size


def prefix(n: int) -> Mask:
    """The first ``n`` keys, seen by everyone; ``either(prefix(n), causal())`` is a prefix language model."""
    return lambda b, h, q, kv: kv < n


def documents(ids: Int[Tensor, "s"] | Int[Tensor, "b s"]) -> Mask:
    """Keys of the query's own document; ``ids`` numbers the document of each token."""
    if ids.ndim == 1:
        return lambda b, h, q, kv: ids[q] == ids[kv]
    return lambda b, h, q, kv: ids[b, q] == ids[b, kv]


def key_padding(lengths: Int[Tensor, "b"]) -> Mask:
    """The first ``lengths[b]`` keys of sequence b."""
    return lambda b, h, q, kv: kv < lengths[b]


def neighborhood(grid: Sequence[int], kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1) -> Mask:
    r"""The ``kernel_size`` nearest tokens along every axis of a grid; at a border the window shifts inward.

    Along an axis with dilation D the tokens fall into D classes, i mod D. Query i sees the keys j of its own class that
    lie in the window (n tokens being in the class)

    .. math:: a \le j // D < a + k, \qquad a = \mathrm{clamp}(i // D - k // 2,\; 0,\; n - k)

    so that every query sees exactly k keys per axis.

    Args:
        grid: tokens per axis, row-major.
        kernel_size: k, keys per axis.
        dilation: D, distance between neighbouring keys per axis.

    Raises:
        ValueError: a kernel or dilation below 1, or a dilated kernel longer than its axis.
    """
    kernels, dilations = _per_axis("kernel_size", kernel_size, grid), _per_axis("dilation", dilation, grid)

    def along(axis: int, k: int, step: int) -> Mask:
        length, stride = grid[axis], math.prod(grid[axis + 1 :])
        if k * step > length:
            raise ValueError(f"kernel_size={k} with dilation={step} does not fit an axis of {length} tokens")

        @no_type_check  # Flex attention traces it.
        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            i, j = q // stride % length, kv // stride % length
            members = (length - i % step + step - 1) // step
            start = torch.minimum((i // step - k // 2).clamp(min=0), members - k)
            return (i % step == j % step) & (j // step >= start) & (j // step < start + k)

        return mask

    return both(*(along(axis, k, step) for axis, (k, step) in enumerate(zip(kernels, dilations))))


def grid_window(grid: Sequence[int], size: int | Sequence[int], shift: int | Sequence[int] = 0) -> Mask:
    """Keys of the query's own window of a grid cut into windows of ``size``, the cut moved by ``shift`` tokens.

    The same pairs as rolling the grid back by ``shift``, cutting it, and keeping what was wrapped around apart. Windows
    at the border may be smaller.
    """
    sizes = _per_axis("size", size, grid)
    shifts = (shift,) * len(grid) if isinstance(shift, int) else tuple(shift)
    if len(shifts) != len(grid) or any(not 0 <= t < n for t, n in zip(shifts, sizes)):
        raise ValueError(f"shift={shift} must be at least 0 and below size={sizes} on each axis")

    def along(axis: int, n: int, t: int) -> Mask:
        length, stride = grid[axis], math.prod(grid[axis + 1 :])
        return lambda b, h, q, kv: (q // stride % length + n - t) // n == (kv // stride % length + n - t) // n

    return both(*(along(axis, n, t) for axis, (n, t) in enumerate(zip(sizes, shifts))))


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _per_axis(name: str, value: int | Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    values = (value,) * len(grid) if isinstance(value, int) else tuple(value)
    if len(values) != len(grid):
        raise ValueError(f"{name}={value} must be one number or one per axis of grid={tuple(grid)}")
    for one in values:
        _positive(name, one)
    return values


def evaluate(mask: Mask, b: int, h: int, rows: range, s: int, device: Device) -> Tensor:
    """``mask`` on some query rows; axes on which it does not depend are 1."""
    return mask(
        torch.arange(b, device=device).view(b, 1, 1, 1),
        torch.arange(h, device=device).view(h, 1, 1),
        torch.arange(rows.start, rows.stop, device=device).view(-1, 1),
        torch.arange(s, device=device),
    )


def dense(mask: Mask, b: int, h: int, l: int, s: int, device: Device = None) -> Bool[Tensor, "b h l s"]:
    """The mask as a matrix; axes on which it does not depend are broadcast and take no memory."""
    return evaluate(mask, b, h, range(l), s, device).expand(b, h, l, s)


def block_mask(mask: Mask, b: int, h: int, l: int, s: int, device: Device = "cpu", block_size: int = 128) -> BlockMask:
    """The mask for flex attention; ``b`` or ``h`` of 1 is shared by all sequences or heads."""
    # Flex attention reads the signature of what it is given, which decorated or callable objects may hide.
    plain = lambda b, h, q, kv: mask(b, h, q, kv)  # noqa: E731
    return create_block_mask(plain, b, h, l, s, device=device or "cpu", BLOCK_SIZE=block_size)


def count(mask: Mask, b: int, h: int, l: int, s: int, *, device: Device = None, rows: int = 64) -> int:
    """Allowed pairs among the b * h * l * s; never holds more than ``rows`` rows of the matrix."""
    total = 0
    for start in range(0, l, rows):
        part = evaluate(mask, b, h, range(start, min(start + rows, l)), s, device)
        pairs = b * h * (min(start + rows, l) - start) * s
        total += int(part.sum()) * (pairs // max(part.numel(), 1))
    return total
