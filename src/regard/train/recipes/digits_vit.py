"""A vision transformer that reads digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import vit
from regard.train.classify import Classify
from regard.train.loop import Recipe
from regard.train.recipes import Trainable
from regard.worlds.digits import digits


@dataclass(frozen=True)
class DigitsViT(Trainable):
    """A ViT with a class token and register tokens that classifies handwritten digits.

    Data: 4,000 MNIST digits of 28 x 28 pixels, moved by up to two pixels in training; measured on 1,000 others. Limits:
    small, and trained on little: it is there to be looked into, not to read digits.
    """

    dim: int = 96
    num_heads: int = 4
    depth: int = 4
    patch: int = 4
    registers: int = 4
    reach: int = 2
    seed: int = 0
    recipe: Recipe = Recipe(epochs=30, batch_size=64, lr=1.5e-3, ema=0.99)  # noqa: RUF009 (frozen)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return vit(28, self.patch, 1, 10, self.dim, self.num_heads, self.depth, self.registers)

    def task(self) -> Classify:
        return Classify(digits("train"), digits("test"), self.recipe, self.seed, reach=self.reach)


RECIPE = DigitsViT
