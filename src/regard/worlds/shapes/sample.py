"""A rendered scene and everything that is true of it; truths are worked out when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from regard.worlds.shapes.render import Layer, layer, render
from regard.worlds.shapes.scene import CLASSES, COLOURS, PATTERNS, Scene


def tight_boxes(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """The boxes (x0, y0, x1, y1) that just hold the masks, far edge excluded; zeros for an empty one."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks.numpy()):
        ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        if len(ys):
            box[:] = torch.tensor([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    return boxes


def covering_ellipses(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n 5"]:
    """Ellipses (x, y, half long axis, half short axis, degrees of the long one) with the mask's axes that cover its pixels.

    The axes' ratio is that of the mask's deviations along its principal directions.
    """
    out = torch.zeros(len(masks), 5)
    for row, mask in zip(out, masks.numpy()):
        points = np.argwhere(mask)[:, ::-1] + 0.5
        if not len(points):
            continue
        centre = points.mean(0)
        values, vectors = np.linalg.eigh(np.cov((points - centre).T, ddof=0) + np.eye(2) / 12)
        axes = np.sqrt(values[::-1])
        along = (points - centre) @ vectors[:, ::-1]
        axes = axes * np.sqrt(((along / axes) ** 2).sum(1).max()) + 1e-3
        turn = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        row[:] = torch.tensor([*centre, *axes, turn])
    return out


@dataclass(frozen=True, eq=False)
class ShapesSample:
    """One picture of n things; everything is in painter's order, the farthest thing first.

    Args:
        scene: what was painted.
        image: (3, h, w) in [0, 1].
        index: (h, w), the number of the thing seen at each pixel, from 1; 0 is the background.
    """

    scene: Scene
    image: Float[Tensor, "3 h w"]
    index: Int[Tensor, "h w"]

    @classmethod
    def of(cls, scene: Scene) -> ShapesSample:
        layers = tuple(layer(thing, scene.size) for thing in scene.things)
        image, index = render(scene, layers)
        sample = cls(scene, torch.from_numpy(image), torch.from_numpy(index))
        sample.__dict__["layers"] = layers
        return sample

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer(thing, self.scene.size) for thing in self.scene.things)

    @cached_property
    def shapes(self) -> Int[Tensor, " n"]:
        """Places in ``CLASSES``."""
        return torch.tensor([CLASSES.index(t.shape) for t in self.scene.things], dtype=torch.int64)

    @cached_property
    def colours(self) -> Int[Tensor, " n"]:
        """Places in ``COLOURS``."""
        return torch.tensor([list(COLOURS).index(t.colour) for t in self.scene.things], dtype=torch.int64)

    @cached_property
    def patterns(self) -> Int[Tensor, " n"]:
        """Places in ``PATTERNS``."""
        return torch.tensor([PATTERNS.index(t.pattern.kind) for t in self.scene.things], dtype=torch.int64)

    @cached_property
    def large(self) -> Bool[Tensor, " n"]:
        return torch.tensor([self.scene.size_word(t) == "large" for t in self.scene.things], dtype=torch.bool)

    @cached_property
    def visible(self) -> Bool[Tensor, "n h w"]:
        """What is seen of each thing; with the background these masks partition the picture."""
        return self.index == torch.arange(1, len(self.scene.things) + 1).view(-1, 1, 1)

    @cached_property
    def amodal(self) -> Bool[Tensor, "n h w"]:
        """Each thing as if nothing hid it."""
        masks = [one.full(one.mask, self.scene.size) for one in self.layers]
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *self.scene.size, dtype=torch.bool)

    @cached_property
    def semantic(self) -> Int[Tensor, "h w"]:
        """1 + the place in ``CLASSES`` of the thing seen; 0 is the background."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.shapes + 1])[self.index]

    @cached_property
    def boxes(self) -> Float[Tensor, "n 4"]:
        """Tight around what is seen."""
        return tight_boxes(self.visible)

    @cached_property
    def amodal_boxes(self) -> Float[Tensor, "n 4"]:
        return tight_boxes(self.amodal)

    @cached_property
    def ellipses(self) -> Float[Tensor, "n 5"]:
        """(x, y, half long axis, half short axis, degrees) around the amodal masks."""
        return covering_ellipses(self.amodal)

    @cached_property
    def hidden(self) -> Int[Tensor, "n n"]:
        """[i, j]: how many pixels of thing j lie under thing i."""
        masks = self.amodal.flatten(1).float()
        return (masks @ masks.T).long().tril(-1)

    @cached_property
    def occludes(self) -> Bool[Tensor, "n n"]:
        """[i, j]: thing i hides pixels of thing j."""
        return self.hidden > 0

    @cached_property
    def visible_share(self) -> Float[Tensor, " n"]:
        """Seen pixels over amodal ones."""
        return self.visible.flatten(1).sum(1) / self.amodal.flatten(1).sum(1)

    @cached_property
    def depth(self) -> Float[Tensor, "h w"]:
        """Painter's depth: 1 at the background, 1 - k / (n + 1) at the k-th thing painted."""
        return 1 - self.index / (len(self.scene.things) + 1)

    @cached_property
    def parts(self) -> tuple[dict[str, Bool[Tensor, "h w"]], ...]:
        """What is seen of each part of each thing; the part ``whole`` where there is but one. They partition ``visible``."""
        found = []
        for thing, one, seen in zip(self.scene.things, self.layers, self.visible):
            left, masks = seen, {}
            for name, alpha in reversed(list(zip(thing.part_names, one.covers))):
                part = torch.from_numpy(one.full(alpha >= 0.5, self.scene.size)) & left
                masks[name], left = part, left & ~part
            found.append({name: masks[name] for name in thing.part_names})
        return tuple(found)

    @cached_property
    def boundaries(self) -> Bool[Tensor, "h w"]:
        """Pixels whose right or lower neighbour shows something else."""
        edge = torch.zeros_like(self.index, dtype=torch.bool)
        edge[:, :-1] |= self.index[:, :-1] != self.index[:, 1:]
        edge[:-1] |= self.index[:-1] != self.index[1:]
        return edge

    @cached_property
    def distance(self) -> Float[Tensor, "h w"]:
        """Pixels to the nearest visible boundary, from the outlines drawn four times finer; infinite without one."""
        fine = ShapesSample.of(self.scene.scaled(4))
        if not fine.boundaries.any():
            return torch.full(self.scene.size, float("inf"))
        far = ndimage.distance_transform_edt(~fine.boundaries.numpy())
        h, w = self.scene.size
        return torch.from_numpy(far.reshape(h, 4, w, 4)[:, 1:3, :, 1:3].mean((1, 3)) / 4).float()
