"""What a camera sees: image, depth, normals and surfaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.rooms.cameras import Camera
from regard.worlds.rooms.scene import Scene
from regard.worlds.rooms.solids import Plane


@dataclass(frozen=True, eq=False)
class View:
    """One ray through the centre of each pixel.

    Args:
        scene: as it stands at ``time``; the same solids in the same order in all views of a room.
        camera: where it was seen from.
        time: in units of the scene's motion.
        image: (3, h, w) in [0, 1], float32.
        depth: z-depth, the distance along the optical axis (not along the ray), metres; infinite where there is nothing.
        normals: outward unit normals in world coordinates, zero where there is nothing.
        ids: number of the solid, -1 where there is nothing.
    """

    scene: Scene
    camera: Camera
    time: float
    image: Float[Tensor, "3 h w"]
    depth: Float[Tensor, "h w"]
    normals: Float[Tensor, "3 h w"]
    ids: Int[Tensor, "h w"]

    @property
    def points(self) -> Float[Tensor, "h w 3"]:
        """The surface points in the world; not finite where there is nothing."""
        return self.camera.lift(self.camera.pixels(), self.depth)


def render(scene: Scene, camera: Camera, time: float = 0.0) -> View:
    """The view of ``scene``, moved on by ``time``, from ``camera``.

    Raises:
        ValueError: the camera is inside a solid.
    """
    scene = scene.at(time)
    pixels = camera.pixels().flatten(0, 1)
    depth, ids = scene.cast(camera, pixels)
    seen = torch.where(ids >= 0, depth, 1.0)
    colours, normals = scene.shade(camera.lift(pixels, seen), ids)
    maps = (x.unflatten(0, (camera.height, camera.width)) for x in (colours, depth, normals, ids))
    image, depth, normals, ids = maps
    return View(scene, camera, time, image.permute(2, 0, 1).float(), depth, normals.permute(2, 0, 1), ids)


def nearer(view: View, factor: float = 1.1) -> tuple[tuple[str, str], ...]:
    """Pairs of names of seen things, walls and floors left out, the first of which is nearer by this factor in median depth."""
    seen = [i for i in view.ids.unique().tolist() if i >= 0 and not isinstance(view.scene.solids[i], Plane)]
    depths = {view.scene.solids[i].name: view.depth[view.ids == i].median().item() for i in seen}
    return tuple((a, b) for a in depths for b in depths if depths[a] * factor < depths[b])
