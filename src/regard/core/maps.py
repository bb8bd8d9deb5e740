"""What an explainer gives: a value for every place of a grid, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Map:
    """``values`` (b, H, W), or (b, n) for tokens that lie on no grid; ``image`` (b, c, H', W') is what was explained, if any."""

    values: Tensor
    image: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim not in (2, 3):
            raise ValueError(f"values must be (b, n) or (b, H, W); got {tuple(self.values.shape)}")

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def normalized(self) -> Map:
        """Each item stretched to 0..1; a constant item becomes 0."""
        flat = self.values.flatten(1)
        low, high = flat.min(1, keepdim=True).values, flat.max(1, keepdim=True).values
        span = high - low
        scaled = torch.where(span > 0, (flat - low) / span.clamp_min(torch.finfo(flat.dtype).tiny), 0.0)
        return Map(scaled.view_as(self.values), self.image)

    def upsample(self, size: int | tuple[int, int]) -> Map:
        """Bilinear interpolation to ``size`` pixels. Raises ValueError for tokens that lie on no grid."""
        if self.values.ndim != 3:
            raise ValueError(f"only a map on a grid can be upsampled; this one has {self.grid[0]} tokens in a row")
        size = (size, size) if isinstance(size, int) else size
        bigger = F.interpolate(self.values[:, None].float(), size, mode="bilinear", align_corners=False)
        return Map(bigger[:, 0], self.image)

    def overlay(self, image: Tensor | None = None, *, item: int = 0, alpha: float = 0.5) -> Tensor:
        """(H, W, 3) in 0..1: the map in colour over the image, both stretched to their own range."""
        image = self.image if image is None else image
        if image is None:
            raise ValueError("overlay() needs the image that was explained")
        from matplotlib import colormaps

        size = (int(image.shape[-2]), int(image.shape[-1]))
        heat = self.upsample(size).normalized().values[item]
        picture = image[item].float()
        picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp_min(1e-12)
        picture = picture.expand(3, *size).permute(1, 2, 0)
        colour = torch.from_numpy(colormaps["inferno"](heat.numpy(force=True))[..., :3]).float()
        return (1 - alpha) * picture.cpu() + alpha * colour

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the overlay (or the bare map, where there is no image) as a PNG."""
        from PIL import Image

        path = Path(path)
        if self.image is not None:
            picture = self.overlay(**options)
        else:
            picture = self.normalized().values[options.get("item", 0)]
            picture = picture if picture.ndim == 2 else picture[None]
        temporary = path.with_name(path.name + ".part")
        Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy(force=True)).save(temporary, format="PNG")
        temporary.replace(path)
        return path
