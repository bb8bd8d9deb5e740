"""Windows, grids, halos and neighbourhoods of channel-last maps (b, *grid, c) with one, two or more grid axes.

Windows come batch-major, (b * windows, tokens, c): window ``w`` of sample ``i`` is row ``i * windows + w``, and a mask
of one sample, (windows, ...), serves a batch as ``mask.repeat(b, ...)``. A map whose sides do not divide is padded by
:func:`pad_to_multiple`, whose mask goes through the same functions, ``partition(valid[None, ..., None], size)``: a
padded token is a masked key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

Size = int | Sequence[int]


def per_axis(value: Size, axes: int, name: str, least: int = 1) -> tuple[int, ...]:
    """``value`` as one integer per grid axis; ValueError when there are too few, too many or too small ones."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or min(values, default=0) < least:
        raise ValueError(f"{name}={value} must be an integer >= {least}, or one for each of the {axes} grid axes")
    return values


def _interleave(first: Iterable[int], second: Iterable[int]) -> list[int]:
    return list(chain.from_iterable(zip(first, second)))


def _counts(grid: Sequence[int], size: Size, name: str = "size") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Windows per axis and tokens per axis of a window."""
    if not grid:
        raise ValueError("a map must be (b, *grid, c) with at least one grid axis")
    sizes = per_axis(size, len(grid), name)
    if any(side % s for side, s in zip(grid, sizes)):
        raise ValueError(f"{name}={size} must divide the grid {tuple(grid)}; pad_to_multiple makes it so")
    return tuple(side // s for side, s in zip(grid, sizes)), sizes


def _batch(windows: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> int:
    if windows.shape[0] % prod(counts) or windows.shape[1] != prod(sizes):
        raise ValueError(
            f"windows {tuple(windows.shape)} must be (b * {prod(counts)}, {prod(sizes)}, c) for size={tuple(sizes)}"
        )
    return windows.shape[0] // prod(counts)


def partition(x: Shaped[Tensor, "b *grid c"], size: Size) -> Shaped[Tensor, "w p c"]:
    """Windows of ``size`` neighbouring tokens: (b, H, W, c) -> (b * windows, prod(size), c)."""
    b, *grid, c = x.shape
    counts, sizes = _counts(grid, size)
    n = len(grid)
    tiles = x.reshape(b, *_interleave(counts, sizes), c)
    tiles = tiles.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return tiles.reshape(b * prod(counts), prod(sizes), c)


def unpartition(windows: Shaped[Tensor, "w p c"], size: Size, grid: Sequence[int]) -> Shaped[Tensor, "b *grid c"]:
    """The inverse of :func:`partition` for a map of ``grid``."""
    counts, sizes = _counts(grid, size)
    b, n = _batch(windows, counts, sizes), len(grid)
    tiles = windows.reshape(b, *counts, *sizes, windows.shape[-1])
    order = _interleave(range(1, n + 1), range(n + 1, 2 * n + 1))
    return tiles.permute(0, *order, 2 * n + 1).reshape(b, *grid, windows.shape[-1])


def grid_partition(x: Shaped[Tensor, "b *grid c"], size: Size) -> Shaped[Tensor, "w p c"]:
    """Windows of ``size`` tokens spread over the whole map, at a stride of ``grid / size`` (the grid of MaxViT)."""
    b, *grid, c = x.shape
    counts, sizes = _counts(grid, size)
    n = len(grid)
    tiles = x.reshape(b, *_interleave(sizes, counts), c)
    tiles = tiles.permute(0, *range(2, 2 * n + 1, 2), *range(1, 2 * n, 2), 2 * n + 1)
    return tiles.reshape(b * prod(counts), prod(sizes), c)


def grid_unpartition(windows: Shaped[Tensor, "w p c"], size: Size, grid: Sequence[int]) -> Shaped[Tensor, "b *grid c"]:
    """The inverse of :func:`grid_partition` for a map of ``grid``."""
    counts, sizes = _counts(grid, size)
    b, n = _batch(windows, counts, sizes), len(grid)
    tiles = windows.reshape(b, *counts, *sizes, windows.shape[-1])
    order = _interleave(range(n + 1, 2 * n + 1), range(1, n + 1))
    return tiles.permute(0, *order, 2 * n + 1).reshape(b, *grid, windows.shape[-1])


def shift(x: Shaped[Tensor, "b *grid c"], amount: Size) -> Shaped[Tensor, "b *grid c"]:
    """The map rolled so that token ``amount`` comes first on every axis."""
    amounts = per_axis(amount, x.ndim - 2, "amount", least=0)
    return x.roll([-a for a in amounts], list(range(1, x.ndim - 1)))


def unshift(x: Shaped[Tensor, "b *grid c"], amount: Size) -> Shaped[Tensor, "b *grid c"]:
    """The inverse of :func:`shift`."""
    return x.roll(per_axis(amount, x.ndim - 2, "amount", least=0), list(range(1, x.ndim - 1)))


def shift_mask(
    grid: Sequence[int], size: Size, amount: Size, device: torch.device | str | None = None
) -> Bool[Tensor, "w p p"]:
    """Pairs of a shifted map's windows that are neighbours in the map itself, not brought together by the roll."""
    _, sizes = _counts(grid, size)
    amounts = per_axis(amount, len(grid), "amount", least=0)
    if any(a >= s for a, s in zip(amounts, sizes)):
        raise ValueError(f"amount={amount} must be smaller than size={size} on every axis")
    wrapped = [torch.arange(side, device=device) >= side - a for side, a in zip(grid, amounts)]
    regions = partition(torch.stack(torch.meshgrid(*wrapped, indexing="ij"), -1)[None], size)
    return (regions[:, :, None] == regions[:, None]).all(-1)


