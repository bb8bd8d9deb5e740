"""A vision transformer that names shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import vit
from regard.train.classify import Classify
from regard.train.loop import Recipe
from regard.train.recipes import Trainable
from regard.worlds.shapes.labelled import labelled_shapes
from regard.worlds.shapes.scene import CLASSES


@dataclass(frozen=True)
class ShapesViT(Trainable):
    """A ViT with a class token and register tokens that names the shape of the one thing in a picture.

    Data: 20,000 scenes of 48 x 48 pixels, one of 12 shapes in any of 8 colours and 4 patterns on any of 4 backgrounds,
    moved by up to four pixels in training; measured on 1,000 others. Limits: one thing, drawn by this world;
    with plain labels it learns slowly, four shapes of ten are still taken for another.
    """

    dim: int = 96
    num_heads: int = 4
    depth: int = 4
    size: int = 48
    patch: int = 8
    registers: int = 4
    count: int = 20_000
    tests: int = 1000
    reach: int = 4
    seed: int = 0
    recipe: Recipe = Recipe(epochs=20, batch_size=32, lr=1.5e-3, ema=0.99, precision="bf16-mixed")  # noqa: RUF009 (frozen)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return vit(self.size, self.patch, 3, len(CLASSES), self.dim, self.num_heads, self.depth, self.registers)

    def task(self) -> Classify:
        train = labelled_shapes("train", self.size, self.count, self.seed)
        test = labelled_shapes("test", self.size, self.tests, self.seed)
        return Classify(train, test, self.recipe, self.seed, reach=self.reach)


RECIPE = ShapesViT
