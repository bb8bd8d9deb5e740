"""An odd one among equals, and where simulated observers look at it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, TONES, Background, Scene, Thing, known
from regard.worlds.shapes.show import mark
from regard.worlds.world import World

ODD = ("colour", "shape", "angle", "size")


@dataclass(frozen=True, eq=False)
class PopOutSample:
    """A grid of things, one of them odd, and where each observer looked.

    Args:
        shapes: the picture and its truths.
        target: place of the odd thing.
        odd: in what it is odd, of ``ODD``.
        fixations: (observers, steps, 2), x and y in pixels; the first is the middle of the picture.
        looked_at: (observers, steps), place of the thing looked at; -1 for the first.
    """

    shapes: ShapesSample
    target: int
    odd: str
    fixations: Float[Tensor, "o t 2"]
    looked_at: Int[Tensor, "o t"]

    @property
    def image(self) -> Float[Tensor, "3 h w"]:
        return self.shapes.image

    @cached_property
    def mask(self) -> Bool[Tensor, "h w"]:
        """The odd thing."""
        return self.shapes.visible[self.target]

    def density(self, step: int | None = None, sigma: float = 4.0) -> Float[Tensor, "h w"]:
        """Fixations of one step, or of all but the first, blurred by ``sigma`` pixels; adds up to 1."""
        h, w = self.shapes.scene.size
        points = self.fixations[:, 1:] if step is None else self.fixations[:, step]
        x, y = points.reshape(-1, 2).T.long().numpy()
        counts = np.zeros((h, w))
        np.add.at(counts, (y.clip(0, h - 1), x.clip(0, w - 1)), 1)
        blurred = ndimage.gaussian_filter(counts, sigma)
        return torch.from_numpy(blurred / blurred.sum()).float()


@dataclass(frozen=True, kw_only=True)
class PopOut(World[PopOutSample]):
    """Grids of equal things, slightly displaced, of which one is odd in colour, shape, angle or size.

    An observer starts in the middle. Each next thing is drawn in proportion to ``salience * exp(-d^2 / 2 s^2)``, d the
    distance in sides of the picture; one seen before is ten times less likely, the odd one ``pull`` times likelier.

    Args:
        size: (height, width) in pixels.
        grid: rows and columns.
        odd: what is drawn from, of ``ODD``.
        observers, steps: how many look, and how often.
        pull: salience of the odd thing; the others' is 1.
        spread: s.
        backgrounds: what is drawn from.

    Raises:
        ValueError: an unknown word, a grid that does not fit, fewer than one observer or step.
    """

    size: tuple[int, int] = (96, 96)
    grid: tuple[int, int] = (4, 4)
    odd: tuple[str, ...] = ODD
    observers: int = 10
    steps: int = 5
    pull: float = 20.0
    spread: float = 0.4
    backgrounds: tuple[str, ...] = ("plain",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, words in (("odd", ODD), ("backgrounds", BACKGROUNDS)):
            for word in getattr(self, name):
                known(name, word, words)
        if min(self.grid) < 1 or self.grid[0] * self.grid[1] < 3:
            raise ValueError(f"grid={self.grid} must hold three things or more")
        if min(s / n for s, n in zip(self.size, self.grid)) < 12:
            raise ValueError(f"grid={self.grid} does not fit into size={self.size}: a cell must be 12 pixels or more")
        if min(self.observers, self.steps) < 1:
            raise ValueError(f"observers={self.observers} and steps={self.steps} must be 1 or more")

    def make(self, rng: np.random.Generator) -> PopOutSample:
        odd = self.odd[int(rng.integers(len(self.odd)))]
        shape, other_shape = (SHAPES[int(i)] for i in rng.choice(len(SHAPES), 2, replace=False))
        colour, other_colour = (list(COLOURS)[int(i)] for i in rng.choice(len(COLOURS), 2, replace=False))
        if odd == "angle":
            shape = ("triangle", "diamond", "heart")[int(rng.integers(3))]
        cell = np.array(self.size) / self.grid
        size = 0.5 * cell.min()
        things = []
        for row, column in np.ndindex(*self.grid):
            y, x = (np.array([row, column]) + 0.5 + rng.uniform(-0.08, 0.08, 2)) * cell
            things.append(Thing(shape, colour, (float(x), float(y)), float(size), float(rng.uniform(-5, 5))))
        target = int(rng.integers(len(things)))
        one = things[target]
        things[target] = {
            "colour": replace(one, colour=other_colour),
            "shape": replace(one, shape=other_shape),
            "angle": replace(one, angle=one.angle + 90),
            "size": replace(one, size=one.size * 1.6),
        }[odd]
        background = Background(
            self.backgrounds[int(rng.integers(len(self.backgrounds)))],
            list(TONES)[int(rng.integers(len(TONES)))],
            float(rng.uniform(0, 360)),
            int(rng.integers(2**31)),
        )
        sample = ShapesSample.of(Scene(self.size, background, tuple(things)))
        fixations, looked_at = self._look(rng, np.array([t.centre for t in things]), target)
        return PopOutSample(sample, target, odd, torch.from_numpy(fixations).float(), torch.from_numpy(looked_at))

    def _look(self, rng: np.random.Generator, centres: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
        side = min(self.size)
        salience = np.ones(len(centres))
        salience[target] = self.pull
        points = np.empty((self.observers, self.steps, 2))
        looked_at = np.full((self.observers, self.steps), -1)
        for observer in range(self.observers):
            point, fresh = np.array(self.size[::-1]) / 2, np.ones(len(centres))
            points[observer, 0] = point
            for step in range(1, self.steps):
                distance = np.hypot(*(centres - point).T) / side
                weight = salience * fresh * np.exp(-(distance**2) / (2 * self.spread**2))
                i = int(rng.choice(len(centres), p=weight / weight.sum()))
                fresh[i] = 0.1
                point = centres[i] + rng.normal(0, 0.015 * side, 2)
                points[observer, step], looked_at[observer, step] = point, i
        return points, looked_at

    def panels(self, sample: PopOutSample) -> dict[str, Tensor | str]:
        """The picture, the first observer's fixations, and where all looked."""
        image = sample.image
        for x, y in sample.fixations[0].tolist():
            image = mark(image, x, y)
        density = sample.density()
        return {"image": sample.image, "fixations": image, "density": (density / density.max()).expand(3, -1, -1)}