def halo(
    x: Shaped[Tensor, "b *grid c"], block_size: Size, halo_size: Size
) -> tuple[Shaped[Tensor, "w p c"], Bool[Tensor, "n p"]]:
    """Blocks with a border: the keys for the queries of ``partition(x, block_size)``, and which of them are in the map.

    Returns:
        keys (b * blocks, prod(block_size + 2 * halo_size), c), zero outside of the map, and the mask (blocks, same).
    """
    b, *grid, c = x.shape
    counts, blocks = _counts(grid, block_size, "block_size")
    halos = per_axis(halo_size, len(grid), "halo_size", least=0)
    border = [side for h in reversed(halos) for side in (h, h)]
    keys = F.pad(x, [0, 0, *border])
    valid = F.pad(torch.ones(grid, dtype=torch.bool, device=x.device), border)
    for axis, (block, h) in enumerate(zip(blocks, halos)):
        keys = keys.unfold(axis + 1, block + 2 * h, block)
        valid = valid.unfold(axis, block + 2 * h, block)
    n, tokens = len(grid), prod(s + 2 * h for s, h in zip(blocks, halos))
    keys = keys.permute(*range(n + 1), *range(n + 2, 2 * n + 2), n + 1)
    return keys.reshape(b * prod(counts), tokens, c), valid.reshape(prod(counts), tokens)


