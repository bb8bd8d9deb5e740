"""Things on a sphere around the camera, seen in an equirectangular picture and in an ordinary one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.worlds.shapes.outlines import whole
from regard.worlds.shapes.render import cover
from regard.worlds.shapes.scene import CLASSES, COLOURS, SHAPES, TONES
from regard.worlds.shapes.show import paint
from regard.worlds.world import World


@dataclass(frozen=True)
class Patch:
    """A thing on the plane that touches the sphere where it stands.

    Args:
        shape, colour: as of a :class:`Thing`.
        longitude, latitude: degrees, right and up of straight ahead.
        width: degrees, of the square that holds it.
    """

    shape: str
    colour: str
    longitude: float
    latitude: float
    width: float


@dataclass(frozen=True, eq=False)
class View:
    """One picture of the sphere.

    Args:
        image: (3, h, w).
        index: (h, w), number of the thing seen, from 1; 0 is the background.
        amodal: (n, h, w), each thing as if nothing hid it.
        semantic: (h, w), 1 + the place in ``CLASSES`` of the thing seen; 0 is the background.
    """

    image: Float[Tensor, "3 h w"]
    index: Int[Tensor, "h w"]
    amodal: Bool[Tensor, "n h w"]
    semantic: Int[Tensor, "h w"]


@dataclass(frozen=True, eq=False)
class PanoramaSample:
    """The same things all around and straight ahead, the farthest first."""

    things: tuple[Patch, ...]
    around: View
    ahead: View

    @property
    def image(self) -> Float[Tensor, "3 h w"]:
        return self.around.image


@dataclass(frozen=True, kw_only=True)
class Panoramas(World[PanoramaSample]):
    """Things all around the camera. Row v of h of the panorama is at latitude ``90 - 180 (v + 1/2) / h`` degrees, column u
    of w at longitude ``360 (u + 1/2) / w - 180``.

    Args:
        size: (height, width) of the panorama; the picture ahead is as high and square.
        things: fewest and most things.
        widths: smallest and largest thing in degrees.
        view: width of the picture ahead in degrees.

    Raises:
        ValueError: ranges that make no sense.
    """

    size: tuple[int, int] = (64, 256)
    things: tuple[int, int] = (6, 12)
    widths: tuple[float, float] = (20.0, 50.0)
    view: float = 90.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size) < 16:
            raise ValueError(f"size={self.size} must be 16 pixels or more each way")
        if not 0 <= self.things[0] <= self.things[1]:
            raise ValueError(f"things={self.things} must be the fewest and the most things")
        if not 0 < self.widths[0] <= self.widths[1] <= 120:
            raise ValueError(f"widths={self.widths} must rise and lie between 0 and 120 degrees")
        if not 0 < self.view < 150:
            raise ValueError(f"view={self.view} must lie between 0 and 150 degrees")

    def make(self, rng: np.random.Generator) -> PanoramaSample:
        things = []
        for _ in range(int(rng.integers(self.things[0], self.things[1] + 1))):
            shape, colour = SHAPES[int(rng.integers(8))], list(COLOURS)[int(rng.integers(8))]
            latitude = float(np.degrees(np.arcsin(rng.uniform(-0.95, 0.95))))
            width = float(rng.uniform(*self.widths))
            things.append(Patch(shape, colour, float(rng.uniform(-180, 180)), latitude, width))
        tone = TONES[list(TONES)[int(rng.integers(len(TONES)))]]
        h, w = self.size
        views = (look(things, sphere(h, w), tone), look(things, pinhole(h, self.view), tone))
        return PanoramaSample(tuple(things), *views)

    def panels(self, sample: PanoramaSample) -> dict[str, Tensor | str]:
        """All around, straight ahead, and what is seen of each thing."""
        return {"around": sample.around.image, "ahead": sample.ahead.image, "things": paint(sample.around.index)}


def sphere(h: int, w: int) -> Float[np.ndarray, "h w 3"]:
    """Directions (right, down, ahead) of the pixels of an equirectangular picture."""
    longitude = np.radians(360 * (np.arange(w) + 0.5) / w - 180)[None]
    latitude = np.radians(90 - 180 * (np.arange(h) + 0.5) / h)[:, None]
    parts = (
        np.cos(latitude) * np.sin(longitude),
        -np.sin(latitude) + 0 * longitude,
        np.cos(latitude) * np.cos(longitude),
    )
    return np.stack(parts, -1)


def pinhole(side: int, view: float) -> Float[np.ndarray, "h w 3"]:
    """Directions of the pixels of a square picture of ``view`` degrees."""
    t = np.tan(np.radians(view / 2)) * (2 * (np.arange(side) + 0.5) / side - 1)
    x, y = np.meshgrid(t, t)
    rays = np.stack([x, y, np.ones_like(x)], -1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def axes(thing: Patch) -> Float[np.ndarray, "3 3"]:
    """Rows: the thing's right, its down, and the direction in which it stands."""
    a, b = np.radians(thing.longitude), np.radians(thing.latitude)
    right = [np.cos(a), 0, -np.sin(a)]
    ahead = [np.cos(b) * np.sin(a), -np.sin(b), np.cos(b) * np.cos(a)]
    return np.array([right, np.cross(ahead, right), ahead])


def look(things: list[Patch], rays: Float[np.ndarray, "h w 3"], tone: float) -> View:
    """What is seen along the rays; edges are as soft as a pixel is wide."""
    size = rays.shape[:2]
    image = np.full((*size, 3), tone)
    index, amodal = np.zeros(size, np.int64), []
    pixel = np.arccos(np.clip((rays[size[0] // 2, size[1] // 2] * rays[size[0] // 2, size[1] // 2 - 1]).sum(), -1, 1))
    for number, thing in enumerate(things, 1):
        x, y, z = np.moveaxis(rays @ axes(thing).T, -1, 0)
        half = np.tan(np.radians(thing.width / 2))
        front = z > 0.05
        safe = np.where(front, z, 1.0)
        distance = whole(thing.shape, x / safe / half, y / safe / half)
        alpha = cover(distance * half / pixel) * front
        image += alpha[..., None] * (np.array(COLOURS[thing.colour]) - image)
        index[alpha >= 0.5] = number
        amodal.append(alpha >= 0.5)
    classes = np.array([0] + [CLASSES.index(t.shape) + 1 for t in things])
    masks = np.stack(amodal) if amodal else np.zeros((0, *size), bool)
    tensors = (torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float(), torch.from_numpy(index))
    return View(*tensors, torch.from_numpy(masks), torch.from_numpy(classes[index]))
