"""MaxViT: convolution, attention in windows and attention over grids, in every block of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.vision.maxvit import BlockAttention, GridAttention, RelativeAttention
from regard.models.backbones._pyramid import channels_first, channels_last, check_image, drop_rates
from regard.nn.blocks import DropPath


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution whose output has ceil(side / stride) tokens, padded at the end first."""

    def __init__(self, dim: int, out: int, stride: int, *, groups: int = 1, bias: bool = False) -> None:
        super().__init__(dim, out, 3, stride=stride, groups=groups, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        missing = [max(0, (-(-n // s) - 1) * s + 3 - n) for n, s in zip(input.shape[:1:-1], self.stride)]
        return super().forward(F.pad(input, [side for m in missing for side in (m // 2, m - m // 2)]))


class SqueezeExcitation(nn.Module):
    """A gate of every channel from the means of all of them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class _Shortcut(nn.Module):
    """The shortcut of a block that halves the sides: means of 2 x 2 pixels, widened where channels grow."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b o Y X"]:
        return self.expand(F.avg_pool2d(x, 2))


class MBConv(nn.Module):
    """The inverted bottleneck with a norm before it: widen fourfold, convolve depthwise, gate channels, narrow.

    Args:
        dim: channels in.
        out: channels out.
        stride: of the depthwise convolution; 2 halves the sides.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, out: int, stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = 4 * out
        self.shortcut = _Shortcut(dim, out) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(dim, 1e-3)
        self.conv1_1x1, self.norm1 = nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden, 1e-3)
        self.conv2_kxk = Convolution(hidden, hidden, stride, groups=hidden)
        self.norm2 = nn.BatchNorm2d(hidden, 1e-3)
        self.se, self.conv3_1x1 = SqueezeExcitation(hidden, out // 4), nn.Conv2d(hidden, out, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b o Y X"]:
        y = _gelu(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = self.se(_gelu(self.norm2(self.conv2_kxk(y))))
        return self.shortcut(x) + self.drop_path(self.conv3_1x1(y))


class MaxViTBlock(nn.Module):
    """MBConv, attention in windows, attention over grids; on channel-first maps.

    Args:
        dim: channels in.
        out: channels out.
        stride: 2 halves the sides.
        num_heads: heads of both attentions.
        window_size: side of the windows and of the grids.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, dim: int, out: int, stride: int, num_heads: int, window_size: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = MBConv(dim, out, stride, drop_path)
        options: dict[str, Any] = {"drop_path": drop_path, "approximate": "tanh"}
        self.attn_block = BlockAttention(out, num_heads, window_size, **options)
        self.attn_grid = GridAttention(out, num_heads, window_size, **options)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b o Y X"]:
        return channels_first(self.attn_grid(self.attn_block(channels_last(self.conv(x)))))


class _Stem(nn.Module):
    def __init__(self, image_channels: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = Convolution(image_channels, dim, 2, bias=True), nn.BatchNorm2d(dim, 1e-3)
        self.conv2 = Convolution(dim, dim, 1, bias=True)

    def forward(self, x: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b c H W"]:
        return self.conv2(_gelu(self.norm1(self.conv1(x))))


class _Stage(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b o Y X"]:
        return self.blocks(x)


class MaxViT(nn.Module):
    r"""The Multi-Axis Vision Transformer, an image classifier and backbone with global reach on every level.

    .. math:: x \leftarrow \mathrm{MBConv}(x), \qquad x \leftarrow \mathrm{BlockAttention}(x), \qquad
        x \leftarrow \mathrm{GridAttention}(x)

    Args:
        dim: channels of each level.
        head_dim: channels of a head.
        window_size: side of the windows and of the grids; the paper's is a 32nd of the image's.
        depths: blocks of each level; the first of each halves the sides.
        stem: channels of the stem.
        drop_path: rate of stochastic depth of the last block, rising evenly from 0.
        image_channels: of the image.
        num_classes: size of the output.

    Shape: (b, image_channels, Y, X) -> (b, num_classes), both sides multiples of 32; :meth:`features` gives the map of
    every level, (b, c, H, W).

    Raises:
        ValueError: lists of different lengths, channels and heads that do not fit, an image of another shape.

    Cost: 5.6, 11.6, 23.9 and 43.5 GMACs at 224 x 224 for Tiny, Small, Base and Large.

    Example:
        >>> model = maxvit_tiny(dim=(16, 32), head_dim=8, depths=(1, 1), stem=8, window_size=4, num_classes=10)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 10])

    Differs: sides that the window does not divide are padded and masked instead of being refused. :func:`timm_names` turns
    the names of timm's ``maxvit_*_tf_*`` into those here; :meth:`resize` fits trained weights to another image size.

    Reference: Zhengzhong Tu, Hossein Talebi, Han Zhang, Feng Yang, Peyman Milanfar, Alan Bovik, Yinxiao Li, MaxViT:
    Multi-Axis Vision Transformer, ECCV 2022, arXiv:2204.01697
    """

    def __init__(
        self,
        dim: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        window_size: int = 7,
        *,
        depths: Sequence[int] = (2, 2, 5, 2),
        stem: int = 64,
        drop_path: float = 0.2,
        image_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(dim):
            raise ValueError(f"depths={depths} and dim={dim} must have one number for each level")
        if head_dim < 1 or any(width % head_dim for width in dim):
            raise ValueError(f"dim={dim} must be multiples of head_dim={head_dim}")
        self.image_channels = image_channels
        self.stem, self.stages = _Stem(image_channels, stem), nn.ModuleList()
        before = stem
        for width, rates in zip(dim, drop_rates(drop_path, depths)):
            sizes = [(before, width, 2)] + [(width, width, 1)] * (len(rates) - 1)
            blocks = [MaxViTBlock(*size, width // head_dim, window_size, rate) for size, rate in zip(sizes, rates)]
            self.stages.append(_Stage(blocks))
            before = width
        self.norm, self.hidden, self.head = (
            nn.LayerNorm(before),
            nn.Linear(before, before),
            nn.Linear(before, num_classes),
        )
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def resize(self, window_size: int) -> None:
        """Change the side of windows and grids, interpolating the biases: for images of another size."""
        for module in self.modules():
            if isinstance(module, RelativeAttention):
                module.resize(window_size)

    def features(self, image: Float[Tensor, "b k Y X"]) -> list[Float[Tensor, "_ _ _ _"]]:
        """The map after the blocks of every level, at strides 4, 8, 16 and 32."""
        check_image(image, self.image_channels)
        multiple = 2 ** (len(self.stages) + 1)
        if any(side % multiple for side in image.shape[2:]):
            raise ValueError(f"image must have sides that are multiples of {multiple}; got {tuple(image.shape[2:])}")
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, image: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b classes"]:
        return self.head(torch.tanh(self.hidden(self.norm(self.features(image)[-1].mean((2, 3))))))


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of timm's network under the names of this one."""
    new = {"head.norm.": "norm.", "head.pre_logits.fc.": "hidden.", "head.fc.": "head."}
    new["rel_pos.relative_position_bias_table"] = "table"
    found = {}
    for name, value in state.items():
        for old, ours in new.items():
            name = name.replace(old, ours)
        found[name] = value
    return found


_SMALL = {"dim": (16, 32), "head_dim": 8, "window_size": 2, "depths": (1, 1), "stem": 8, "num_classes": 10}


@method("maxvit-tiny", kind="model", paper="maxvit", tags=Tags(multiple=32), example=_SMALL)
def maxvit_tiny(**options: Any) -> MaxViT:
    """MaxViT-T: 30.9 million parameters."""
    return MaxViT(**options)


@method("maxvit-small", kind="model", paper="maxvit", tags=Tags(multiple=32), example=_SMALL)
def maxvit_small(**options: Any) -> MaxViT:
    """MaxViT-S: 68.9 million parameters."""
    return MaxViT(**{"dim": (96, 192, 384, 768), "drop_path": 0.3, **options})


@method("maxvit-base", kind="model", paper="maxvit", tags=Tags(multiple=32), example=_SMALL)
def maxvit_base(**options: Any) -> MaxViT:
    """MaxViT-B: 119.5 million parameters."""
    return MaxViT(**{"dim": (96, 192, 384, 768), "depths": (2, 6, 14, 2), "drop_path": 0.4, **options})


@method("maxvit-large", kind="model", paper="maxvit", tags=Tags(multiple=32), example=_SMALL)
def maxvit_large(**options: Any) -> MaxViT:
    """MaxViT-L: 211.8 million parameters."""
    sizes = {"dim": (128, 256, 512, 1024), "depths": (2, 6, 14, 2), "stem": 128, "drop_path": 0.6}
    return MaxViT(**{**sizes, **options})
