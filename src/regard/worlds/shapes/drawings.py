"""Line drawings of the one salient thing of a picture, stroke by stroke."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.worlds.shapes.outlines import OUTLINES
from regard.worlds.shapes.render import cover
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COMPOSITES, SHAPES, Scene, Thing
from regard.worlds.shapes.world import Shapes
from regard.worlds.world import World

SCENES = Shapes(things=(1, 1), sizes=(0.35, 0.5), backgrounds=("noise", "gradient", "stripes"), composites=True)


@dataclass(frozen=True, eq=False)
class DrawingSample:
    """A picture and a drawing of what one sees in it.

    Args:
        shapes: the scene; its last thing is the salient one, those before it are faint.
        image: (3, h, w).
        strokes: (p, 3), x and y in pixels, and 1 where the pen is lifted after the point.
    """

    shapes: ShapesSample
    image: Float[Tensor, "3 h w"]
    strokes: Float[Tensor, "p 3"]

    @property
    def mask(self) -> Bool[Tensor, "h w"]:
        """The salient thing."""
        return self.shapes.visible[-1]

    def drawing(self, width: float = 1.2) -> Float[Tensor, "h w"]:
        """The strokes in ink on paper: 1 where there is a line ``width`` pixels wide."""
        h, w = self.shapes.scene.size
        y, x = np.mgrid[:h, :w] + 0.5
        ink = np.zeros((h, w))
        points = self.strokes.numpy()
        for a, b in itertools.pairwise(points):
            if a[2]:
                continue
            along = b[:2] - a[:2]
            t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / max(1e-6, along @ along), 0, 1)
            ink = np.maximum(ink, cover(np.hypot(x - a[0] - t * along[0], y - a[1] - t * along[1]) - width / 2))
        return torch.from_numpy(ink).float()


@dataclass(frozen=True, kw_only=True)
class Drawings(World[DrawingSample]):
    """One thing on a textured background with faint others, and its outline drawn by hand, part by part.

    Args:
        scenes: where the salient thing and the background come from; its seed, split and count play no part.
        points: of a drawing, shared out among the parts.
        jitter, shift, scale: deviations of a point in pixels, of the whole drawing in sides of the picture, of its size.
        distractors: how many faint things stand around.
        faint: their contrast.

    Raises:
        ValueError: fewer than six points, a negative deviation, not one thing a scene.
    """

    scenes: Shapes = SCENES
    points: int = 32
    jitter: float = 0.4
    shift: float = 0.0
    scale: float = 0.0
    distractors: int = 2
    faint: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scenes.things != (1, 1):
            raise ValueError(f"scenes.things={self.scenes.things} must be (1, 1)")
        if self.points < 6 * max(len(parts) for parts in COMPOSITES.values()):
            raise ValueError(f"points={self.points} must be 18 or more")
        if min(self.jitter, self.shift, self.scale) < 0:
            raise ValueError(f"jitter={self.jitter}, shift={self.shift} and scale={self.scale} must not be negative")

    def make(self, rng: np.random.Generator) -> DrawingSample:
        scene = self.scenes.scene(rng)
        side, (salient,) = min(scene.size), scene.things
        others = []
        for x, y in rng.uniform(0.1 * side, 0.9 * side, (self.distractors, 2)).tolist():
            others.append(Thing(SHAPES[int(rng.integers(8))], salient.colour, (x, y), 0.15 * side))
        shapes = ShapesSample.of(Scene(scene.size, scene.background, (*others, salient)))
        bare = ShapesSample.of(Scene(scene.size, scene.background)).image
        weight = torch.where(shapes.amodal[-1] | (shapes.index == 0), 1.0, self.faint)
        image = bare + weight * (shapes.image - bare)
        strokes = outline_strokes(salient, self.points)
        strokes[:, :2] += self.jitter * rng.standard_normal((len(strokes), 2))
        centre = np.array(salient.centre)
        grown = np.exp(self.scale * rng.standard_normal())
        strokes[:, :2] = centre + grown * (strokes[:, :2] - centre) + self.shift * side * rng.standard_normal(2)
        return DrawingSample(shapes, image, torch.from_numpy(strokes).float())

    def panels(self, sample: DrawingSample) -> dict[str, Tensor | str]:
        """The picture, the drawing, and the salient thing."""
        ink = 1 - sample.drawing()
        return {
            "image": sample.image,
            "drawing": ink.expand(3, -1, -1),
            "mask": sample.mask.float().expand(3, -1, -1),
        }


def outline_strokes(thing: Thing, points: int) -> Float[np.ndarray, "p 3"]:
    """Closed strokes along the outline of each part, points evenly spaced, the longer outline with more of them."""
    from skimage.measure import find_contours

    t = np.linspace(-1.3, 1.3, 131, dtype=np.float32)
    u, v = np.meshgrid(t, t)
    lines = []
    for outline in OUTLINES[thing.shape]:
        found = find_contours(outline(u, v), 0.0)
        lines += [line[:, ::-1] * (t[1] - t[0]) + t[0] for line in found]
    lengths = np.array([np.hypot(*np.diff(line, axis=0).T).sum() for line in lines])
    shares = np.maximum(5, np.floor(points * lengths / lengths.sum())).astype(int)
    turn = np.radians(thing.angle)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    strokes = []
    for line, n in zip(lines, shares):
        walked = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
        at = np.linspace(0, walked[-1], n)
        even = np.stack([np.interp(at, walked, line[:, k]) for k in (0, 1)], 1)
        lifted = np.zeros((n, 1))
        lifted[-1] = 1
        strokes.append(np.concatenate([even @ matrix * thing.size / 2 + thing.centre, lifted], 1))
    return np.concatenate(strokes)
