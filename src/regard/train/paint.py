"""Painting what a sentence says, as something to train for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe
from regard.worlds.shapes.facts import Caption, Verdict, truth
from regard.worlds.shapes.judge import satisfies
from regard.worlds.shapes.language import Vocabulary, caption
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.world import Shapes


def describe(sample: ShapesSample, world: Shapes, index: int) -> Caption:
    """A sentence about the sample ``index`` of ``world``; every second one says the background."""
    rng = np.random.default_rng([world.seed, index])
    tone = sample.scene.background.tone if rng.uniform() < 0.5 else None
    return caption(rng, truth(sample), tone=tone)


def captioned(world: Shapes, index: int) -> tuple[Float[Tensor, "3 h w"], Caption]:
    """A picture and a sentence about it."""
    sample = world[index]
    return sample.image, describe(sample, world, index)


@dataclass(frozen=True)
class Paint:
    r"""Denoising, by a :class:`~regard.hosts.painter.Painter`, of pictures of ``world``.

    .. math:: E\, \| v_\theta(\alpha_t x_0 + \sigma_t \epsilon, t, c) - (\alpha_t \epsilon - \sigma_t x_0) \|^2

    with t of [0, 1) drawn with the density :math:`n\, t^{n - 1}` of n = ``noisy``, and without the caption c in a share
    ``unsaid`` of the pictures. Measured by the exact judge of the world: the shares of captions of one thing, and of two, all
    of whose things are in the picture in their colours, out of ``tests``.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    window: int = 24
    tests: int = 100
    unsaid: float = 0.1
    noisy: float = 1.0

    def __post_init__(self) -> None:
        if self.noisy <= 0:
            raise ValueError(f"noisy={self.noisy} must be positive")

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, step: int) -> Batch:
        first, size, words = (epoch * self.steps + step) * self.recipe.batch_size, self.recipe.batch_size, Vocabulary()
        images, ids = [], []
        for i in range(first, first + size):
            image, said = captioned(self.world, i)
            silent = np.random.default_rng([i]).uniform() < self.unsaid
            images.append(image)
            ids.append(words.encode("" if silent else str(said), self.window))
        return torch.stack(images), torch.stack(ids)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, ids = batch
        painter: Any = getattr(model, "module", model)
        x = painter.encode(images)
        times = painter.scheduler.config.num_train_timesteps
        t = (torch.rand(len(x), device=x.device).pow(1 / self.noisy) * times).long().clamp(max=times - 1)
        noise = torch.randn_like(x)
        noisy, v = painter.scheduler.add_noise(x, noise, t), painter.scheduler.get_velocity(x, noise, t)
        return F.mse_loss(model(noisy, t, ids).float(), v)

    def measure(self, model: nn.Module) -> dict[str, float]:
        shares = {}
        for name, things in (("one", 1), ("two", 2)):
            verdicts = self.verdicts(model, things)
            shares[name] = sum(map(bool, verdicts)) / len(verdicts)
        return shares

    def verdicts(self, model: Any, things: int, batch: int = 50, **options: Any) -> list[Verdict]:
        """What the judge says of the pictures that are drawn for test captions of so many things."""
        world = replace(self.world, things=(things, things), split="test", count=self.tests)
        said = [captioned(world, i)[1] for i in range(self.tests)]
        noise = model.noise(self.tests, seed=self.world.seed)
        found = []
        for i in range(0, self.tests, batch):
            prompts = [str(one) for one in said[i : i + batch]]
            images = model.sample(prompts, latents=noise[i : i + batch], **options)
            facts = [replace(one, relations=(), tone=None) for one in said[i : i + batch]]
            found += [satisfies(image.cpu(), one) for image, one in zip(images, facts)]
        return found
