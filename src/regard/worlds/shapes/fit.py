"""The shape, place, size and angle that explain a region best, with pixels that may be hidden left out of account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage

from regard.worlds.shapes.outlines import OUTLINES, whole
from regard.worlds.shapes.scene import CLASSES

EDGE, CELLS = 1.6, 128
PATCH, SPAN = 28, 1.15
TURNS = {"circle": 1, "ring": 1, "square": 90, "cross": 90, "diamond": 180, "triangle": 120, "star": 72}
PERIODS = np.array([TURNS.get(shape, 360) for shape in CLASSES])
HIDDEN, LEANING = 0.2, 0.05
ENOUGH = 400
TOUCH = 0.3
GROWN = 0.3


@dataclass(frozen=True, eq=False)
class Fit:
    """A shape laid over a region: intersection over union on the pixels that count, less a little for what would be hidden
    and for leaning."""

    shape: str
    centre: tuple[float, float]
    size: float
    angle: float
    score: float

    def local(self, x: Float[ndarray, "*p"], y: Float[ndarray, "*p"]) -> tuple[ndarray, ndarray]:
        """Pixel coordinates in the shape's own frame."""
        dx, dy = (x - self.centre[0]) / (self.size / 2), (y - self.centre[1]) / (self.size / 2)
        cos, sin = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        return cos * dx + sin * dy, cos * dy - sin * dx

    def scaled(self, factor: float) -> Fit:
        x, y = self.centre
        return replace(self, centre=(x * factor, y * factor), size=self.size * factor)

    def distance(self, size: tuple[int, int], part: int | None = None) -> Float[ndarray, "h w"]:
        """Signed distance in pixels to its outline, near it, or to that of one part."""
        u, v = self.local(*pixels(size))
        if part is not None:
            return OUTLINES[self.shape][part](u, v) * (self.size / 2)
        return looked_up(np.array(CLASSES.index(self.shape), np.int32), u, v) * (self.size / 2)


