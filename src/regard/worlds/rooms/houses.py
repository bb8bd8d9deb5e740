"""Houses of several rooms as clouds of points on floors and things, for what is known in 3-D without cameras."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.rooms.furnish import COLOURS, STYLES, furnish, vector
from regard.worlds.rooms.solids import Box, Plane, Solid, Sphere
from regard.worlds.shapes.show import paint
from regard.worlds.world import World

NAMES = ("kitchen", "nursery", "cellar", "hall", "office", "bedroom", "library", "workshop", "garage")
GAP = 0.3


@dataclass(frozen=True, eq=False)
class House:
    """n points on k solids in several rooms; each room has a floor and things.

    Args:
        rooms: the rooms' names.
        bounds: (x0, y0, x1, y1) of each room's floor, metres.
        solids: floors and things; a thing is told apart by its room and its name.
        room: the room of each solid.
        position: of each point, metres.
        colour: of the surface, without light, in [0, 1].
        normal: outward, unit length.
        ids: the solid of each point.
    """

    rooms: tuple[str, ...]
    bounds: Float[Tensor, "rooms 4"]
    solids: tuple[Solid, ...]
    room: Int[Tensor, "k"]
    position: Float[Tensor, "n 3"]
    colour: Float[Tensor, "n 3"]
    normal: Float[Tensor, "n 3"]
    ids: Int[Tensor, "n"]

    @property
    def things(self) -> tuple[tuple[str, str], ...]:
        """Room and name of each solid that is not a floor, such as ``("kitchen", "red sphere")``."""
        pairs = zip(self.room.tolist(), self.solids)
        return tuple((self.rooms[room], solid.name) for room, solid in pairs if not isinstance(solid, Plane))


def area(solid: Solid, floor: tuple[float, float]) -> float:
    """Of its surface, square metres; a plane has width times depth of the ``floor``."""
    if isinstance(solid, Sphere):
        return 4 * math.pi * solid.radius**2
    if isinstance(solid, Box):
        a, b, c = solid.half.tolist()
        return 8 * (a * b + b * c + c * a)
    return floor[0] * floor[1]


def scatter(rng: np.random.Generator, solid: Solid, floor: tuple[float, float], n: int) -> Float[Tensor, "n 3"]:
    """World points, uniform over the solid's surface; on a plane over the ``floor`` around its origin."""
    if isinstance(solid, Sphere):
        x = vector(rng.normal(size=(n, 3)))
        return solid.world(solid.radius * x / x.norm(dim=1, keepdim=True))
    x = vector(rng.uniform(-1, 1, (n, 3)))
    if isinstance(solid, Box):
        share = 1 / solid.half.numpy()
        face = rng.choice(3, n, p=share / share.sum())
        x[range(n), face] = x[range(n), face].sign()
        return solid.world(x * solid.half)
    return solid.world(x * vector((floor[0] / 2, floor[1] / 2, 0)))


@dataclass(frozen=True, kw_only=True)
class Houses(World[House]):
    """Rooms side by side in a grid, each with its floor and a few things, sampled evenly by area.

    Args:
        grid: rows and columns of rooms, at most 9 in all.
        objects: fewest and most things in a room.
        points: how many, in all.

    Raises:
        ValueError: an empty grid or one of more than 9 rooms, more things than colours, no points.
    """

    grid: tuple[int, int] = (2, 3)
    objects: tuple[int, int] = (1, 3)
    points: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.grid) < 1 or math.prod(self.grid) > len(NAMES):
            raise ValueError(f"grid={self.grid} must be rows and columns of 1 to {len(NAMES)} rooms")
        if not 0 <= self.objects[0] <= self.objects[1] <= len(COLOURS):
            raise ValueError(f"objects={self.objects} must be two numbers, rising, from 0 to {len(COLOURS)}")
        if self.points < 1:
            raise ValueError(f"points={self.points} must be 1 or more")

    def make(self, rng: np.random.Generator) -> House:
        rows, columns = self.grid
        names = tuple(rng.permutation(list(NAMES))[: rows * columns].tolist())
        furnished = [furnish(rng, STYLES[rng.integers(len(STYLES))], self.objects) for _ in names]
        pitch = max(max(extent[:2]) for _, extent in furnished) + GAP
        solids: list[Solid] = []
        room, floors, bounds = [], [], []
        for i, (scene, (width, depth, _)) in enumerate(furnished):
            shift = vector((i % columns * pitch, i // columns * pitch, 0))
            kept = (scene.solids[0], *scene.solids[6:])
            solids += [replace(solid, position=solid.position + shift) for solid in kept]
            room += [i] * len(kept)
            floors += [(width, depth)] * len(kept)
            x, y, _ = shift.tolist()
            bounds.append([x - width / 2, y - depth / 2, x + width / 2, y + depth / 2])
        areas = np.array([area(solid, floor) for solid, floor in zip(solids, floors)])
        ids = torch.from_numpy(np.sort(rng.choice(len(solids), self.points, p=areas / areas.sum())))
        counts = ids.bincount(minlength=len(solids)).tolist()
        parts = [scatter(rng, solid, floor, n) for solid, floor, n in zip(solids, floors, counts)]
        colour = torch.cat([solid.texture(solid.local(x)) for solid, x in zip(solids, parts)])
        normal = torch.cat([solid.normal(x) for solid, x in zip(solids, parts)])
        where = torch.tensor(bounds, dtype=torch.float64)
        return House(names, where, tuple(solids), torch.tensor(room), torch.cat(parts), colour, normal, ids)

    def panels(self, sample: House) -> dict[str, Tensor | str]:
        """The house from above, 8 pixels to the metre: colours, and solids by number."""
        corner = sample.bounds[:, :2].amin(0)
        w, h = ((sample.bounds[:, 2:].amax(0) - corner) * 8).ceil().int().tolist()
        upward = sample.position[:, 2].argsort()
        x, y = ((sample.position[upward, :2] - corner) * 8).long().T
        colour, index = torch.zeros(h, w, 3), torch.zeros(h, w, dtype=torch.int64)
        for i, (u, v) in enumerate(zip(x.clamp(0, w - 1).tolist(), y.clamp(0, h - 1).tolist())):
            colour[v, u], index[v, u] = sample.colour[upward[i]].float(), sample.ids[upward[i]] + 1
        told = "; ".join(f"{name} in the {room}" for room, name in sample.things)
        return {"from above": colour.permute(2, 0, 1), "solids": paint(index), "things": told}
