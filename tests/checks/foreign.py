"""Layers that share nothing with ours: healthy ones, and broken ones."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from regard.ops import attend as ops


class Foreign(nn.Module):
    """Somebody else's attention: no base of ours, no cache, no mask."""

    scale_power = -0.5

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = num_heads, (dim // num_heads) ** self.scale_power
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


def foreign_naive(layer: Foreign, x: Tensor) -> Tensor:
    d = x.shape[2] // layer.heads
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = []
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        heads.append((q[..., part] @ k[..., part].mT / d**0.5).softmax(-1) @ v[..., part])
    return layer.out(torch.cat(heads, -1))


class ForeignWrongScale(Foreign):
    scale_power = -1.0


class ForeignDetached(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out((weights.detach() @ v).transpose(1, 2).reshape(b, n, c))


class OnGrid(nn.Module):
    """A depthwise convolution on tokens of a grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Linear(dim, dim)

    def sides(self, n: int, grid: tuple[int, int]) -> tuple[int, int]:
        if grid[0] * grid[1] != n:
            raise ValueError(f"grid={grid} does not hold {n} tokens")
        return grid

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        b, n, c = x.shape
        image = x.transpose(1, 2).reshape(b, c, *self.sides(n, grid))
        return self.out(self.conv(image).flatten(2).transpose(1, 2))


class GuessesSides(OnGrid):
    def sides(self, n: int, grid: tuple[int, int]) -> tuple[int, int]:
        return int(n**0.5), int(n**0.5)


class NearestSides(OnGrid):
    """Never fails: the most nearly square sides there are."""

    def sides(self, n: int, grid: tuple[int, int]) -> tuple[int, int]:
        h = next(h for h in range(isqrt(n), 0, -1) if n % h == 0)
        return h, n // h


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"x must be (b, c, H, W); got {tuple(x.shape)}")
        return x * self.up(self.down(x.mean((2, 3))).tanh()).sigmoid()[..., None, None]


class TransposedGate(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(2, 3)


class FloorsHeads(nn.Module):
    """dim // num_heads without a look at the rest."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(self.heads * self.head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"x must be (b, n, c); got {tuple(x.shape)}")
        q, k, v = (
            part[..., : self.heads * self.head_dim].unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        return self.out(ops.attend(q, k, v).transpose(1, 2).flatten(2))


class AnyRank(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.proj(x)
