"""Signed distances to the outlines of the shapes, in a frame that reaches from -1 to 1 with y down; negative is inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Plane = Float[ndarray, "*p"]
Outline = Callable[[Plane, Plane], Plane]


def disc(cx: float, cy: float, radius: float) -> Outline:
    return lambda x, y: np.hypot(x - cx, y - cy) - radius


def ring(inner: float, outer: float) -> Outline:
    middle, half = (inner + outer) / 2, (outer - inner) / 2
    return lambda x, y: np.abs(np.hypot(x, y) - middle) - half


def box(cx: float, cy: float, half_width: float, half_height: float) -> Outline:
    def distance(x: Plane, y: Plane) -> Plane:
        dx, dy = np.abs(x - cx) - half_width, np.abs(y - cy) - half_height
        return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)

    return distance


def polygon(*corners: tuple[float, float]) -> Outline:
    """Distance to the nearest edge; inside by the even-odd rule."""
    start = np.array(corners, np.float32)
    edge = np.roll(start, -1, 0) - start
    length2 = (edge**2).sum(1)

    def distance(x: Plane, y: Plane) -> Plane:
        axes = (slice(None), *[None] * x.ndim)
        ex, ey = edge[:, 0][axes], edge[:, 1][axes]
        wx, wy = x - start[:, 0][axes], y - start[:, 1][axes]
        t = np.clip((wx * ex + wy * ey) / length2[axes], 0, 1)
        nearest = np.sqrt(((wx - t * ex) ** 2 + (wy - t * ey) ** 2).min(0))
        above = wy >= 0
        crossed = (above != (wy - ey >= 0)) & ((ex * wy > ey * wx) == (ey > 0))
        return np.where(crossed.sum(0) % 2 == 1, -nearest, nearest)

    return distance


def union(*outlines: Outline) -> Outline:
    """Exact outside and on the outline, a bound inside."""
    return lambda x, y: np.minimum.reduce([outline(x, y) for outline in outlines])


def star(points: int, inner: float) -> Outline:
    angles = [math.pi * (i / points - 0.5) for i in range(2 * points)]
    radii = [inner if i % 2 else 1.0 for i in range(2 * points)]
    return polygon(*[(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)])


def heart() -> Outline:
    """A square on its corner and a half disc on each of its upper edges."""
    c, tip = 0.8, 0.883
    square = polygon((0, tip), (c, tip - c), (0, tip - 2 * c), (-c, tip - c))
    radius = c * math.sqrt(0.5)
    return union(square, disc(-c / 2, tip - 1.5 * c, radius), disc(c / 2, tip - 1.5 * c, radius))


OUTLINES: dict[str, tuple[Outline, ...]] = {
    "circle": (disc(0, 0, 1),),
    "square": (box(0, 0, 0.88, 0.88),),
    "triangle": (polygon((0, -0.95), (1, 0.8), (-1, 0.8)),),
    "star": (star(5, 0.42),),
    "cross": (union(box(0, 0, 1, 0.32), box(0, 0, 0.32, 1)),),
    "heart": (heart(),),
    "ring": (ring(0.5, 1),),
    "diamond": (polygon((0, -1), (0.58, 0), (0, 1), (-0.58, 0)),),
    "house": (box(0, 0.4, 0.75, 0.6), polygon((0, -1), (1, -0.1), (-1, -0.1)), box(0.15, 0.6, 0.24, 0.4)),
    "tree": (disc(0, -0.3, 0.7), box(0, 0.65, 0.2, 0.35)),
    "lollipop": (disc(0, -0.5, 0.5), box(0, 0.48, 0.16, 0.52)),
    "flag": (box(0.12, -0.5, 0.68, 0.5), box(-0.65, 0, 0.16, 1)),
}


def whole(shape: str, x: Plane, y: Plane) -> Plane:
    """Distance to the outline of all parts together."""
    return np.minimum.reduce([outline(x, y) for outline in OUTLINES[shape]])
