"""A small convolutional network that reads digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import resnet
from regard.train.classify import Classify
from regard.train.loop import Recipe
from regard.train.recipes import Trainable
from regard.worlds.digits import digits


@dataclass(frozen=True)
class DigitsCNN(Trainable):
    """A ResNet of four blocks that classifies handwritten digits.

    Data: 4,000 MNIST digits of 28 x 28 pixels, moved by up to two pixels in training; measured on 1,000 others. Limits:
    small, and trained on little: it is there to be looked into, not to read digits.
    """

    width: int = 12
    reach: int = 2
    seed: int = 0
    recipe: Recipe = Recipe(epochs=12, batch_size=64, lr=3e-3, ema=0.99)  # noqa: RUF009 (frozen)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return resnet(1, 10, self.width)

    def task(self) -> Classify:
        return Classify(digits("train"), digits("test"), self.recipe, self.seed, reach=self.reach)


RECIPE = DigitsCNN