def pixels(size: tuple[int, int]) -> tuple[Float[ndarray, "h w"], Float[ndarray, "h w"]]:
    """x and y of the pixels' centres."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) + 0.5
    return x, y


@cache
def tables() -> Float[ndarray, "n"]:
    """Distances to every whole outline on a grid from -EDGE to EDGE, one after the other."""
    t = np.linspace(-EDGE, EDGE, CELLS + 1, dtype=np.float32)
    x, y = np.meshgrid(t, t)
    return np.stack([whole(shape, x, y) for shape in CLASSES]).astype(np.float32).ravel()


def looked_up(which: Int[ndarray, "*k"], u: Float[ndarray, "*p"], v: Float[ndarray, "*p"]) -> Float[ndarray, "*p"]:
    """Distances to whole outlines from the tables; beyond their edge those on the edge."""
    step = CELLS / (2 * EDGE)
    column = np.clip((u + EDGE) * step + 0.5, 0, CELLS).astype(np.int32)
    row = np.clip((v + EDGE) * step + 0.5, 0, CELLS).astype(np.int32)
    return tables().take((which * (CELLS + 1) + row) * (CELLS + 1) + column)


@cache
def templates(shapes: tuple[str, ...]) -> tuple[Float[ndarray, "t p"], Float[ndarray, "t 5"]]:
    """Turned shapes on a patch around their centre of mass, a unit the root of their area; and for each its place in
    ``CLASSES``, the centre of its frame, its size and its angle in the same units."""
    masks, rows = [], []
    t = np.linspace(-EDGE, EDGE, 200)
    x, y = np.meshgrid(t, t)
    u, v = np.meshgrid(*[np.linspace(-SPAN, SPAN, PATCH)] * 2)
    for shape in shapes:
        inside = whole(shape, x, y) <= 0
        cx, cy = x[inside].mean(), y[inside].mean()
        unit = np.sqrt(inside.sum()) * (t[1] - t[0])
        turns = TURNS.get(shape, 360)
        for angle in np.arange(-turns / 2, turns / 2, 10) if turns > 1 else [0.0]:
            cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
            a, b = cos * u + sin * v, cos * v - sin * u
            masks.append((whole(shape, a * unit + cx, b * unit + cy) <= 0).ravel())
            mx, my = (cos * cx - sin * cy) / unit, (sin * cx + cos * cy) / unit
            rows.append((CLASSES.index(shape), -mx, -my, 2 / unit, angle))
    return np.stack(masks).astype(np.float32), np.array(rows, np.float32)


def overlap(
    guesses: Float[ndarray, "k 5"], x: ndarray, y: ndarray, region: ndarray, counts: ndarray
) -> Float[ndarray, " k"]:
    """Scores of (class, x, y, size, degrees) on the pixels given; regions are cut out so low that they reach GROWN pixels
    too far."""
    which, cx, cy, size, angle = (column[:, None] for column in guesses.T)
    cos, sin, half = np.cos(np.radians(angle)), np.sin(np.radians(angle)), size / 2
    dx, dy = (x - cx) / half, (y - cy) / half
    distance = looked_up(which.astype(np.int32), cos * dx + sin * dy, cos * dy - sin * dx) * half
    inside = np.clip(0.5 + GROWN - distance, 0, 1)
    both, all_of_it = inside @ (region * counts), inside @ counts
    hidden = 1 - all_of_it / (inside.sum(1) + 1e-6)
    turn = PERIODS[guesses[:, 0].astype(int)]
    leaning = (1 - np.cos(np.radians((guesses[:, 4] + turn / 2) % turn - turn / 2))) / 2
    return both / (all_of_it + region @ counts - both + 1e-6) - HIDDEN * hidden - LEANING * leaning


def first_guesses(
    region: Bool[ndarray, "h w"],
    free: Bool[ndarray, "h w"],
    shapes: tuple[str, ...],
    keep: int,
    unit: float,
    cx: float,
    cy: float,
) -> Float[ndarray, "k 5"]:
    """The best turn of each of the best shapes, on a patch around (cx, cy) scaled by ``unit`` pixels."""
    t = np.linspace(-SPAN, SPAN, PATCH) * unit
    grid = np.meshgrid(cy - 0.5 + t, cx - 0.5 + t, indexing="ij")
    patch, hidden = (
        ndimage.map_coordinates(m.astype(np.float32), grid, order=1, mode="constant").ravel() for m in (region, free)
    )
    masks, rows = templates(shapes)
    counts = 1 - np.minimum(hidden, 1)
    both, counted = masks @ (patch * counts), masks @ counts
    scores = both / (counted + patch @ counts - both + 1e-6) - HIDDEN * (1 - counted / masks.sum(1))
    best: list[int] = []
    for i in np.argsort(-scores):
        if len(best) < keep and rows[i, 0] not in rows[best, 0]:
            best.append(int(i))
    return (rows[best] * [1, unit, unit, unit, 1] + [0, cx, cy, 0, 0]).astype(np.float32)


def fit(region: Bool[ndarray, "h w"], free: Bool[ndarray, "h w"], shapes: Sequence[str], keep: int = 8) -> Fit:
    """The best of the shapes for a region; ``free`` pixels belong to something else that may hide it.

    Turned templates are compared on a patch scaled by the region's area; the best ``keep`` shapes are then moved, scaled
    and turned in ever smaller steps.
    """
    ys, xs = region.nonzero()
    unit, cx, cy = float(np.sqrt(len(ys))), float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
    guesses = first_guesses(region, free, tuple(shapes), keep, unit, cx, cy)
    ny, nx = (free & ndimage.binary_dilation(region, iterations=2)).nonzero()
    if len(ny) > TOUCH * unit:
        dx, dy = nx.mean() + 0.5 - cx, ny.mean() + 0.5 - cy
        more = first_guesses(region, free, tuple(shapes), keep, 1.12 * unit, cx + 0.25 * dx, cy + 0.25 * dy)
        guesses = np.concatenate([guesses, more])
    pad = int(0.3 * max(np.ptp(ys), np.ptp(xs))) + 3
    window = (slice(max(0, ys.min() - pad), ys.max() + pad), slice(max(0, xs.min() - pad), xs.max() + pad))
    x, y = (p[window] for p in pixels(region.shape))  # type: ignore[arg-type]
    planes = (x, y, region[window].astype(np.float32), (~free[window]).astype(np.float32))
    every = max(1, round(np.sqrt(x.size / ENOUGH)))
    steps = np.array([0.09 * unit, 0.09 * unit, 0.1, 9.0], np.float32)
    coarse, fine = ([p[::n, ::n].ravel() for p in planes] for n in (every, max(1, every // 2)))
    return refine(guesses, steps, coarse, fine)


def refine(guesses: ndarray, steps: ndarray, coarse: Sequence[ndarray], fine: Sequence[ndarray]) -> Fit:
    """Moves each guess to the best of its neighbours, with steps that shrink; those that fall behind are given up.

    The last half of the steps counts more pixels.
    """
    moves = np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)]).astype(np.float32)
    scores, behind = overlap(guesses, *coarse), 0.2
    for turn in range(9):
        guesses = guesses[scores >= scores.max() - behind]
        near = np.repeat(guesses[:, None], len(moves), 1)
        near[..., 1:3] += moves[:, :2] * steps[:2]
        near[..., 3] *= np.exp(moves[:, 2] * steps[2])
        near[..., 4] += moves[:, 3] * steps[3]
        found = overlap(near.reshape(-1, 5), *(coarse if turn < 4 else fine)).reshape(len(guesses), -1)
        best = found.argmax(1)
        guesses, scores = near[np.arange(len(best)), best], found.max(1)
        steps, behind = steps * 0.7, behind * 0.75
    which, cx, cy, size, angle = guesses[scores.argmax()].tolist()
    return Fit(CLASSES[int(which)], (cx, cy), size, angle, float(scores.max()))
