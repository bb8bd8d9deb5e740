"""Where points seen in one view are in another: correspondences, optical flow, disparity, tracks.

Whether a point is seen is decided by casting a ray through its exact position, not by comparing with a depth map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.worlds.rooms.views import View

SLACK = 1e-7


@dataclass(frozen=True, eq=False)
class Points:
    """Points that are fixed to solids: the solid's number (-1 for no point) and the position in its coordinates."""

    ids: Int[Tensor, "n"]
    local: Float[Tensor, "n 3"]


@dataclass(frozen=True, eq=False)
class Sight:
    """Points as a view has them.

    Args:
        position: pixels (u, v), also outside the image; NaN behind the camera and for no point.
        depth: z-depth, metres; not positive behind the camera.
        inside: in front of the camera and in the image.
        visible: inside and with nothing before it. Hidden points are ``inside & ~visible``.
    """

    position: Float[Tensor, "*n 2"]
    depth: Float[Tensor, "*n"]
    inside: Bool[Tensor, "*n"]
    visible: Bool[Tensor, "*n"]

    @property
    def hidden(self) -> Bool[Tensor, "*n"]:
        return self.inside & ~self.visible


def pick(view: View, pixels: Float[Tensor, "n 2"]) -> Points:
    """The surface points that ``view`` shows at ``pixels``.

    Raises:
        ValueError: a pixel outside the image.
    """
    if not (held := view.camera.holds(pixels)).all():
        raise ValueError(
            f"pixels={pixels[~held][0].tolist()} is outside the image of {view.camera.width} x {view.camera.height}"
        )
    depth, ids = view.scene.cast(view.camera, pixels)
    world = view.camera.lift(pixels, depth)
    local = torch.full_like(world, math.nan)
    for i in ids.unique().tolist():
        if i >= 0:
            local[ids == i] = view.scene.solids[i].local(world[ids == i])
    return Points(ids, local)


def locate(points: Points, view: View) -> Float[Tensor, "n 3"]:
    """Where the points are in the world at the time of ``view``."""
    world = torch.full_like(points.local, math.nan)
    for i in points.ids.unique().tolist():
        if i >= 0:
            world[points.ids == i] = view.scene.solids[i].world(points.local[points.ids == i])
    return world


def see(points: Points, view: View) -> Sight:
    """Where ``view`` has the points and whether it shows them."""
    position, depth = view.camera.project(locate(points, view))
    inside = view.camera.holds(position)
    first, _ = view.scene.cast(view.camera, position[inside])
    visible = inside.clone()
    visible[inside] = first >= depth[inside] * (1 - SLACK)
    return Sight(position, depth, inside, visible)


def correspond(a: View, b: View) -> Sight:
    """For the centre of each pixel of ``a`` (h, w), where its surface point is in ``b``."""
    h, w = a.camera.height, a.camera.width
    sight = see(pick(a, a.camera.pixels().flatten(0, 1)), b)
    return Sight(*(x.unflatten(0, (h, w)) for x in (sight.position, sight.depth, sight.inside, sight.visible)))


def flow(a: View, b: View) -> tuple[Float[Tensor, "2 h w"], Bool[Tensor, "h w"]]:
    """Optical flow (u, v) in pixels from ``a`` to ``b`` (another time, camera or both), and where the points are visible."""
    sight = correspond(a, b)
    return (sight.position - a.camera.pixels()).permute(2, 0, 1), sight.visible


def disparity(left: View, right: View) -> tuple[Float[Tensor, "h w"], Bool[Tensor, "h w"]]:
    """d = f B / z of the left view, positive: (u, v) on the left is (u - d, v) on the right; and where that is visible.

    Raises:
        ValueError: the cameras are not a rectified pair, right one on the right, at one time.
    """
    a, b = left.camera, right.camera
    step = a.R @ (b.centre - a.centre)
    aligned = (a.R - b.R).abs().max() < 1e-9 and (a.K - b.K).abs().max() < 1e-9 and step[1:].abs().max() < 1e-9
    if not (aligned and step[0] > 0 and left.time == right.time):
        raise ValueError("left and right must differ by a step along the camera's own x axis only, and be of one time")
    return a.K[0, 0] * step[0] / left.depth, correspond(left, right).visible


def tracks(views: Sequence[View], pixels: Float[Tensor, "n 2"], frame: int = 0) -> Sight:
    """The points at ``pixels`` of ``views[frame]`` in all views (t, n).

    Raises:
        ValueError: no such frame, a pixel outside the image.
    """
    if not 0 <= frame < len(views):
        raise ValueError(f"frame={frame} is not among the {len(views)} views")
    points = pick(views[frame], pixels)
    sights = [see(points, view) for view in views]
    return Sight(
        *(torch.stack([getattr(s, name) for s in sights]) for name in ("position", "depth", "inside", "visible"))
    )
