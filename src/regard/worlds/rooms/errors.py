"""How far predicted depth, normals, flow and matches are from those of a room, which are known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.worlds.rooms.matches import flow, pick, see
from regard.worlds.rooms.views import View


@dataclass(frozen=True)
class DepthError:
    """Means over the pixels that show a surface.

    Args:
        relative: |d - z| / z.
        rmse: root of the mean of (d - z)^2, metres.
        within: share of the pixels with max(d / z, z / d) < 1.25.
        scale: by which d was multiplied first.
    """

    relative: float
    rmse: float
    within: float
    scale: float


@dataclass(frozen=True)
class NormalError:
    """Degrees between directions, over the pixels that show a surface; ``within`` is the share under 11.25 degrees."""

    mean: float
    median: float
    within: float


@dataclass(frozen=True)
class FlowError:
    """Endpoint errors in pixels where the point is seen in both views and where it is hidden or outside in the second.

    ``outliers`` is the share of all pixels off by more than 3 pixels and 5 per cent of the true flow. A mean over no pixel is
    NaN.
    """

    seen: float
    hidden: float
    outliers: float


@dataclass(frozen=True)
class MatchError:
    """Of pairs of pixels: how far, in the second view, each is from where the first one's point is.

    Args:
        off: (n,), pixels; NaN for nothing there or a point behind the second camera.
        seen: (n,), whether the point is seen in the second view.
    """

    off: Float[Tensor, "n"]
    seen: Bool[Tensor, "n"]

    def within(self, pixels: float) -> float:
        """The share of the pairs that are of one point, seen in both views, within so many pixels; NaN for no pair."""
        return ((self.off <= pixels) & self.seen).double().mean().item()


def depth_error(depth: Float[Tensor, "h w"], view: View, align: bool = False) -> DepthError:
    """The error of z-depths in metres; with ``align`` they are first multiplied by the median of z over that of d.

    Raises:
        ValueError: a map of another size, or not positive and finite where there is a surface.
    """
    d, z = _given("depth", depth, view.depth.shape)[view.ids >= 0], view.depth[view.ids >= 0]
    if not (d > 0).all() or not d.isfinite().all():
        raise ValueError("depth must be positive and finite where the view shows a surface")
    scale = (z.median() / d.median()).item() if align else 1.0
    d = d * scale
    worst = torch.maximum(d / z, z / d)
    relative, rmse = ((d - z).abs() / z).mean(), (d - z).square().mean().sqrt()
    return DepthError(relative.item(), rmse.item(), (worst < 1.25).double().mean().item(), scale)


def normal_error(normals: Float[Tensor, "3 h w"], view: View) -> NormalError:
    """The angles between normals, in world coordinates and of any length, and the true ones.

    Raises:
        ValueError: a map of another size, or of length 0 where there is a surface.
    """
    n, true = _given("normals", normals, view.normals.shape)[:, view.ids >= 0], view.normals[:, view.ids >= 0]
    if not (n.norm(dim=0) > 0).all():
        raise ValueError("normals must not be of length 0 where the view shows a surface")
    angles = torch.atan2(torch.linalg.cross(n, true, dim=0).norm(dim=0), (n * true).sum(0)).rad2deg()
    return NormalError(angles.mean().item(), angles.median().item(), (angles < 11.25).double().mean().item())


def flow_error(flowed: Float[Tensor, "2 h w"], a: View, b: View) -> FlowError:
    """The error of a flow (u, v) in pixels from ``a`` to ``b``; points behind the camera of ``b`` are left out.

    Raises:
        ValueError: a map of another size.
    """
    true, visible = flow(a, b)
    off = (_given("flowed", flowed, true.shape) - true).norm(dim=0)
    known = true.isfinite().all(0)
    outliers = (off > 3) & (off > 0.05 * true.norm(dim=0))
    seen, hidden = off[known & visible].mean(), off[known & ~visible].mean()
    return FlowError(seen.item(), hidden.item(), outliers[known].double().mean().item())


def match_error(matches: Float[Tensor, "n 4"], a: View, b: View) -> MatchError:
    """The error of pairs of pixels (u, v in ``a``, u, v in ``b``).

    Raises:
        ValueError: not four numbers a pair, a pixel outside the image of ``a``.
    """
    if matches.ndim != 2 or matches.shape[1] != 4:
        raise ValueError(f"matches of shape {tuple(matches.shape)} must be (n, 4)")
    pairs = matches.detach().cpu().double()
    sight = see(pick(a, pairs[:, :2]), b)
    return MatchError((sight.position - pairs[:, 2:]).norm(dim=1), sight.visible)


def _given(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"{name} of shape {tuple(value.shape)} must be {tuple(shape)}")
    return value.detach().cpu().double()
