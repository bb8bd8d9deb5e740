"""Spheres, boxes and half-spaces: where rays enter them, how far points are from them, how they move."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from regard.worlds.rooms.cameras import cross_matrix
from regard.worlds.rooms.textures import Texture


def _still() -> Tensor:
    return torch.zeros(3, dtype=torch.float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Solid(ABC):
    """A solid in its own coordinates: a point x of it is at ``rotation`` x + ``position`` in the world.

    Args:
        name: such as ``red sphere``.
        texture: from the solid's coordinates to colours.
        position: of its origin, metres.
        rotation: own to world (3, 3).
        velocity: metres in a unit of time.
        spin: axis times angle, radians in a unit of time, about its own origin.
    """

    name: str
    texture: Texture
    position: Float[Tensor, "3"]
    rotation: Float[Tensor, "3 3"] = field(default_factory=lambda: torch.eye(3, dtype=torch.float64))
    velocity: Float[Tensor, "3"] = field(default_factory=_still)
    spin: Float[Tensor, "3"] = field(default_factory=_still)

    def at(self, time: float) -> Solid:
        """The solid after ``time``."""
        if time == 0 or not (self.velocity.any() or self.spin.any()):
            return self
        turn = torch.linalg.matrix_exp(cross_matrix(time * self.spin))
        return replace(self, position=self.position + time * self.velocity, rotation=turn @ self.rotation)

    def local(self, points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
        """World to own coordinates."""
        return (points - self.position) @ self.rotation

    def world(self, points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
        """Own to world coordinates."""
        return points @ self.rotation.mT + self.position

    def enter(self, origin: Float[Tensor, "3"], rays: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """The s > 0 at which origin + s ray enters the solid, from an origin outside; infinite where it misses."""
        return self._enter(self.local(origin), rays @ self.rotation)

    def distance(self, points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n"]:
        """Distance to the surface in metres, negative inside."""
        return self._distance(self.local(points))

    def normal(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Outward unit normals in the world at points of the surface."""
        return self._normal(self.local(points)) @ self.rotation.mT

    @abstractmethod
    def _enter(self, o: Float[Tensor, "3"], d: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]: ...

    @abstractmethod
    def _distance(self, x: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n"]: ...

    @abstractmethod
    def _normal(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Sphere(Solid):
    """|x| <= radius."""

    radius: float

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius={self.radius} must be positive")

    def _enter(self, o: Float[Tensor, "3"], d: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        a, b, c = d.square().sum(-1), d @ o, o @ o - self.radius**2
        root = b * b - a * c
        return torch.where((root >= 0) & (b < 0), c / (root.clamp(min=0).sqrt() - b), math.inf)

    def _distance(self, x: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n"]:
        return x.norm(dim=-1) - self.radius

    def _normal(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        return x / x.norm(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Box(Solid):
    """|x_i| <= half_i."""

    half: Float[Tensor, "3"]

    def __post_init__(self) -> None:
        if not (self.half > 0).all():
            raise ValueError(f"half={self.half.tolist()} must be positive")

    def _enter(self, o: Float[Tensor, "3"], d: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        d = torch.where(d == 0, 1e-300, d)
        one, two = (-self.half - o) / d, (self.half - o) / d
        near, far = torch.minimum(one, two).amax(-1), torch.maximum(one, two).amin(-1)
        return torch.where((near <= far) & (near > 0), near, math.inf)

    def _distance(self, x: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n"]:
        beyond = x.abs() - self.half
        return beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)

    def _normal(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        face = (x.abs() - self.half).argmax(-1, keepdim=True)
        return torch.zeros_like(x).scatter(-1, face, x.gather(-1, face).sign())


@dataclass(frozen=True, eq=False, kw_only=True)
class Plane(Solid):
    """The half-space x_3 <= 0: a floor, a wall, a ceiling, seen from the side that its third axis points to."""

    def _enter(self, o: Float[Tensor, "3"], d: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        return torch.where(d[:, 2] < 0, -o[2] / d[:, 2], math.inf)

    def _distance(self, x: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n"]:
        return x[..., 2]

    def _normal(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        return x.new_tensor([0, 0, 1]).expand_as(x)
