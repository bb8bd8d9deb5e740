"""Holds a picture against a room that is known: which of its surfaces the picture shows, where, and in which colours.

Colours alone do not tell the surfaces of a room apart: two may look alike. But the camera and the solids are known, so each
pixel can show only one of the few solids that its ray meets, in the colour that solid has there, or something wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.rooms.views import View
from regard.worlds.shapes.facts import Verdict

TOLERANCE = 0.15
LEAST = 10
SHOWN = 0.7


@dataclass(frozen=True)
class Surface:
    """What a picture shows of one solid of the room.

    Args:
        solid: its number in the scene.
        name: such as ``red sphere``.
        pixels: how many show it in the true view.
        iou: intersection over union of the pixels that show it in the picture and in the true view.
        error: root mean square difference of the colours, over the pixels that show it in the true view.
    """

    solid: int
    name: str
    pixels: int
    iou: float
    error: float


def read_surfaces(image: Float[Tensor, "3 h w"], view: View, tolerance: float = TOLERANCE) -> Int[Tensor, "h w"]:
    """The number of the solid that each pixel of a picture shows; -1 for nothing, -2 for a colour of none on its ray.

    A pixel shows the true surface if it has its colour, else the one among the others on its ray that is nearest in colour.

    Args:
        image: (3, h, w) in [0, 1], from the camera of ``view``.
        view: the true view.
        tolerance: Euclidean distance in (r, g, b) up to which colours agree.

    Raises:
        ValueError: an image of another size than the view, a tolerance that is not positive.
    """
    if image.shape != view.image.shape:
        raise ValueError(f"image of shape {tuple(image.shape)} must be {tuple(view.image.shape)}, the size of the view")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be positive")
    scene, camera = view.scene, view.camera
    seen = image.detach().cpu().double().permute(1, 2, 0).flatten(0, 1)
    rays = camera.rays(camera.pixels().flatten(0, 1))
    off = []
    for i, solid in enumerate(scene.solids):
        depth = solid.enter(camera.centre, rays)
        met = depth.isfinite()
        points = camera.centre + torch.where(met, depth, 1.0)[:, None] * rays
        colours, _ = scene.shade(points, torch.where(met, i, -1))
        off.append((colours - seen).norm(dim=1).masked_fill(~met, math.inf))
    off.append((scene.background - seen).norm(dim=1))
    distance, which = torch.stack(off).min(0)
    read = torch.where(which == len(scene.solids), -1, which)
    read[distance > tolerance] = -2
    true = view.ids.flatten()
    right = (view.image.double().permute(1, 2, 0).flatten(0, 1) - seen).norm(dim=1) <= tolerance
    return torch.where(right, true, read).unflatten(0, view.ids.shape)


def surfaces(image: Float[Tensor, "3 h w"], view: View, tolerance: float = TOLERANCE) -> list[Surface]:
    """Every solid that the true view shows, as the picture shows it.

    Raises:
        ValueError: as for :func:`read_surfaces`.
    """
    read = read_surfaces(image, view, tolerance)
    off = (image.detach().cpu() - view.image).square().mean(0)
    found = []
    for i in view.ids.unique().tolist():
        if i >= 0:
            true, shown = view.ids == i, read == i
            iou = (true & shown).sum().item() / (true | shown).sum().item()
            name = view.scene.solids[i].name
            found.append(Surface(i, name, int(true.sum()), iou, off[true].mean().sqrt().item()))
    return found


def shows(image: Float[Tensor, "3 h w"], view: View, tolerance: float = TOLERANCE) -> Verdict:
    """Whether a picture shows each solid of which the true view shows ten pixels or more, in its place and colours.

    Raises:
        ValueError: as for :func:`read_surfaces`.
    """
    seen = [one for one in surfaces(image, view, tolerance) if one.pixels >= LEAST]
    return Verdict(tuple((f"the {one.name}", one.iou >= SHOWN) for one in seen))
