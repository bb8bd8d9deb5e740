"""An image-text encoder that tells which sentence is about which picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import clip
from regard.train.loop import Recipe
from regard.train.match import Match
from regard.train.recipes import Trainable
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.world import Shapes


@dataclass(frozen=True)
class ShapesClip(Trainable):
    """A CLIP of two small transformers over sentences and pictures of 16 x 16 patches, read by a convolutional stem.

    Data: the world of shapes at 128 x 128 pixels, one to three things of 8 shapes and 8 colours on a plain background, endless;
    captions name the things, plain relations and, every second time, the background. Besides pictures with captions, patches are
    matched with the names of the things on them, ``over`` layers below the last. Measured by retrieval among 32 test scenes.
    Limits: it knows no other words, and reads sentences as ``regard.train.match.encode`` numbers them.

    Raises:
        ValueError: on starting, ``over`` outside the vision tower.
    """

    dim: int = 128
    text_depth: int = 3
    depth: int = 4
    over: int = 1
    joint: int = 64
    size: int = 128
    patch: int = 8
    window: int = 32
    steps: int = 430
    seed: int = 0
    recipe: Recipe = Recipe(  # noqa: RUF009 (frozen)
        epochs=5, batch_size=32, lr=1e-3, weight_decay=0.05, warmup=0.05, ema=0.995, precision="bf16-mixed"
    )

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return clip(
            Vocabulary().words, self.window, self.size, self.patch, self.dim, (self.text_depth, self.depth), self.joint
        )

    def task(self) -> Match:
        if not 0 <= self.over <= self.depth:
            raise ValueError(f"over={self.over} must lie between 0 and depth={self.depth}")
        count = self.steps * self.recipe.epochs * self.recipe.batch_size
        world = Shapes(size=self.size, things=(1, 3), sizes=(0.16, 0.3), seed=self.seed, count=count)
        return Match(world, self.recipe, self.steps, self.patch, self.over, self.window)


RECIPE = ShapesClip
