"""Solids under one light, what a camera sees of them, and where space is filled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.rooms.cameras import Camera
from regard.worlds.rooms.solids import Solid


@dataclass(frozen=True, eq=False)
class Scene:
    """Solids, told apart by their number, in diffuse light: colour = albedo (ambient + (1 - ambient) max(0, n . light)).

    Args:
        solids: their order is the same at all times.
        light: unit vector towards the light, which is far away; there are no cast shadows.
        ambient: share of the light that comes from everywhere.
        background: colour where there is nothing.
    """

    solids: tuple[Solid, ...]
    light: Float[Tensor, "3"]
    ambient: float = 0.4
    background: Float[Tensor, "3"] = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def __post_init__(self) -> None:
        if not self.solids:
            raise ValueError("solids=() must hold at least one solid")
        if not 0 <= self.ambient <= 1:
            raise ValueError(f"ambient={self.ambient} must lie between 0 and 1")
        if abs(self.light.norm().item() - 1) > 1e-6:
            raise ValueError(f"light={self.light.tolist()} must have length 1")

    def at(self, time: float) -> Scene:
        """The scene after ``time``."""
        return replace(self, solids=tuple(solid.at(time) for solid in self.solids))

    def cast(self, camera: Camera, pixels: Float[Tensor, "n 2"]) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
        """The z-depth of the first surface along the rays through ``pixels`` and its solid's number; infinity and -1 for none.

        Raises:
            ValueError: the camera is inside a solid.
        """
        origin, rays = camera.centre, camera.rays(pixels)
        depth = torch.full(rays.shape[:-1], math.inf, dtype=rays.dtype)
        ids = torch.full(rays.shape[:-1], -1)
        for i, solid in enumerate(self.solids):
            if solid.distance(origin) <= 0:
                raise ValueError(f"the camera at {origin.tolist()} is inside {solid.name!r} (solid {i})")
            hit = solid.enter(origin, rays)
            ids = torch.where(hit < depth, i, ids)
            depth = torch.minimum(hit, depth)
        return depth, ids

    def shade(
        self, points: Float[Tensor, "n 3"], ids: Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
        """Colours and outward normals at points of the solids' surfaces; background and zeros where ``ids`` is -1."""
        colours = self.background.expand_as(points).clone()
        normals = torch.zeros_like(points)
        for i in ids.unique().tolist():
            if i >= 0:
                on = (ids == i).nonzero()[:, 0]
                solid, x = self.solids[i], points[on]
                normals[on] = n = solid.normal(x)
                light = self.ambient + (1 - self.ambient) * (n @ self.light).clamp(min=0)
                colours[on] = solid.texture(solid.local(x)) * light[:, None]
        return colours, normals

    def distance(self, points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n"]:
        """Signed distance to the nearest surface; exact outside, inside that of the solid the point is least deep in."""
        return torch.stack([solid.distance(points) for solid in self.solids]).amin(0)

    def inside(self, points: Float[Tensor, "*n 3"]) -> Int[Tensor, "*n"]:
        """The number of the solid each point is in (the deepest one), -1 in free space."""
        distance, ids = torch.stack([solid.distance(points) for solid in self.solids]).min(0)
        return torch.where(distance <= 0, ids, -1)

    def occupancy(
        self, lower: Float[Tensor, "3"], upper: Float[Tensor, "3"], shape: tuple[int, int, int]
    ) -> Int[Tensor, "x y z"]:
        """The solid at the centre of each voxel of the grid between two corners, -1 for free.

        Raises:
            ValueError: an empty grid or corners in the wrong order.
        """
        if min(shape) < 1:
            raise ValueError(f"shape={shape} must be 1 or more in each direction")
        if not (lower < upper).all():
            raise ValueError(f"lower={lower.tolist()} must be below upper={upper.tolist()}")
        return self.inside(voxel_centres(lower, upper, shape))


def voxel_centres(
    lower: Float[Tensor, "3"], upper: Float[Tensor, "3"], shape: tuple[int, int, int]
) -> Float[Tensor, "x y z 3"]:
    """The centres of the voxels of a grid between two corners."""
    steps = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in shape]
    return lower + torch.stack(torch.meshgrid(*steps, indexing="ij"), -1) * (upper - lower)
