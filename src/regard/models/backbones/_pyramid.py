"""What the pyramids in this folder share: a block on maps, rates of stochastic depth, initial weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.nn.blocks import DropPath


def mixed(layer: nn.Module, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
    """A layer for tokens, on a map."""
    grid = (x.shape[1], x.shape[2])
    return layer(x.flatten(1, 2), grid=grid).unflatten(1, grid)


def channels_first(x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b c H W"]:
    return x.permute(0, 3, 1, 2)


def channels_last(x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b H W c"]:
    return x.permute(0, 2, 3, 1)


def drop_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth that rise evenly from 0 in the first block to ``rate`` in the last, stage by stage."""
    total = max(1, sum(depths) - 1)
    rates = [rate * i / total for i in range(sum(depths))]
    return [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero biases for a linear map; for ``apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_image(x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"image must be (b, {channels}, H, W); got {tuple(x.shape)}")


class PatchEmbedding(nn.Module):
    """Patches of an image or of the map before, side by side, then a norm."""

    def __init__(self, dim: int, out: int, patch: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(dim, out, patch, stride=patch), nn.LayerNorm(out)

    def forward(self, x: Float[Tensor, "b k Y X"]) -> Float[Tensor, "b H W c"]:
        return self.norm(channels_last(self.proj(x)))


class Level(nn.Module):
    """The blocks of one resolution, and what leads to the next, if there is one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


def maps_of(x: Float[Tensor, "b H W c"], levels: Iterable[nn.Module]) -> list[Float[Tensor, "_ _ _ _"]]:
    """The channel-first map after the blocks of every level."""
    maps = []
    for level in levels:
        assert isinstance(level, Level)
        for block in level.blocks:
            x = block(x)
        maps.append(channels_first(x))
        x = x if level.downsample is None else level.downsample(x)
    return maps


class Block(nn.Module):
    r""":math:`x + \gamma_1\, \mathrm{mixer}(\mathrm{norm}(x))`, then the same with :math:`\gamma_2` and an MLP, on maps.

    Args:
        dim: channels.
        mixer: takes tokens and their grid.
        mlp: takes maps.
        drop_path: rate of stochastic depth of both branches.
        eps: of the norms.
        layer_scale: initial :math:`\gamma`; None for none.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn, self.mlp, self.drop_path = mixer, mlp, DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Float[Tensor, "b H W c"]) -> Float[Tensor, "b H W c"]:
        y = mixed(self.attn, self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)
