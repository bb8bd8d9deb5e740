"""Pictures damaged in known ways: holes, fences, shadows, noise, rain, haze, low resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

from regard.worlds.shapes.render import cover
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import known
from regard.worlds.shapes.world import Shapes
from regard.worlds.world import World

Damage = tuple[Float[ndarray, "3 h w"], Bool[ndarray, "h w"]]
Degradation = Callable[[np.random.Generator, Float[ndarray, "3 h w"], Float[ndarray, "h w"]], Damage]
SCENES = Shapes(things=(3, 5), backgrounds=("noise", "gradient", "stripes"), patterns=("solid", "striped", "checked"))


def _grid(image: ndarray) -> tuple[ndarray, ndarray]:
    y, x = np.mgrid[: image.shape[1], : image.shape[2]].astype(np.float32)
    return x, y


def holes(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """Brush strokes that take 20 to 50 % of the picture away; what is under them is black."""
    x, y = _grid(image)
    h, w = x.shape
    mask, goal = np.zeros((h, w), bool), rng.uniform(0.2, 0.45)
    while mask.mean() < goal:
        point, angle, radius = rng.uniform(0, (w, h)), rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.09) * h
        for _ in range(int(rng.integers(3, 9))):
            mask |= np.hypot(x - point[0], y - point[1]) < radius
            angle += rng.normal(0, 0.6)
            point = point + radius * np.array([np.cos(angle), np.sin(angle)])
    return np.where(mask, 0, image), mask


def fence(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """Wire in diamonds, in a grid, or bars, tilted and sagging; pitch 6 to 14 pixels, width 1 to 3."""
    x, y = _grid(image)
    pitch, width, tilt = rng.uniform(6, 14), rng.uniform(1, 3), np.radians(rng.uniform(-10, 10))
    y = y + rng.uniform(0, 3) * np.sin(np.pi * x / x.shape[1])
    u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    kind = int(rng.integers(3))
    lines = ((u + v) / np.sqrt(2), (u - v) / np.sqrt(2)) if kind == 0 else (u, v) if kind == 1 else (u,)
    distance = np.minimum.reduce([np.abs((t + rng.uniform(0, pitch)) % pitch - pitch / 2) for t in lines]) - width / 2
    alpha = cover(distance)
    return image + alpha * (rng.uniform(0.2, 0.7) - image), alpha > 0


def shadow(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """A soft blob in which the light is dimmed, blue least."""
    x, y = _grid(image)
    h, w = x.shape
    cx, cy = rng.uniform(0.2, 0.8, 2) * (w, h)
    angle = np.arctan2(y - cy, x - cx)
    radius = 0.3 * h * (1 + 0.25 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.15 * np.sin(5 * angle + rng.uniform(0, 6)))
    alpha = 1 / (1 + np.exp((np.hypot(x - cx, y - cy) - radius) / rng.uniform(0.5, 2)))
    light = rng.uniform(0.3, 0.6) * np.array([0.9, 1.0, 1.15])[:, None, None]
    return image * (1 - alpha * (1 - light)), alpha > 0.02


def noise(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """Normal noise of deviation 15, 25 or 50 of 255."""
    sigma = (15, 25, 50)[int(rng.integers(3))] / 255
    return image + rng.normal(0, sigma, image.shape), np.ones(image.shape[1:], bool)


def rain(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """Bright streaks of one direction."""
    h, w = image.shape[1:]
    drops = (rng.uniform(size=(h, w)) < rng.uniform(0.01, 0.03)).astype(float)
    length, slant = int(rng.integers(7, 13)), rng.uniform(-0.4, 0.4)
    kernel = np.zeros((length, length))
    for i in range(length):
        kernel[i, int(np.clip(round(length / 2 + slant * (i - length / 2)), 0, length - 1))] = 1
    streaks = np.minimum(1, ndimage.convolve(drops, kernel, mode="wrap"))
    return image + rng.uniform(0.5, 0.7) * streaks * (1 - image), streaks > 0


def haze(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """``I t + A (1 - t)`` with ``t = exp(-beta d)``, d the painter's depth."""
    t = np.exp(-rng.uniform(0.6, 1.6) * depth)
    return image * t + rng.uniform(0.75, 0.95) * (1 - t), np.ones(image.shape[1:], bool)


