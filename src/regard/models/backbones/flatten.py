"""FLatten-Swin and FLatten-PVT: two pyramids with focused linear attention in place of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.layers.vision._grid import pad_map, to_map
from regard.layers.vision.flatten import FocusedLinearAttention
from regard.layers.vision.maxvit import RelativeAttention
from regard.models.backbones._pyramid import (
    Block,
    Level,
    PatchEmbedding,
    channels_first,
    channels_last,
    check_image,
    drop_rates,
    init_linear,
    maps_of,
)
from regard.nn.blocks import MLP
from regard.ops.windows import crop, partition, shift, shift_mask, unpartition, unshift


class ShiftedWindowAttention(nn.Module):
    """Attention in windows of a map that has been rolled, with a learned bias of offsets: the host's own in Swin.

    Args:
        dim: channels in and out.
        num_heads: heads.
        window_size: side of a window.
        shift: tokens that the windows are moved by, where the map is larger than one window.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int) -> None:
        super().__init__()
        if not 0 <= shift < window_size:
            raise ValueError(f"shift={shift} must be at least 0 and below window_size={window_size}")
        self.dim, self.shift = dim, shift
        self.attn = RelativeAttention(dim, num_heads, window_size)

    def forward(self, x: Float[Tensor, "b n c"], *, grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        image, _ = to_map(x, grid, None, self.dim)
        size = self.attn.window_size
        padded, valid = pad_map(image, None, size)
        sides = padded.shape[1:3]
        by = self.shift if min(sides) > size else 0
        mask = None
        if by:
            mask = shift_mask(sides, size, by, x.device).repeat(len(x), 1, 1)
        if valid is not None:
            real = partition(shift(valid[..., None], by), size)[:, None, :, 0]
            mask = real if mask is None else mask & real
        out = unpartition(self.attn(partition(shift(padded, by), size), mask), size, sides)
        return crop(unshift(out, by), grid).flatten(1, 2)


class _Merging(nn.Module):
    """2 x 2 tokens, side by side, to twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b Y X e"]:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class FLattenSwin(nn.Module):
    r"""Swin with focused linear attention over the whole map on its first levels, an image classifier and backbone.

    Linear cost makes a global view affordable where maps are large; on small maps the host's windows stay.

    .. math:: x \leftarrow x + \mathrm{FLA}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{norm}(x))

    Args:
        dim: channels of the first level; each level doubles them.
        num_heads: heads of each level.
        window_size: side of the shifted windows on the levels that keep them.
        depths: blocks of each level.
        linear_levels: first levels with focused linear attention.
        image_size: height and width of the images that the tables of positions are made for.
        power: the focusing factor.
        mlp_ratio: hidden channels of the MLPs over those of their level.
        drop_path: rate of stochastic depth of the last block, rising evenly from 0.
        image_channels: of the image.
        num_classes: size of the output.

    Shape: (b, image_channels, Y, X) -> (b, num_classes); :meth:`features` gives the map of every level, (b, c, H, W).

    Raises:
        ValueError: lists of different lengths, channels and heads that do not fit, an image of another shape.

    Cost: 4.5, 8.7 and 15.4 GMACs at 224 x 224 for Tiny, Small and Base.

    Example:
        >>> sizes = dict(dim=16, num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), window_size=2)
        >>> flatten_swin_tiny(**sizes, num_classes=10)(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 10])

    Differs: images of another size than ``image_size`` are allowed, positions are interpolated, maps that a window does
    not divide are padded and masked. The biases of the windows are a table (h, 2 P - 1, 2 P - 1) of key minus query.

    Reference: Dongchen Han, Xuran Pan, Yizeng Han, Shiji Song, Gao Huang, FLatten Transformer: Vision Transformer using
    Focused Linear Attention, ICCV 2023, arXiv:2308.00442
    """

    def __init__(
        self,
        dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        linear_levels: int = 2,
        image_size: tuple[int, int] = (224, 224),
        power: int | float = 3,
        mlp_ratio: int | float = 4.0,
        drop_path: float = 0.2,
        image_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(num_heads):
            raise ValueError(f"depths={depths} and num_heads={num_heads} must have one number for each level")
        if not 0 <= linear_levels <= len(depths):
            raise ValueError(f"linear_levels={linear_levels} must be between 0 and {len(depths)}")
        self.image_channels = image_channels
        self.patch_embed, self.layers = PatchEmbedding(image_channels, dim, 4), nn.ModuleList()
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width, size = dim * 2**i, (image_size[0] // 2 ** (i + 2), image_size[1] // 2 ** (i + 2))
            blocks = []
            for j, rate in enumerate(rates):
                mixer: nn.Module = (
                    FocusedLinearAttention(width, num_heads[i], size, power=power)
                    if i < linear_levels
                    else ShiftedWindowAttention(width, num_heads[i], window_size, j % 2 * (window_size // 2))
                )
                blocks.append(Block(width, mixer, MLP(width, int(width * mlp_ratio)), drop_path=rate))
            self.layers.append(Level(blocks, _Merging(width) if i + 1 < len(depths) else None))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.apply(init_linear)

    def features(self, image: Float[Tensor, "b k Y X"]) -> list[Float[Tensor, "_ _ _ _"]]:
        """The map after the blocks of every level, at strides 4, 8, 16 and 32."""
        check_image(image, self.image_channels)
        return maps_of(self.patch_embed(image), self.layers)

    def forward(self, image: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b classes"]:
        return self.head(self.norm(channels_last(self.features(image)[-1])).mean((1, 2)))


class FLattenPVT(nn.Module):
    """The Pyramid Vision Transformer with focused linear attention on every level, an image classifier and backbone.

    PVT reduces keys to afford a global view; here nothing is reduced.

    Args:
        dim: channels of each level.
        num_heads: heads of each level.
        depths: blocks of each level.
        mlp_ratio: hidden channels of the MLPs over those of their level, on each level.
        image_size: height and width of the images that the tables of positions are made for.
        power: the focusing factor.
        drop_path: rate of stochastic depth of the last block, rising evenly from 0.
        image_channels: of the image.
        num_classes: size of the output.

    Shape: (b, image_channels, Y, X) -> (b, num_classes); :meth:`features` gives the map of every level, (b, c, H, W).

    Raises:
        ValueError: lists of different lengths, channels and heads that do not fit, an image of another shape.

    Differs: the last norm of the official network, which nothing reads, is left out.
    """

    def __init__(
        self,
        dim: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        mlp_ratio: Sequence[int | float] = (8, 8, 4, 4),
        image_size: tuple[int, int] = (224, 224),
        power: int | float = 3,
        drop_path: float = 0.1,
        image_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not depths or len({len(depths), len(dim), len(num_heads), len(mlp_ratio)}) > 1:
            raise ValueError(
                f"dim={dim}, num_heads={num_heads}, depths={depths} and mlp_ratio={mlp_ratio} must have one number for each level"
            )
        self.image_channels = image_channels
        self.patch_embeds, self.pos_embeds, self.blocks = nn.ModuleList(), nn.ParameterList(), nn.ModuleList()
        before = image_channels
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            size = (image_size[0] // 2 ** (i + 2), image_size[1] // 2 ** (i + 2))
            self.patch_embeds.append(PatchEmbedding(before, dim[i], 2 if i else 4))
            self.pos_embeds.append(nn.init.trunc_normal_(torch.empty(1, *size, dim[i]), std=0.02))
            blocks = [
                Block(
                    dim[i],
                    FocusedLinearAttention(dim[i], num_heads[i], size, power=power),
                    MLP(dim[i], int(dim[i] * mlp_ratio[i])),
                    drop_path=rate,
                    eps=1e-6,
                )
                for rate in rates
            ]
            self.blocks.append(nn.Sequential(*blocks))
            before = dim[i]
        self.head = nn.Linear(before, num_classes)
        self.apply(init_linear)

    def features(self, image: Float[Tensor, "b k Y X"]) -> list[Float[Tensor, "_ _ _ _"]]:
        """The map after the blocks of every level, at strides 4, 8, 16 and 32."""
        check_image(image, self.image_channels)
        x, maps = image, []
        for embed, position, blocks in zip(self.patch_embeds, self.pos_embeds, self.blocks):
            tokens = embed(x)
            if tokens.shape[1:3] != position.shape[1:3]:
                table = F.interpolate(channels_first(position), size=tokens.shape[1:3], mode="bilinear")
                position = channels_last(table)
            x = channels_first(blocks(tokens + position))
            maps.append(x)
        return maps

    def forward(self, image: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b classes"]:
        return self.head(self.features(image)[-1].mean((2, 3)))


_SMALL: dict[str, Any] = {"num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "image_size": (32, 32), "num_classes": 10}
_SMALL_SWIN = {"dim": 16, "window_size": 2, **_SMALL}
_SMALL_PVT = {"dim": (8, 16, 16, 32), **_SMALL}


@method("flatten-swin-tiny", kind="model", paper="flatten", example=_SMALL_SWIN)
def flatten_swin_tiny(**options: Any) -> FLattenSwin:
    """FLatten-Swin-T: 29.2 million parameters."""
    return FLattenSwin(**options)


@method("flatten-swin-small", kind="model", paper="flatten", example=_SMALL_SWIN)
def flatten_swin_small(**options: Any) -> FLattenSwin:
    """FLatten-Swin-S: 50.5 million parameters."""
    return FLattenSwin(**{"depths": (2, 2, 18, 2), "drop_path": 0.3, **options})


@method("flatten-swin-base", kind="model", paper="flatten", example=_SMALL_SWIN)
def flatten_swin_base(**options: Any) -> FLattenSwin:
    """FLatten-Swin-B: 89.0 million parameters."""
    sizes = {"dim": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2), "drop_path": 0.5}
    return FLattenSwin(**{**sizes, **options})


@method("flatten-pvt-tiny", kind="model", paper="flatten", example=_SMALL_PVT)
def flatten_pvt_tiny(**options: Any) -> FLattenPVT:
    """FLatten-PVT-T: 12.2 million parameters."""
    return FLattenPVT(**options)


@method("flatten-pvt-small", kind="model", paper="flatten", example=_SMALL_PVT)
def flatten_pvt_small(**options: Any) -> FLattenPVT:
    """FLatten-PVT-S: 21.7 million parameters."""
    return FLattenPVT(**{"depths": (3, 4, 6, 3), **options})


@method("flatten-pvt-medium", kind="model", paper="flatten", example=_SMALL_PVT)
def flatten_pvt_medium(**options: Any) -> FLattenPVT:
    """FLatten-PVT-M: 37.2 million parameters."""
    return FLattenPVT(**{"depths": (3, 4, 18, 3), "drop_path": 0.3, **options})


@method("flatten-pvt-large", kind="model", paper="flatten", example=_SMALL_PVT)
def flatten_pvt_large(**options: Any) -> FLattenPVT:
    """FLatten-PVT-L: 50.7 million parameters."""
    return FLattenPVT(**{"depths": (3, 8, 27, 3), "drop_path": 0.3, **options})
