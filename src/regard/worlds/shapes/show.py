"""Truths as pictures."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.shapes.scene import COLOURS


def paint(index: Int[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """A map of numbers in colours: 0 black, then the eight colours over and over."""
    palette = torch.tensor(list(COLOURS.values()))
    rgb = palette[(index - 1).clamp(min=0) % len(palette)] * (index > 0)[..., None]
    return rgb.permute(2, 0, 1)


def mark(image: Float[Tensor, "3 h w"], x: float, y: float, colour: str = "red") -> Float[Tensor, "3 h w"]:
    """A copy with a small cross at (x, y)."""
    out = image.clone()
    h, w = image.shape[1:]
    column, row = min(max(int(x), 0), w - 1), min(max(int(y), 0), h - 1)
    rgb = torch.tensor(COLOURS[colour])[:, None]
    out[:, row, max(0, column - 2) : column + 3] = rgb
    out[:, max(0, row - 2) : row + 3, column] = rgb
    return out