def neighborhood_index(
    length: int, kernel_size: int, dilation: int = 1, device: torch.device | str | None = None
) -> Int[Tensor, "l k"]:
    """The ``kernel_size`` neighbours of every position of an axis, in steps of ``dilation``.

    The window is centred on its query and shifted inward at the borders, within the query's residue class modulo
    ``dilation``, so that every query has exactly ``kernel_size`` neighbours. An even kernel looks one further back.

    Raises:
        ValueError: a residue class shorter than the kernel (``kernel_size * dilation > length``).
    """
    if kernel_size < 1 or dilation < 1 or kernel_size * dilation > length:
        raise ValueError(
            f"kernel_size={kernel_size} times dilation={dilation} must be positive and within length={length}"
        )
    position = torch.arange(length, device=device)
    residue, step = position % dilation, position // dilation
    last = (length - 1 - residue) // dilation + 1 - kernel_size
    start = (step - kernel_size // 2).clamp(min=0).minimum(last)
    return (start[:, None] + torch.arange(kernel_size, device=device)) * dilation + residue[:, None]


def _combine(tables: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Per-axis tables (l_i, k_i) as one, (prod(l), prod(k)), of row-major indices."""
    combined = tables[0] * strides[0]
    for table, stride in zip(tables[1:], strides[1:]):
        combined = (combined[:, None, :, None] + table[None, :, None, :] * stride).flatten(2).flatten(0, 1)
    return combined


def _strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def neighborhood_grid_index(
    grid: Sequence[int], kernel_size: Size, dilation: Size = 1, device: torch.device | str | None = None
) -> Int[Tensor, "n k"]:
    """:func:`neighborhood_index` of a map: flat indices of every token's prod(kernel_size) neighbours, row by row."""
    kernels, dilations = per_axis(kernel_size, len(grid), "kernel_size"), per_axis(dilation, len(grid), "dilation")
    tables = [neighborhood_index(*axis, device=device) for axis in zip(grid, kernels, dilations)]
    return _combine(tables, _strides(grid))


def neighborhood_relative_index(
    grid: Sequence[int], kernel_size: Size, dilation: Size = 1, device: torch.device | str | None = None
) -> Int[Tensor, "n k"]:
    """Where each neighbour's bias is in a flat table of prod(2 * kernel_size - 1) offsets, key minus query in steps."""
    kernels, dilations = per_axis(kernel_size, len(grid), "kernel_size"), per_axis(dilation, len(grid), "dilation")
    tables = []
    for length, kernel, step in zip(grid, kernels, dilations):
        offset = neighborhood_index(length, kernel, step, device) - torch.arange(length, device=device)[:, None]
        tables.append(offset // step + kernel - 1)
    return _combine(tables, _strides([2 * k - 1 for k in kernels]))


def relative_index(size: Sequence[int], device: torch.device | str | None = None) -> Int[Tensor, "n n"]:
    """Where the bias of (query, key) of a window is in a flat table of prod(2 * size - 1) offsets, query minus key."""
    sizes = per_axis(size, len(size), "size")
    tables = []
    for side in sizes:
        position = torch.arange(side, device=device)
        tables.append(position[:, None] - position + side - 1)
    return _combine(tables, _strides([2 * side - 1 for side in sizes]))


def pad_to_multiple(
    x: Shaped[Tensor, "b *grid c"], size: Size
) -> tuple[Shaped[Tensor, "b *padded c"], Bool[Tensor, "*padded"] | None, tuple[int, ...]]:
    """Zeros after the end of every axis until ``size`` divides it.

    Returns:
        the padded map; the mask (*padded grid), True on real tokens, or None when nothing was padded; the grid
        before, for :func:`crop`. A padded token must be masked as a key and left out of means.
    """
    grid = tuple(x.shape[1:-1])
    missing = [-side % s for side, s in zip(grid, per_axis(size, len(grid), "size"))]
    if not any(missing):
        return x, None, grid
    after = [side for m in reversed(missing) for side in (0, m)]
    valid = torch.ones(grid, dtype=torch.bool, device=x.device)
    return F.pad(x, [0, 0, *after]), F.pad(valid, after), grid


def crop(x: Shaped[Tensor, "b *padded c"], grid: Sequence[int]) -> Shaped[Tensor, "b *grid c"]:
    """The first ``grid`` tokens: the inverse of :func:`pad_to_multiple`."""
    if len(grid) != x.ndim - 2 or any(side > padded for side, padded in zip(grid, x.shape[1:-1])):
        raise ValueError(f"grid={tuple(grid)} does not lie in a map of {tuple(x.shape[1:-1])}")
    return x[(slice(None), *(slice(side) for side in grid))]
