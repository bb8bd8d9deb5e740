"""NAT: a pyramid of four levels with neighbourhood attention at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.layers.vision.nat import NeighborhoodAttention
from regard.models.backbones._pyramid import (
    Block,
    Level,
    channels_first,
    channels_last,
    check_image,
    drop_rates,
    init_linear,
    maps_of,
)
from regard.nn.blocks import MLP


class _Tokenizer(nn.Module):
    """Two overlapping 3 x 3 convolutions of stride 2 with nothing in between, then a norm."""

    def __init__(self, image_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(image_channels, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b H W c"]:
        return self.norm(channels_last(self.proj(x)))


class _Downsampler(nn.Module):
    """A 3 x 3 convolution of stride 2 to twice the channels, then a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b Y X e"]:
        return self.norm(channels_last(self.reduction(channels_first(x))))


class NAT(nn.Module):
    r"""The Neighborhood Attention Transformer, an image classifier and backbone.

    Overlapping convolutions make tokens at a quarter of the resolution and halve it three times; every block is
    neighbourhood attention and an MLP with residuals.

    .. math:: x \leftarrow x + \gamma_1 \mathrm{NA}(\mathrm{norm}(x)), \qquad
        x \leftarrow x + \gamma_2 \mathrm{MLP}(\mathrm{norm}(x))

    Args:
        dim: channels of the first level; each level doubles them.
        num_heads: heads of each level.
        kernel_size: side of the neighbourhood.
        depths: blocks of each level.
        mlp_ratio: hidden channels of the MLPs over those of their level.
        layer_scale: initial :math:`\gamma`; None for none.
        dropout: of the attention weights, in training.
        drop_path: rate of stochastic depth of the last block, rising evenly from 0.
        image_channels: of the image.
        num_classes: size of the output.

    Shape: (b, image_channels, Y, X) -> (b, num_classes); :meth:`features` gives the map of every level, (b, c, H, W).

    Raises:
        ValueError: lists of different lengths, channels and heads that do not fit, an image of another shape.

    Cost: 2.7, 4.3, 7.8 and 13.7 GMACs at 224 x 224 for Mini, Tiny, Small and Base.

    Example:
        >>> import torch
        >>> model = nat_mini(dim=16, num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), num_classes=10)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 10])

    Differs: on a level smaller than the kernel the kernel is reduced; the official detection code pads. Parameters carry
    the official names, so that the official weights load.

    Reference: Ali Hassani, Steven Walton, Jiachen Li, Shen Li, Humphrey Shi, Neighborhood Attention Transformer, CVPR 2023,
    arXiv:2204.07143
    """

    def __init__(
        self,
        dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        *,
        depths: Sequence[int] = (3, 4, 18, 5),
        mlp_ratio: int | float = 3.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.2,
        image_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(num_heads):
            raise ValueError(f"depths={depths} and num_heads={num_heads} must have one number for each level")
        self.image_channels = image_channels
        self.patch_embed = _Tokenizer(image_channels, dim)
        self.levels = nn.ModuleList()
        for i, (heads, rates) in enumerate(zip(num_heads, drop_rates(drop_path, depths))):
            width = dim * 2**i
            blocks = [
                Block(
                    width,
                    NeighborhoodAttention(width, heads, kernel_size, dropout=dropout),
                    MLP(width, int(width * mlp_ratio)),
                    drop_path=rate,
                    layer_scale=layer_scale,
                )
                for rate in rates
            ]
            self.levels.append(Level(blocks, _Downsampler(width) if i + 1 < len(depths) else None))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.apply(init_linear)

    def features(self, image: Float[Tensor, "b k Y X"]) -> list[Float[Tensor, "_ _ _ _"]]:
        """The map after the blocks of every level, at strides 4, 8, 16 and 32."""
        check_image(image, self.image_channels)
        return maps_of(self.patch_embed(image), self.levels)

    def forward(self, image: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b classes"]:
        return self.head(self.norm(channels_last(self.features(image)[-1])).mean((1, 2)))


_SMALL = {"dim": 16, "num_heads": (1, 1, 2, 2), "kernel_size": 3, "depths": (1, 1, 1, 1), "num_classes": 10}


@method("nat-mini", kind="model", paper="nat", example=_SMALL)
def nat_mini(**options: Any) -> NAT:
    """NAT-Mini: 20.0 million parameters."""
    return NAT(**{"depths": (3, 4, 6, 5), **options})


@method("nat-tiny", kind="model", paper="nat", example=_SMALL)
def nat_tiny(**options: Any) -> NAT:
    """NAT-Tiny: 27.9 million parameters."""
    return NAT(**options)


_LARGE: dict[str, Any] = {"mlp_ratio": 2.0, "layer_scale": 1e-5}


@method("nat-small", kind="model", paper="nat", example=_SMALL)
def nat_small(**options: Any) -> NAT:
    """NAT-Small: 50.7 million parameters."""
    return NAT(**{"dim": 96, "num_heads": (3, 6, 12, 24), "drop_path": 0.3, **_LARGE, **options})


@method("nat-base", kind="model", paper="nat", example=_SMALL)
def nat_base(**options: Any) -> NAT:
    """NAT-Base: 89.8 million parameters."""
    return NAT(**{"dim": 128, "num_heads": (4, 8, 16, 32), "drop_path": 0.5, **_LARGE, **options})