def low_resolution(rng: np.random.Generator, image: ndarray, depth: ndarray) -> Damage:
    """Every two or four pixels averaged and drawn as one."""
    every = (2, 4)[int(rng.integers(2))]
    small = ndimage.uniform_filter(image, (0, every, every), origin=(0, -(every // 2), -(every // 2)))[
        :, ::every, ::every
    ]
    big = np.repeat(np.repeat(small, every, 1), every, 2)
    return big[:, : image.shape[1], : image.shape[2]], np.ones(image.shape[1:], bool)


DEGRADATIONS: dict[str, Degradation] = {
    "low resolution": low_resolution,
    "shadow": shadow,
    "haze": haze,
    "rain": rain,
    "fence": fence,
    "noise": noise,
    "holes": holes,
}


@dataclass(frozen=True, eq=False)
class DegradedSample:
    """A damaged picture, the clean one, and each damage by itself.

    Args:
        shapes: the clean scene.
        image: (3, h, w), damaged.
        masks: for each damage the pixels it touched.
        without: for each damage the picture with all others only.
    """

    shapes: ShapesSample
    image: Float[Tensor, "3 h w"]
    masks: dict[str, Bool[Tensor, "h w"]]
    without: dict[str, Float[Tensor, "3 h w"]]

    @property
    def clean(self) -> Float[Tensor, "3 h w"]:
        return self.shapes.image

    @property
    def sentence(self) -> str:
        """What one would ask for: ``"remove the rain and the haze"``."""
        return "remove " + " and ".join(f"the {kind}" for kind in self.masks)


@dataclass(frozen=True, kw_only=True)
class Degraded(World[DegradedSample]):
    """Scenes and a few damages, each other one.

    Args:
        scenes: where the clean pictures come from; its seed, split and count play no part.
        kinds: what is drawn from, of ``DEGRADATIONS``.
        at_once: fewest and most damages of a picture.

    Raises:
        ValueError: an unknown kind, more at once than there are.
    """

    scenes: Shapes = SCENES
    kinds: tuple[str, ...] = tuple(DEGRADATIONS)
    at_once: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            known("kinds", kind, DEGRADATIONS)
        if not 0 <= self.at_once[0] <= self.at_once[1] <= len(self.kinds):
            raise ValueError(f"at_once={self.at_once} must rise and be at most the {len(self.kinds)} kinds")

    def make(self, rng: np.random.Generator) -> DegradedSample:
        shapes = ShapesSample.of(self.scenes.scene(rng))
        count = int(rng.integers(self.at_once[0], self.at_once[1] + 1))
        chosen = {self.kinds[int(i)] for i in rng.choice(len(self.kinds), count, replace=False)}
        seeds = {kind: int(rng.integers(2**31)) for kind in DEGRADATIONS if kind in chosen}
        image, masks = _apply(shapes, seeds)
        without = {kind: _apply(shapes, {k: s for k, s in seeds.items() if k != kind})[0] for kind in seeds}
        return DegradedSample(shapes, image, masks, without)

    def panels(self, sample: DegradedSample) -> dict[str, Tensor | str]:
        """The damaged and the clean picture, how much was touched by any damage, and what is to be done."""
        touched = torch.stack(list(sample.masks.values())).float().amax(0)
        return {
            "image": sample.image,
            "clean": sample.clean,
            "touched": touched.expand(3, -1, -1),
            "sentence": sample.sentence,
        }


def _apply(shapes: ShapesSample, seeds: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    image, masks, depth = shapes.image.numpy(), {}, shapes.depth.numpy()
    for kind, seed in seeds.items():
        image, mask = DEGRADATIONS[kind](np.random.default_rng(seed), image, depth)
        image, masks[kind] = image.clip(0, 1), torch.from_numpy(mask)
    return torch.from_numpy(image).float(), masks
