"""BiFormer: a pyramid whose tokens attend to chosen regions, and to everything on the last level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.layers.vision._grid import to_map
from regard.layers.vision.biformer import BiLevelRoutingAttention
from regard.models.backbones._pyramid import Block, channels_first, channels_last, check_image, drop_rates, init_linear
from regard.nn.blocks import MLP
from regard.ops.attend import attend

LAST_HEADS = 8  # of the last level, whatever its width


class EnhancedAttention(nn.Module):
    r"""Plain attention plus a depthwise convolution of its input, on tokens of a grid: the mixer of the last level.

    .. math:: y = O\big(\mathrm{softmax}(q k^\top / \sqrt d)\, v + \mathrm{DWConv}(x)\big)

    Args:
        dim: channels in and out.
        num_heads: heads.
        kernel_size: of the convolution, odd.
    """

    def __init__(self, dim: int, num_heads: int = LAST_HEADS, kernel_size: int = 5) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"], *, grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        image, _ = to_map(x, grid, None, self.dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        local = self.lepe(channels_first(image)).flatten(2).transpose(1, 2)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2) + local)


class _Block(nn.Module):
    """A depthwise convolution that tells positions, then the usual block; on channel-first maps."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: int | float, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.block = Block(dim, mixer, MLP(dim, int(dim * mlp_ratio)), drop_path=drop_path, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return channels_first(self.block(channels_last(x + self.pos_embed(x))))


def _halved(dim: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out, 3, stride=2, padding=1), nn.BatchNorm2d(out)]


class BiFormer(nn.Module):
    r"""A vision transformer with bi-level routing attention, an image classifier and backbone.

    Three levels attend to the regions they choose (1, 4, 16 of 49, so that a query has 64 keys on each at 224 x 224), the
    last to everything.

    .. math:: x \leftarrow x + \mathrm{DWConv}(x), \qquad x \leftarrow x + \mathrm{BRA}(\mathrm{norm}(x)), \qquad
        x \leftarrow x + \mathrm{MLP}(\mathrm{norm}(x))

    Args:
        dim: channels of the first level; each level doubles them.
        head_dim: channels of a head of bi-level routing attention; the last level always has 8 heads.
        regions: regions along each side.
        topk: regions that each region attends to, on each level but the last.
        depths: blocks of each level.
        mlp_ratio: hidden channels of the MLPs over those of their level.
        drop_path: rate of stochastic depth of the last block, rising evenly from 0.
        image_channels: of the image.
        num_classes: size of the output.

    Shape: (b, image_channels, Y, X) -> (b, num_classes); :meth:`features` gives the map of every level, (b, c, H, W).

    Raises:
        ValueError: lists of different lengths, channels and heads that do not fit, an image of another shape.

    Cost: 2.2, 4.5 and 9.8 GMACs at 224 x 224 for Tiny, Small and Base.

    Example:
        >>> import torch
        >>> model = biformer_tiny(dim=16, depths=(1, 1, 1, 1), regions=2, topk=(1, 1, 2), head_dim=8, num_classes=10)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 10])

    Differs: levels that ``regions`` does not divide are padded with a mask instead of being refused. :func:`official_names`
    turns an official checkpoint's names into those here.

    Reference: Lei Zhu, Xinjiang Wang, Zhanghan Ke, Wayne Zhang, Rynson Lau, BiFormer: Vision Transformer with Bi-Level
    Routing Attention, CVPR 2023, arXiv:2303.08810
    """

    def __init__(
        self,
        dim: int = 64,
        head_dim: int = 32,
        *,
        regions: int = 7,
        topk: Sequence[int] = (1, 4, 16),
        depths: Sequence[int] = (2, 2, 8, 2),
        mlp_ratio: int | float = 3.0,
        drop_path: float = 0.1,
        image_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(topk) + 1:
            raise ValueError(f"depths={depths} must have a number for each of topk={topk} and one for the last level")
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"dim={dim} must be a multiple of head_dim={head_dim}")
        self.image_channels = image_channels
        stem = nn.Sequential(*_halved(image_channels, dim // 2), nn.GELU(), *_halved(dim // 2, dim))
        self.downsample_layers, self.stages = nn.ModuleList([stem]), nn.ModuleList()
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = dim * 2**i
            if i:
                self.downsample_layers.append(nn.Sequential(*_halved(width // 2, width)))
            mixers = [
                BiLevelRoutingAttention(width, width // head_dim, regions, topk[i])
                if i < len(topk)
                else EnhancedAttention(width)
                for _ in rates
            ]
            self.stages.append(nn.Sequential(*(_Block(width, m, mlp_ratio, rate) for m, rate in zip(mixers, rates))))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, num_classes)
        self.apply(init_linear)

    def features(self, image: Float[Tensor, "b k Y X"]) -> list[Float[Tensor, "_ _ _ _"]]:
        """The map after the blocks of every level, at strides 4, 8, 16 and 32."""
        check_image(image, self.image_channels)
        maps, x = [], image
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward(self, image: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b classes"]:
        return self.head(self.norm(self.features(image)[-1]).mean((2, 3)))


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the official network under the names of this one."""
    found = {}
    for name, value in state.items():
        name = name.replace("qkv.qkv.", "qkv.").replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        head, _, rest = name.partition(".")
        stage, block, part = rest.split(".", 2) if head == "stages" else ("", "", "")
        inner = head == "stages" and not part.startswith("pos_embed")
        found[f"stages.{stage}.{block}.block.{part}" if inner else name] = value
    return found


_SMALL = {"dim": 16, "head_dim": 8, "regions": 2, "topk": (1, 1, 2), "depths": (1, 1, 1, 1), "num_classes": 10}


@method("biformer-tiny", kind="model", paper="biformer", example=_SMALL)
def biformer_tiny(**options: Any) -> BiFormer:
    """BiFormer-T: 13.1 million parameters."""
    return BiFormer(**options)


@method("biformer-small", kind="model", paper="biformer", example=_SMALL)
def biformer_small(**options: Any) -> BiFormer:
    """BiFormer-S: 25.5 million parameters."""
    return BiFormer(**{"depths": (4, 4, 18, 4), "drop_path": 0.15, **options})


@method("biformer-base", kind="model", paper="biformer", example=_SMALL)
def biformer_base(**options: Any) -> BiFormer:
    """BiFormer-B: 56.8 million parameters."""
    return BiFormer(**{"dim": 96, "depths": (4, 4, 18, 4), "drop_path": 0.4, **options})
