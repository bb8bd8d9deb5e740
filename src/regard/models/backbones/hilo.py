"""LITv2: a pyramid of convolutional MLPs, then HiLo attention, then plain attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.layers.vision.hilo import HiLoAttention
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
from regard.nn.blocks import DropPath
from regard.ops.positions import grid_positions


class ConvolutionalMLP(nn.Module):
    """Linear, depthwise 3 x 3 convolution, GELU, linear, on maps; the convolution says where a token stands."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        nn.init.normal_(self.dwconv.weight, std=(2 / 9) ** 0.5)
        assert self.dwconv.bias is not None
        nn.init.zeros_(self.dwconv.bias)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        return self.fc2(F.gelu(channels_last(self.dwconv(channels_first(self.fc1(x))))))


class _MLPBlock(nn.Module):
    """The block of the first levels, without attention."""

    def __init__(self, dim: int, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm2, self.mlp, self.drop_path = nn.LayerNorm(dim), mlp, DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeformableConvolution(nn.Module):
    r"""A 2 x 2 convolution of stride 2 whose four samples move by offsets that another convolution reads off the map.

    .. math:: y(p) = b + \sum_{k=1}^{4} W_k\, x\big(2 p + r_k + \Delta_k(p)\big)

    with bilinear interpolation and zero outside. The offsets begin at zero, where it is an ordinary convolution; the paper
    trains them at a hundredth of the learning rate.

    Args:
        dim: channels in.
        out: channels out.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        plain = nn.Conv2d(dim, out, 2)
        assert plain.bias is not None
        self.weight, self.bias = plain.weight, plain.bias
        self.conv_offset = nn.Conv2d(dim, 8, 2, stride=2)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b o Y X"]:
        offset = self.conv_offset(x).unflatten(1, (4, 2)).permute(0, 3, 4, 1, 2)  # (b, Y, X, 4, 2), (y, x)
        rows, columns = offset.shape[1:3]
        corner = grid_positions((rows, columns), x.device).view(rows, columns, 1, 2) * 2
        at = corner + grid_positions((2, 2), x.device) + offset
        side = torch.tensor(x.shape[2:], device=x.device)
        place = ((2 * at + 1) / side - 1).flip(-1).flatten(2, 3)  # grid_sample has x first, pixels from -1 to 1
        samples = F.grid_sample(x, place.to(x.dtype), align_corners=False).unflatten(3, (columns, 4))
        return torch.einsum("bcyxk,ock->boyx", samples, self.weight.flatten(2)) + self.bias[:, None, None]


class _Merging(nn.Module):
    """Halves the sides and doubles the channels: deformable convolution, batch norm, GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dconv, self.norm_layer = DeformableConvolution(dim, 2 * dim), nn.BatchNorm2d(2 * dim)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b Y X e"]:
        return channels_last(F.gelu(self.norm_layer(self.dconv(channels_first(x)))))


class LITv2(nn.Module):
    r"""The second Less Attention Vision Transformer, an image classifier and backbone chosen by measured speed.

    The first two levels have no attention, only convolutional MLPs; the third has HiLo attention, the fourth plain
    attention (HiLo with windows of one token). Tokens are merged by deformable convolutions. No position is learned.

    .. math:: x \leftarrow x + \mathrm{HiLo}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{ConvMLP}(\mathrm{norm}(x))

    Args:
        dim: channels of the first level; each level doubles them.
        num_heads: heads of each level.
        window_size: side of the windows of each level; 0 for a level without attention.
        depths: blocks of each level.
        alpha: share of the heads that look at the means of the windows.
        mlp_ratio: hidden channels of the MLPs over those of their level.
        drop_path: rate of stochastic depth of the last block, rising evenly from 0.
        image_channels: of the image.
        num_classes: size of the output.

    Shape: (b, image_channels, Y, X) -> (b, num_classes), both sides at least 32; :meth:`features` gives the map of every
    level, (b, c, H, W).

    Raises:
        ValueError: lists of different lengths, channels and heads that do not fit, an image of another shape.

    Cost: 3.7, 7.5 and 13.2 GMACs at 224 x 224 for S, M and B.

    Example:
        >>> model = litv2_small(dim=16, num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), num_classes=10)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 10])

    Differs: the slower learning rate of the offsets is left to the optimiser. Odd sides are allowed; merging drops their
    last row, as a convolution does. Parameters carry the official names, but for ``mlp.dwconv``, which is
    ``mlp.dwconv.dwconv`` there.

    Reference: Zizheng Pan, Jianfei Cai, Bohan Zhuang, Fast Vision Transformers with HiLo Attention, NeurIPS 2022,
    arXiv:2205.13213
    """

    def __init__(
        self,
        dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] = (0, 0, 2, 1),
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        alpha: int | float = 0.9,
        mlp_ratio: int | float = 4.0,
        drop_path: float = 0.2,
        image_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not depths or len({len(depths), len(num_heads), len(window_size)}) > 1:
            raise ValueError(
                f"depths={depths}, num_heads={num_heads} and window_size={window_size} must have one number for each level"
            )
        self.image_channels = image_channels
        self.patch_embed = PatchEmbedding(image_channels, dim, 4)
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = dim * 2**i
            blocks: list[nn.Module] = []
            for rate in rates:
                mlp = ConvolutionalMLP(width, int(width * mlp_ratio))
                if window_size[i] == 0:
                    blocks.append(_MLPBlock(width, mlp, rate))
                else:
                    mixer = HiLoAttention(width, num_heads[i], window_size[i], alpha=alpha, bias=True)
                    blocks.append(Block(width, mixer, mlp, drop_path=rate))
            self.layers.append(Level(blocks, _Merging(width) if i + 1 < len(depths) else None))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.apply(init_linear)

    def features(self, image: Float[Tensor, "b k Y X"]) -> list[Float[Tensor, "_ _ _ _"]]:
        """The map after the blocks of every level, at strides 4, 8, 16 and 32."""
        check_image(image, self.image_channels)
        return maps_of(self.patch_embed(image), self.layers)

    def forward(self, image: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b classes"]:
        return self.head(self.norm(channels_last(self.features(image)[-1])).mean((1, 2)))


_SMALL = {"dim": 16, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 10}


@method("hilo-litv2-small", kind="model", paper="hilo", example=_SMALL)
def litv2_small(**options: Any) -> LITv2:
    """LITv2-S: 27.8 million parameters."""
    return LITv2(**options)


@method("hilo-litv2-medium", kind="model", paper="hilo", example=_SMALL)
def litv2_medium(**options: Any) -> LITv2:
    """LITv2-M: 48.8 million parameters."""
    return LITv2(**{"depths": (2, 2, 18, 2), "drop_path": 0.3, **options})


@method("hilo-litv2-base", kind="model", paper="hilo", example=_SMALL)
def litv2_base(**options: Any) -> LITv2:
    """LITv2-B: 86.5 million parameters."""
    return LITv2(**{"dim": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2), "drop_path": 0.5, **options})
