"""Pictures of one thing with the name of its shape, in memory, for classifiers."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.worlds.images import Images, statistics
from regard.worlds.shapes.scene import BACKGROUNDS, CLASSES, PATTERNS
from regard.worlds.shapes.world import Shapes
from regard.worlds.world import Split


def one_thing(size: int, seed: int = 0) -> Shapes:
    """The world of the pictures: one thing of any class, colour and pattern on any background."""
    return Shapes(
        size=size,
        things=(1, 1),
        composites=True,
        patterns=PATTERNS,
        backgrounds=BACKGROUNDS,
        sizes=(0.35, 0.6),
        seed=seed,
    )


def located_shapes(
    split: Split = "train", size: int = 48, count: int = 10_000, seed: int = 0
) -> tuple[Images, Bool[Tensor, "n h w"]]:
    """``count`` pictures of size x size pixels, normalised by the statistics of the first 500 to train on; where things are.

    Raises:
        ValueError: as :class:`Shapes` does.
    """
    world = replace(one_thing(size, seed), count=max(count, 500))
    pixels, shapes, places = [], [], []
    for sample in (replace(world, split=split)[i] for i in range(count)):
        pixels.append((255 * sample.image).round().byte())
        shapes.append(sample.shapes)
        places.append(sample.visible.any(0))
    first = torch.stack([(255 * world[i].image).round().byte() for i in range(500)])
    return Images(torch.stack(pixels), torch.cat(shapes), CLASSES, *statistics(first)), torch.stack(places)


def labelled_shapes(split: Split = "train", size: int = 48, count: int = 10_000, seed: int = 0) -> Images:
    """The pictures of :func:`located_shapes`."""
    return located_shapes(split, size, count, seed)[0]
