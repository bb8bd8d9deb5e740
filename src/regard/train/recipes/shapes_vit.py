"""A vision transformer that names shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import early_vit
from regard.train.classify import ClassifyPatches
from regard.train.loop import Recipe
from regard.train.recipes import Trainable
from regard.worlds.shapes.labelled import labelled_shapes, located_shapes
from regard.worlds.shapes.scene import CLASSES


@dataclass(frozen=True)
class ShapesViT(Trainable):
    """A ViT with a class token, register tokens and a convolutional stem that names the shape of the one thing in a picture.

    Data: 10,000 scenes of 48 x 48 pixels, one of 12 shapes in any of 8 colours and 4 patterns on any of 4 backgrounds,
    moved by up to four pixels in training; measured on 1,000 others. In training the patches on the thing name it too: without
    that, or without the stem, it learns slowly. Limits: one thing, drawn by this world.
    """

    dim: int = 96
    num_heads: int = 4
    depth: int = 4
    size: int = 48
    patch: int = 8
    registers: int = 4
    count: int = 10_000
    tests: int = 1000
    reach: int = 4
    seed: int = 0
    recipe: Recipe = Recipe(epochs=10, batch_size=32, lr=1.5e-3, ema=0.99, precision="bf16-mixed")  # noqa: RUF009 (frozen)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return early_vit(self.size, self.patch, 3, len(CLASSES), self.dim, self.num_heads, self.depth, self.registers)

    def task(self) -> ClassifyPatches:
        train, places = located_shapes("train", self.size, self.count, self.seed)
        test = labelled_shapes("test", self.size, self.tests, self.seed)
        return ClassifyPatches(train, test, self.recipe, self.seed, reach=self.reach, places=places, patch=self.patch)


RECIPE = ShapesViT
