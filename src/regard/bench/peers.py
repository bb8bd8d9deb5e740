"""What a user would pick instead: builders of other libraries' layers, each imported when it is measured.

A peer is built for (dim, num_heads, grid) and called with the tokens (b, n, dim); it returns whatever it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.nn import Attention

Grid = tuple[int, int]
Build = Callable[[int, int, Grid], nn.Module]


@dataclass(frozen=True)
class Peer:
    """``requires`` is the distribution that must be installed; the peer is skipped, and said so, without it."""

    name: str
    build: Build
    requires: str = "torch"


class _OnMap(nn.Module):
    """A layer for (b, H, W, c) or (b, c, H, W) maps, called with tokens."""

    def __init__(self, layer: nn.Module, grid: Grid, *, channels_last: bool) -> None:
        super().__init__()
        self.layer, self.grid, self.channels_last = layer, grid, channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.grid)
        return self.layer(x if self.channels_last else x.permute(0, 3, 1, 2))


class _Self(nn.Module):
    """``nn.MultiheadAttention`` as self-attention without weights."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class _Entmax(Attention):
    """Attention with the 1.5-entmax of the package of that name."""

    def normalize(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        from entmax import entmax15

        return entmax15(scores if mask is None else scores.masked_fill(~mask, float("-inf")), dim=-1)


def _shifted_window(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    return _OnMap(ShiftedWindowAttention(dim, [7, 7], [3, 3], num_heads), grid, channels_last=True)


def _natten(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from natten import NeighborhoodAttention2D

    layer = NeighborhoodAttention2D(embed_dim=dim, num_heads=num_heads, kernel_size=7)
    return _OnMap(layer, grid, channels_last=True)


def _timm_partition(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    config = MaxxVitTransformerCfg(dim_head=dim // num_heads, window_size=(7, 7), grid_size=(7, 7), head_first=False)
    pair = nn.Sequential(PartitionAttentionCl(dim, "block", config), PartitionAttentionCl(dim, "grid", config))
    return _OnMap(pair, grid, channels_last=True)


def _timm_cbam(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from timm.layers.cbam import CbamModule

    return _OnMap(CbamModule(dim, rd_ratio=1 / 16, mlp_bias=True), grid, channels_last=False)


def _timm_squeeze(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from timm.layers import SEModule

    return _OnMap(SEModule(dim), grid, channels_last=False)


FUSED = Peer("attention", lambda dim, num_heads, grid: Attention(dim, num_heads))
TORCH = Peer("torch.nn.MultiheadAttention", lambda dim, num_heads, grid: _Self(dim, num_heads))
WINDOW = Peer("torchvision ShiftedWindowAttention", _shifted_window, "torchvision")
PEERS: dict[str, tuple[Peer, ...]] = {
    "nat": (FUSED, WINDOW, Peer("natten NeighborhoodAttention2D", _natten, "natten")),
    "hilo": (FUSED, WINDOW),
    "biformer": (FUSED, WINDOW),
    "flatten": (FUSED, WINDOW),
    "maxvit": (FUSED, Peer("timm block and grid attention with their MLPs", _timm_partition, "timm")),
    "cbam": (Peer("timm CbamModule", _timm_cbam, "timm"), Peer("timm SEModule", _timm_squeeze, "timm")),
    "triplet-attention": (Peer("timm CbamModule", _timm_cbam, "timm"), Peer("timm SEModule", _timm_squeeze, "timm")),
    "rela": (FUSED, Peer("entmax15", lambda dim, num_heads, grid: _Entmax(dim, num_heads), "entmax")),
    "multi-query-attention": (FUSED, TORCH),
    "selective-self-attention": (FUSED, TORCH),
    "moba": (Peer("causal attention", lambda dim, num_heads, grid: Attention(dim, num_heads, causal=True)),),
}


def peers_of(name: str) -> tuple[Peer, ...]:
    """Peers of a layer; plain fused attention where nobody said anything else."""
    return PEERS.get(name, (FUSED,))


def parameters_like(layer: nn.Module, peer: nn.Module) -> float:
    """How many times as many parameters the peer has."""
    mine, theirs = (sum(p.numel() for p in m.parameters()) for m in (layer, peer))
    return theirs / mine if mine else float("nan")


def tokens(batch: int, grid: Grid, dim: int) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(0))
