"""Heads that look at things, and where they look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.worlds.shapes.place import Placer
from regard.worlds.shapes.render import cover
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COLOURS, SHAPES, Background, Pattern, Scene
from regard.worlds.shapes.show import mark
from regard.worlds.world import World

ROLES = 9
HEAD = ("pink", "circle")


@dataclass(frozen=True, eq=False)
class GazeSample:
    """Things, n heads among them, and what the heads look at.

    Args:
        shapes: the things, the heads (pink circles) included, without their noses.
        image: (3, h, w), with a dark nose on each head's edge on the side it looks to.
        heads: places of the heads among the things.
        points: (n, 2), x and y looked at.
        inside: (n,), whether that point lies in the picture.
        at_target: (n,), whether the head means the common target.
        roles: (n,), 0 to 8.
        target: place of the thing that is the common target.
    """

    shapes: ShapesSample
    image: Float[Tensor, "3 h w"]
    heads: Int[Tensor, " n"]
    points: Float[Tensor, "n 2"]
    inside: Bool[Tensor, " n"]
    at_target: Bool[Tensor, " n"]
    roles: Int[Tensor, " n"]
    target: int

    @property
    def boxes(self) -> Float[Tensor, "n 4"]:
        """Around the heads."""
        return self.shapes.boxes[self.heads]

    @property
    def directions(self) -> Float[Tensor, "n 2"]:
        """Unit vectors from the heads to the points."""
        centres = torch.tensor([self.shapes.scene.things[i].centre for i in self.heads.tolist()])
        return torch.nn.functional.normalize(self.points - centres, dim=1)


@dataclass(frozen=True, kw_only=True)
class Gaze(World[GazeSample]):
    """Scenes of things and heads; a head looks at the common target, at another thing, or out of the picture.

    A head of role r means the target with probability ``together * (1 - r / 12)``; it looks past what it means by a
    normal angle.

    Args:
        size: side of the picture in pixels.
        heads, things: fewest and most of each.
        together: how likely a head of role 0 looks at the target.
        outside: how likely a head looks out of the picture, if not at the target.
        wobble: deviation of that angle in degrees.

    Raises:
        ValueError: ranges or probabilities that make no sense.
    """

    size: int = 96
    heads: tuple[int, int] = (1, 4)
    things: tuple[int, int] = (2, 4)
    together: float = 0.8
    outside: float = 0.2
    wobble: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "things"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}={low, high} must rise from 1 or more")
        if self.heads[1] + self.things[1] > 12:
            raise ValueError(f"heads={self.heads} and things={self.things} do not fit: 12 together do")
        if not 64 <= self.size <= 256:
            raise ValueError(f"size={self.size} must be 64 to 256 pixels")
        for name in ("together", "outside"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")

    def make(self, rng: np.random.Generator) -> GazeSample:
        n, m = (int(rng.integers(low, high + 1)) for low, high in (self.heads, self.things))
        colours = [c for c in COLOURS if c != HEAD[0]]
        kinds = [(colours[int(rng.integers(7))], SHAPES[int(rng.integers(8))]) for _ in range(m)]
        placer = Placer(self.size, (0.12, 0.2), 15, 0.0, 1.0, colours)
        things = placer.place(rng, [HEAD] * n + kinds, [Pattern()] * (n + m))
        shapes = ShapesSample.of(Scene((self.size, self.size), Background(tone="white"), things))
        heads = [i for i, t in enumerate(things) if (t.colour, t.shape) == HEAD]
        objects = [i for i in range(n + m) if i not in heads]
        target = objects[int(rng.integers(m))]
        roles = rng.integers(0, ROLES, n)
        means_it = rng.uniform(size=n) < self.together * (1 - roles / 12)
        points = np.array(
            [self._point(rng, things, i, target if means else None, objects) for i, means in zip(heads, means_it)]
        )
        inside = ((points >= 0) & (points < self.size)).all(1)
        image = self._noses(shapes, heads, points)
        numbers = (torch.tensor(heads), torch.from_numpy(points).float(), torch.from_numpy(inside))
        return GazeSample(shapes, image, *numbers, torch.from_numpy(means_it), torch.from_numpy(roles), target)

    def _point(
        self, rng: np.random.Generator, things: tuple, head: int, target: int | None, objects: list[int]
    ) -> np.ndarray:
        centre = np.array(things[head].centre)
        if target is None and rng.uniform() < self.outside:
            angle, far = rng.uniform(0, 2 * np.pi), 1.5 * self.size
            return centre + far * np.array([np.cos(angle), np.sin(angle)])
        aim = objects[int(rng.integers(len(objects)))] if target is None else target
        away = np.array(things[aim].centre) - centre
        turn = np.radians(self.wobble) * rng.standard_normal()
        cos, sin = np.cos(turn), np.sin(turn)
        return centre + np.array([cos * away[0] - sin * away[1], sin * away[0] + cos * away[1]])

    def _noses(self, shapes: ShapesSample, heads: list[int], points: np.ndarray) -> Float[Tensor, "3 h w"]:
        image = shapes.image.numpy().copy()
        y, x = np.mgrid[: self.size, : self.size] + 0.5
        for i, point in zip(heads, points):
            thing = shapes.scene.things[i]
            away = point - thing.centre
            nose = np.array(thing.centre) + away / np.hypot(*away) * thing.size * 0.42
            image *= 1 - 0.9 * cover(np.hypot(x - nose[0], y - nose[1]) - 0.16 * thing.size).astype(np.float32)
        return torch.from_numpy(image)

    def panels(self, sample: GazeSample) -> dict[str, Tensor | str]:
        """The picture, and the points looked at."""
        image = sample.image
        for x, y in sample.points[sample.inside].tolist():
            image = mark(image, x, y)
        return {"image": sample.image, "points": image, "inside": ", ".join(map(str, sample.inside.tolist()))}
