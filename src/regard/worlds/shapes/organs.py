"""Slices with soft organs of low contrast, a small target near one of them, and look-alikes elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from regard.worlds.shapes.show import paint
from regard.worlds.world import World

PLACES = ((0.32, 0.36), (0.68, 0.36), (0.34, 0.68), (0.66, 0.68))


@dataclass(frozen=True, eq=False)
class OrgansSample:
    """One slice.

    Args:
        image: (3, h, w), grey.
        organs: (h, w), 1 to 4 in the order upper left, upper right, lower left, lower right; 0 is elsewhere.
        target: (h, w), the small blob that touches the centre line between organs 1 and 3.
        lookalikes: (h, w), blobs like it in other places.
    """

    image: Float[Tensor, "3 h w"]
    organs: Int[Tensor, "h w"]
    target: Bool[Tensor, "h w"]
    lookalikes: Bool[Tensor, "h w"]


@dataclass(frozen=True, kw_only=True)
class Organs(World[OrgansSample]):
    """A body with four blobs ``r(angle) = r0 (1 + sum a_k cos(k angle + p_k))`` that hardly differ from their surroundings.

    The target differs from its look-alikes in nothing but its place: between organs 1 and 3.

    Args:
        size: side of the picture in pixels.
        contrast: of organs against the body.
        speckle: deviation of the multiplicative noise.
        lookalikes: how many.

    Raises:
        ValueError: a size below 48, negative contrast, speckle or number.
    """

    size: int = 96
    contrast: float = 0.12
    speckle: float = 0.08
    lookalikes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 48:
            raise ValueError(f"size={self.size} must be 48 pixels or more")
        if min(self.contrast, self.speckle, self.lookalikes) < 0:
            raise ValueError(
                f"contrast={self.contrast}, speckle={self.speckle} and lookalikes={self.lookalikes} must not be negative"
            )

    def make(self, rng: np.random.Generator) -> OrgansSample:
        n = self.size
        body = blob(rng, n, (0.5, 0.52), 0.43, 0.04)
        middle = rng.uniform(-0.03, 0.03, 2)
        organs = np.zeros((n, n), np.int64)
        grey = np.where(body, 0.45, 0.05)
        for number, place in enumerate(PLACES, 1):
            mask = blob(rng, n, np.array(place) + middle + rng.uniform(-0.03, 0.03, 2), rng.uniform(0.1, 0.13), 0.2)
            mask &= organs == 0
            organs[mask] = number
            grey = np.where(mask, 0.45 + self.contrast * (1 + 0.2 * rng.standard_normal()), grey)
        target = blob(rng, n, (0.33 + middle[0] + rng.uniform(-0.02, 0.02), 0.52 + middle[1]), 0.05, 0.1)
        others = np.zeros((n, n), bool)
        spots = np.array([(0.5, 0.2), (0.67, 0.52), (0.5, 0.52), (0.5, 0.82)])
        for i in rng.permutation(len(spots))[: self.lookalikes]:
            others |= blob(rng, n, spots[i] + middle + rng.uniform(-0.02, 0.02, 2), 0.05, 0.1)
        others &= ~target
        grey = np.where(target | others, 0.45 + 1.6 * self.contrast, grey)
        grey = ndimage.gaussian_filter(grey, n / 100) * (
            1 + self.speckle * ndimage.gaussian_filter(rng.standard_normal((n, n)), 0.7) / 0.4
        )
        image = torch.from_numpy(grey.clip(0, 1)).float().expand(3, -1, -1).clone()
        return OrgansSample(image, torch.from_numpy(organs), torch.from_numpy(target), torch.from_numpy(others))

    def panels(self, sample: OrgansSample) -> dict[str, Tensor | str]:
        """The slice, its organs, the target and what looks like it."""
        small = sample.target.long() + 2 * sample.lookalikes.long()
        return {"image": sample.image, "organs": paint(sample.organs), "target": paint(small)}


def blob(
    rng: np.random.Generator, side: int, centre: tuple[float, float] | np.ndarray, radius: float, wobble: float
) -> Bool[np.ndarray, "h w"]:
    """A round thing with an uneven rim; centre (x, y) and radius in sides of the picture."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    angle = np.arctan2(y - centre[1], x - centre[0])
    rim = 1 + sum(wobble / k * rng.uniform(0.3, 1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return np.hypot(x - centre[0], y - centre[1]) < radius * rim
