"""Tokens as maps, for the layers that have to know where a token stands."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.windows import Size, pad_to_multiple


def to_map(
    x: Float[Tensor, "b n c"], grid: tuple[int, ...] | None, mask: Tensor | None, dim: int
) -> tuple[Float[Tensor, "b H W c"], Bool[Tensor, "b H W"] | None]:
    """The tokens as a channel-last map, and which of them may be looked at (None: all).

    Raises:
        ValueError: x is not (b, n, dim), grid is not (H, W) with H * W = n, mask is not boolean (b, n).
    """
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be (b, n, {dim}); got {tuple(x.shape)}")
    if grid is None or len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f"grid={grid} must be (H, W) with H * W = n = {x.shape[1]}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(f"mask must be boolean {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
    return x.unflatten(1, grid), None if mask is None else mask.unflatten(1, grid)


def pad_map(
    x: Float[Tensor, "b H W c"], valid: Bool[Tensor, "b H W"] | None, size: Size
) -> tuple[Float[Tensor, "b Y X c"], Bool[Tensor, "b Y X"] | None]:
    """The map with zeros after the end of its sides until ``size`` divides them; what was added is not valid."""
    padded, inside, _ = pad_to_multiple(x, size)
    if inside is None:
        return x, valid
    if valid is None:
        return padded, inside.expand(padded.shape[:-1])
    return padded, pad_to_multiple(valid[..., None], size)[0][..., 0]
