"""Colours of points in a solid's own coordinates: the same from every view, and carried along when the solid moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Texture = Callable[[Float[Tensor, "n 3"]], Float[Tensor, "n 3"]]


@dataclass(frozen=True, eq=False)
class Plain:
    """One colour."""

    colour: Float[Tensor, "3"]

    def __call__(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        return self.colour.expand(len(x), 3)


@dataclass(frozen=True, eq=False)
class Checker:
    """Two colours in cubes of ``side`` metres; ``phase`` keeps the cubes' faces off the solid's own."""

    colour: Float[Tensor, "3"]
    other: Float[Tensor, "3"]
    side: float
    phase: Float[Tensor, "3"]

    def __call__(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        odd = ((x + self.phase) / self.side).floor().sum(-1, keepdim=True) % 2
        return torch.where(odd == 1, self.other, self.colour)


@dataclass(frozen=True, eq=False)
class Noise:
    """Two colours mixed by random plane waves: 1/2 + 1/2 sin(3 mean_k cos(w_k . x + p_k)), smooth in every direction."""

    colour: Float[Tensor, "3"]
    other: Float[Tensor, "3"]
    waves: Float[Tensor, "3 k"]
    phases: Float[Tensor, "k"]

    def __call__(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        mix = 0.5 + 0.5 * (3 * (x @ self.waves + self.phases).cos().mean(-1, keepdim=True)).sin()
        return self.colour + mix * (self.other - self.colour)
