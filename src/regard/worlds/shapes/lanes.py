"""Roads seen from a car: curved lanes with their points, the drivable ground, and vehicles with boxes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.worlds.shapes.render import cover
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COLOURS, Background, Scene, Thing
from regard.worlds.shapes.show import paint
from regard.worlds.world import World

HORIZON = 0.3
VEHICLES = ("square", "circle", "triangle")


@dataclass(frozen=True, eq=False)
class LanesSample:
    """A road of n lane lines.

    Args:
        image: (3, h, w).
        lanes: (n, p, 2), x and y in pixels at p rows from the bottom of the picture to the horizon, from left to right.
        seen: (n, p), whether the point lies in the picture.
        dashed: (n,).
        drivable: (h, w), between the outer lines.
        vehicles: the vehicles as things, far to near; they may hide lines.
        visible: (n, h, w), the pixels of each line where nothing hides it and no dash is left out.
    """

    image: Float[Tensor, "3 h w"]
    lanes: Float[Tensor, "n p 2"]
    seen: Bool[Tensor, "n p"]
    dashed: Bool[Tensor, " n"]
    drivable: Bool[Tensor, "h w"]
    vehicles: ShapesSample
    visible: Bool[Tensor, "n h w"]

    def masks(self, width: float = 6.0) -> Bool[Tensor, "n h w"]:
        """The whole lines drawn so many pixels wide, hidden or not."""
        size = self.vehicles.scene.size
        return torch.from_numpy(np.stack([across(lane, size) <= width / 2 for lane in self.lanes.numpy()]))

    @property
    def vehicle_classes(self) -> Int[Tensor, " v"]:
        """Places in ``VEHICLES``."""
        return torch.tensor([VEHICLES.index(t.shape) for t in self.vehicles.scene.things], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Lanes(World[LanesSample]):
    """Lane lines that meet near a vanishing point: ``x(s) = b + (v - b) s + c s^2 (1 - s)``, s from 0 at the bottom to 1 at
    the horizon, b a line's foot, v the vanishing point, c the bend of the road.

    Args:
        size: (height, width) in pixels.
        lanes: fewest and most lines.
        vehicles: fewest and most vehicles.
        bend: largest c in widths of the picture.
        points: of a line.

    Raises:
        ValueError: fewer than two lines or points, ranges that do not rise, a size below 48.
    """

    size: tuple[int, int] = (96, 192)
    lanes: tuple[int, int] = (2, 5)
    vehicles: tuple[int, int] = (0, 3)
    bend: float = 0.8
    points: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size) < 48:
            raise ValueError(f"size={self.size} must be 48 pixels or more each way")
        if not 2 <= self.lanes[0] <= self.lanes[1]:
            raise ValueError(f"lanes={self.lanes} must rise from 2 or more")
        if not 0 <= self.vehicles[0] <= self.vehicles[1]:
            raise ValueError(f"vehicles={self.vehicles} must rise from 0 or more")
        if self.points < 2:
            raise ValueError(f"points={self.points} must be 2 or more")

    def make(self, rng: np.random.Generator) -> LanesSample:
        h, w = self.size
        n = int(rng.integers(self.lanes[0], self.lanes[1] + 1))
        gap = w * rng.uniform(0.9, 1.3) / n
        feet = w * rng.uniform(0.45, 0.55) + gap * (np.arange(n) - (n - 1) / 2)
        end, bend = w * rng.uniform(0.35, 0.65), w * rng.uniform(-self.bend, self.bend)
        s = np.linspace(0, 1, self.points)
        x = feet[:, None] + (end - feet[:, None]) * 0.97 * s + bend * s**2 * (1 - s)
        y = np.broadcast_to(h - s * h * (1 - HORIZON), x.shape)
        lanes = np.stack([x, y], -1)
        seen = (x >= 0) & (x < w)
        dashed = np.array([0 < i < n - 1 and rng.uniform() < 0.7 for i in range(n)])
        vehicles = self._vehicles(rng, lanes)
        rows, columns = np.mgrid[:h, :w] + 0.5
        edges = [np.interp(rows, lane[::-1, 1], lane[::-1, 0]) for lane in (lanes[0], lanes[-1])]
        drivable = (columns >= edges[0]) & (columns <= edges[1]) & (rows > HORIZON * h)
        near = np.clip((rows / h - HORIZON) / (1 - HORIZON), 0, 1)
        on = ~dashed[:, None, None] | ((np.log(near + 0.08) * 6 % 1) < 0.55)[None]
        lines = (
            np.stack([cover(across(lane, self.size) - (0.3 + 1.0 * near)) * (rows > HORIZON * h) for lane in lanes])
            * on
        )
        ground = np.where(drivable, 0.35, 0.55) + rng.normal(0, 0.02, (h, w))
        image = np.repeat(np.where(rows > HORIZON * h, ground, 0.85)[None], 3, 0).astype(np.float32)
        image += lines.max(0) * (rng.uniform(0.85, 0.95) - image)
        hidden = vehicles.index.numpy() > 0
        image = np.where(hidden, vehicles.image.numpy(), image).clip(0, 1).astype(np.float32)
        return LanesSample(
            torch.from_numpy(image),
            torch.from_numpy(lanes).float(),
            torch.from_numpy(seen),
            torch.from_numpy(dashed),
            torch.from_numpy(drivable),
            vehicles,
            torch.from_numpy((lines >= 0.5) & ~hidden),
        )

    def _vehicles(self, rng: np.random.Generator, lanes: np.ndarray) -> ShapesSample:
        """Between two lines each, the farther the smaller."""
        count = int(rng.integers(self.vehicles[0], self.vehicles[1] + 1))
        things = []
        for s in sorted(rng.uniform(0.1, 0.75, count).tolist(), reverse=True):
            i, at = int(rng.integers(len(lanes) - 1)), int(s * (self.points - 1))
            left, right = lanes[i, at], lanes[i + 1, at]
            size = max(6.0, 0.6 * float(right[0] - left[0]))
            size = min(size, 0.35 * self.size[0])
            centre = (float(left[0] + right[0]) / 2, float(left[1]) - size / 2)
            colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
            things.append(Thing(VEHICLES[int(rng.integers(3))], colour, centre, size))
        things = [t for t in things if t.size / 2 <= t.centre[0] <= self.size[1] - t.size / 2]
        return ShapesSample.of(Scene(self.size, Background(tone="grey"), tuple(things)))

    def panels(self, sample: LanesSample) -> dict[str, Tensor | str]:
        """The picture, the whole lines, and the drivable ground."""
        masks = sample.masks(3.0)
        numbers = (masks * torch.arange(1, len(masks) + 1).view(-1, 1, 1)).amax(0)
        return {"image": sample.image, "lanes": paint(numbers), "drivable": sample.drivable.float().expand(3, -1, -1)}


def across(lane: Float[np.ndarray, "p 2"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Pixels from each pixel's centre to a line through points, its ends not prolonged."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    distance = np.full(size, np.inf)
    for a, b in itertools.pairwise(lane):
        along = b - a
        t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / max(1e-9, along @ along), 0, 1)
        distance = np.minimum(distance, np.hypot(x - a[0] - t * along[0], y - a[1] - t * along[1]))
    return distance
