"""Painting what a sentence says, as something to train for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.hosts.painter import Painter
from regard.train.loop import Batch, Recipe
from regard.train.naming import naming, what_is_where
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
    r"""Denoising, by a :class:`~regard.hosts.painter.Painter`, of pictures of ``world``, and saying what will be where.

    .. math:: E\, \| v_\theta(\alpha_t x_0 + \sigma_t \epsilon, t, c) - (\alpha_t \epsilon - \sigma_t x_0) \|^2 + \lambda\, \ell

    with t of [0, 1) drawn with the density :math:`n\, t^{n - 1}` of n = ``noisy``, evenly over a batch, and without the caption
    c in a share ``unsaid`` of the pictures. :math:`\ell` is the :func:`~regard.train.naming.naming` of the colour and the shape
    that each place will have: words are bound to places long before the noise lets a shape's edges show. :math:`\lambda` falls
    from ``named`` to 0 within the first third, and within it the share of pictures that are sure to have as many things as the
    world allows rises to ``crowded``: one thing alone is learned sooner. Measured by the exact judge of the world: the shares
    of captions of one thing, and of two, all of whose things are in the picture in their colours, out of ``tests``.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    window: int = 24
    tests: int = 100
    unsaid: float = 0.1
    noisy: float = 1.0
    named: float = 0.0
    crowded: float = 0.0

    def __post_init__(self) -> None:
        if self.noisy <= 0:
            raise ValueError(f"noisy={self.noisy} must be positive")
        if self.named < 0:
            raise ValueError(f"named={self.named} must not be negative")
        if not 0 <= self.crowded <= 1:
            raise ValueError(f"crowded={self.crowded} must lie between 0 and 1")

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, step: int) -> Batch:
        """Pictures, captions, t, colours and shapes at the places, and how much it counts to name them."""
        done, size = epoch * self.steps + step, self.recipe.batch_size
        early = max(0.0, 1 - 3 * done / (self.steps * self.recipe.epochs))
        full = replace(self.world, things=self.world.things[1:] * 2)
        rng, words = np.random.default_rng([self.world.seed, done]), Vocabulary()
        images, ids, there = [], [], []
        for i in range(done * size, (done + 1) * size):
            sample = (full if rng.uniform() < self.crowded * (1 - early) else self.world)[i]
            said = "" if rng.uniform() < self.unsaid else str(describe(sample, self.world, i))
            images.append(sample.image)
            ids.append(words.encode(said, self.window))
            there.append(what_is_where(sample, Painter.FOLD)[:2])
        even = torch.from_numpy((rng.permutation(size) + rng.uniform(size=size)) / size)
        return (
            torch.stack(images),
            torch.stack(ids),
            even.pow(1 / self.noisy).float(),
            torch.stack(there),
            torch.full((size,), self.named * early),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, ids, share, there, counts = batch
        painter: Any = getattr(model, "module", model)
        x = painter.encode(images)
        times = painter.scheduler.config.num_train_timesteps
        t = (share * times).long().clamp(max=times - 1)
        noise = torch.randn_like(x)
        noisy, v = painter.scheduler.add_noise(x, noise, t), painter.scheduler.get_velocity(x, noise, t)
        painted, seen = model(noisy, t, ids)
        return F.mse_loss(painted.float(), v) + (counts * naming(seen, there, painter.words)).mean()

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
