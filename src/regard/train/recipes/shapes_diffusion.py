"""A diffusion model that paints what a sentence says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import painter
from regard.train.loop import Recipe
from regard.train.paint import Paint
from regard.train.recipes import Trainable
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.world import Shapes


@dataclass(frozen=True)
class ShapesDiffusion(Trainable):
    """A text-to-image diffusion model: a UNet with self- and cross-attention over 16 x 16 and 8 x 8 places, and a causal
    text encoder.

    Data: the world of shapes at 32 x 32 pixels, one to ``most`` upright things of 8 shapes and 8 colours, a third to a half
    as wide as the picture, on a plain background, endless; after the first third of training a share ``crowded`` of the
    pictures has ``most`` things for certain, and in that third it also learns to name what will be where. Captions name the
    things, plain relations and, every second time, the background. Measured by the world's exact judge on captions of test
    scenes, 25 steps, guidance 3. Limits: it knows no other words, no third thing and no texture. With ``begin`` training goes
    on from another model of this recipe; if that is with a ``most`` of 1, what it knew of two things leaks away.
    """

    narrow: int = 64
    wide: int = 128
    text_dim: int = 96
    size: int = 32
    window: int = 24
    steps: int = 7800
    tests: int = 100
    most: int = 2
    noisy: float = 2.0
    named: float = 0.2
    crowded: float = 0.5
    begin: str = ""
    seed: int = 0
    recipe: Recipe = Recipe(  # noqa: RUF009 (frozen)
        epochs=2, batch_size=16, lr=7e-4, weight_decay=0.01, warmup=0.05, ema=0.999, precision="bf16-mixed"
    )

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return painter(Vocabulary().words, self.size, (self.narrow, self.wide), self.text_dim, self.window)

    def task(self) -> Paint:
        count = max(self.steps * self.recipe.epochs * self.recipe.batch_size, 1)
        world = Shapes(size=self.size, things=(1, self.most), sizes=(0.33, 0.46), tilt=0.0, seed=self.seed, count=count)
        return Paint(
            world,
            self.recipe,
            self.steps,
            self.window,
            self.tests,
            noisy=self.noisy,
            named=self.named,
            crowded=self.crowded,
        )


RECIPE = ShapesDiffusion
