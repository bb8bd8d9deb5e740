"""Rooms as worlds: several views of one, a stereo pair, a moving camera, a ring of cameras."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.worlds.rooms.cameras import MIN_SIDE, beside, intrinsics
from regard.worlds.rooms.furnish import COLOURS, STYLES, Style, furnish
from regard.worlds.rooms.rigs import around, path, ring
from regard.worlds.rooms.scene import Scene
from regard.worlds.rooms.views import View, render
from regard.worlds.shapes.show import paint
from regard.worlds.world import World


@dataclass(frozen=True, eq=False)
class Room:
    """A sample: what the cameras saw, in order of time and then of camera.

    Args:
        views: one or more.
        extent: width, depth and height in metres; the floor is centred on the origin at z = 0.
        style: one of ``kitchen``, ``nursery``, ``cellar``, ``hall``.
        caption: such as ``a kitchen with a red sphere and a mottled blue box``.
    """

    views: tuple[View, ...]
    extent: tuple[float, float, float]
    style: Style
    caption: str

    @property
    def scene(self) -> Scene:
        """As it stands in the first view."""
        return self.views[0].scene

    @property
    def bounds(self) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
        """Lower and upper corner, for an occupancy grid."""
        width, depth, height = self.extent
        corner = torch.tensor([width / 2, depth / 2, height], dtype=torch.float64)
        return -corner * corner.new_tensor([1, 1, 0]), corner

    def pair(self, a: int = 0, b: int = 1) -> tuple[View, View]:
        """Two different views.

        Raises:
            ValueError: the room has no such views, or they are one.
        """
        if a == b or not all(0 <= i < len(self.views) for i in (a, b)):
            raise ValueError(
                f"views {a} and {b} were asked for: two different ones of the room's {len(self.views)} are needed"
            )
        return self.views[a], self.views[b]


@dataclass(frozen=True, kw_only=True)
class _RoomWorld(World[Room]):
    """What all worlds of rooms share.

    Args:
        size: height and width of a view, pixels.
        objects: fewest and most things in a room, of different colours.
        style: of all rooms; drawn for each one where it is ``None``.

    Raises:
        ValueError: a side under 16 pixels, more things than colours, an unknown style.
    """

    size: tuple[int, int] = (64, 64)
    objects: tuple[int, int] = (3, 6)
    style: Style | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size) < MIN_SIDE:
            raise ValueError(f"size={self.size} is too small: {MIN_SIDE} pixels a side or more")
        if not 0 <= self.objects[0] <= self.objects[1] <= len(COLOURS):
            raise ValueError(f"objects={self.objects} must be two numbers, rising, from 0 to {len(COLOURS)}")
        if self.style not in (None, *STYLES):
            raise ValueError(f"style={self.style!r} must be one of {', '.join(map(repr, STYLES))}")

    def panels(self, sample: Room) -> dict[str, Tensor | str]:
        panels: dict[str, Tensor | str] = {"caption": sample.caption}
        for i, view in enumerate(sample.views):
            near = view.depth.min() / view.depth
            panels[f"view {i}"] = view.image
            panels[f"nearness {i}"] = near.float().expand(3, -1, -1)
        first = sample.views[0]
        panels["normals"] = ((first.normals + 1) / 2).float()
        panels["surfaces"] = paint(first.ids + 1)
        return panels

    def furnished(self, rng: np.random.Generator, movers: int = 0) -> tuple[Scene, tuple[float, float, float], Style]:
        drawn = STYLES[rng.integers(len(STYLES))]
        style = self.style or drawn
        return *furnish(rng, style, self.objects, movers), style


def _room(views: list[View], extent: tuple[float, float, float], style: Style) -> Room:
    names = [f"{'an' if s.name[0] in 'aeiou' else 'a'} {s.name}" for s in views[0].scene.solids[6:]]
    things = ", ".join(names[:-1]) + (" and " if names[1:] else "") + names[-1] if names else "nothing in it"
    return Room(tuple(views), extent, style, f"a {style} with {things}")


@dataclass(frozen=True, kw_only=True)
class Rooms(_RoomWorld):
    """A room at rest seen by several cameras that look to its middle.

    Args:
        views: how many cameras.
        spread: they stand within so many degrees of each other, seen from the middle.
        fov: horizontal field of view, degrees.

    Raises:
        ValueError: no view, ``spread`` outside [0, 360], ``fov`` outside (0, 180).
    """

    views: int = 2
    spread: float = 60.0
    fov: float = 70.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 1:
            raise ValueError(f"views={self.views} must be 1 or more")
        if not 0 <= self.spread <= 360:
            raise ValueError(f"spread={self.spread} must lie between 0 and 360 degrees")
        intrinsics(*self.size, self.fov)

    def make(self, rng: np.random.Generator) -> Room:
        scene_rng, camera_rng = rng.spawn(2)
        scene, extent, style = self.furnished(scene_rng)
        cameras = around(camera_rng, scene, extent, self.views, self.size, self.spread, self.fov)
        return _room([render(scene, camera) for camera in cameras], extent, style)


@dataclass(frozen=True, kw_only=True)
class StereoRooms(_RoomWorld):
    """A room seen by a rectified pair: the left view, then the right one.

    Args:
        baseline: between the two cameras, metres.

    Raises:
        ValueError: a baseline outside (0, 0.3).
    """

    baseline: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.baseline < 0.3:
            raise ValueError(f"baseline={self.baseline} must lie between 0 and 0.3 metres")

    def make(self, rng: np.random.Generator) -> Room:
        scene_rng, camera_rng = rng.spawn(2)
        scene, extent, style = self.furnished(scene_rng)
        (left,) = around(camera_rng, scene, extent, 1, self.size, 360.0)
        return _room([render(scene, camera) for camera in (left, beside(left, self.baseline))], extent, style)


@dataclass(frozen=True, kw_only=True)
class RoomClips(_RoomWorld):
    """Things that slide and turn, filmed by a gliding camera.

    Args:
        frames: evenly over the clip, from time 0 to time 1.
        movers: how many of the things move, where they have room to.

    Raises:
        ValueError: fewer than two frames, a negative number of movers.
    """

    frames: int = 8
    movers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 2:
            raise ValueError(f"frames={self.frames} must be 2 or more")
        if self.movers < 0:
            raise ValueError(f"movers={self.movers} must not be negative")

    def make(self, rng: np.random.Generator) -> Room:
        scene_rng, camera_rng = rng.spawn(2)
        scene, extent, style = self.furnished(scene_rng, self.movers)
        times = np.linspace(0, 1, self.frames).tolist()
        cameras = path(camera_rng, scene, extent, times, self.size)
        return _room([render(scene, camera, t) for camera, t in zip(cameras, times)], extent, style)


@dataclass(frozen=True, kw_only=True)
class RingRooms(_RoomWorld):
    """A ring of cameras that looks outward and drives through a room in which things move.

    Args:
        views: cameras on the ring.
        overlap: share of its field of view that a camera has in common with each neighbour.
        frames: evenly from time 0 to time 1; a single one is at time 0.
        movers: how many of the things move, where they have room to.

    Raises:
        ValueError: fewer than 3 views, no frame, an overlap that asks for more than 150 degrees a camera, fewer than no
            movers.
    """

    views: int = 5
    overlap: float = 0.15
    frames: int = 1
    movers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 3 or self.frames < 1:
            raise ValueError(f"views={self.views}, frames={self.frames} must be 3 or more, and 1 or more")
        if not (0 <= self.overlap < 1 and self.fov <= 150):
            raise ValueError(
                f"overlap={self.overlap}, views={self.views} need {self.fov:.0f} degrees a camera; 150 is the most"
            )
        if self.movers < 0:
            raise ValueError(f"movers={self.movers} must not be negative")

    @property
    def fov(self) -> float:
        """Horizontal field of view of each camera, degrees."""
        return 360 / self.views / (1 - self.overlap)

    def make(self, rng: np.random.Generator) -> Room:
        scene_rng, camera_rng = rng.spawn(2)
        scene, extent, style = self.furnished(scene_rng, self.movers)
        times = np.linspace(0, 1, self.frames).tolist()
        rigs = ring(camera_rng, scene, extent, self.views, times, self.size, self.fov)
        views = [render(scene, camera, t) for cameras, t in zip(rigs, times) for camera in cameras]
        return _room(views, extent, style)
