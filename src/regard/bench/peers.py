"""What a user would pick instead: builders of other libraries' layers, each imported when it is measured.

A peer is built for (dim, num_heads, grid) and called with the tokens (b, n, dim); it returns whatever it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
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


class _ManyToOne(nn.Module):
    """Multi-query attention of GPTBigCode, causal, with fused attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        from transformers.models.gpt_bigcode.configuration_gpt_bigcode import GPTBigCodeConfig
        from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention

        config = GPTBigCodeConfig(n_embd=dim, n_head=num_heads, multi_query=True, attn_pdrop=0.0, resid_pdrop=0.0)
        config._attn_implementation = "sdpa"
        self.layer = GPTBigCodeAttention(config, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Relational(nn.Module):
    """The dual attention of its authors' package, with the symbols of its authors' retriever."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        from dual_attention.dual_attention import DualAttention
        from dual_attention.symbol_retrieval import SymbolicAttention

        half = num_heads // 2
        self.layer = DualAttention(dim, num_heads - half, half, 0.0)
        self.symbols = SymbolicAttention(dim, num_heads, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.symbols(x), is_causal=True)[0]


def _one_key_head(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from x_transformers.x_transformers import Attention as XAttention

    return XAttention(dim, heads=num_heads, dim_head=dim // num_heads, causal=True, one_kv_head=True, flash=True)


def _rectified(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    from rela_transformer.rela_transformer import ReLA

    return ReLA(dim=dim, heads=num_heads, dim_head=dim // num_heads, causal=True)


FUSED = Peer("attention", lambda dim, num_heads, grid: Attention(dim, num_heads))
TORCH = Peer("torch.nn.MultiheadAttention", lambda dim, num_heads, grid: _Self(dim, num_heads))
CAUSAL = Peer("causal attention", lambda dim, num_heads, grid: Attention(dim, num_heads, causal=True))
WINDOW = Peer("torchvision ShiftedWindowAttention", _shifted_window, "torchvision")
PEERS: dict[str, tuple[Peer, ...]] = {
    "nat": (FUSED, TORCH, WINDOW, Peer("natten NeighborhoodAttention2D", _natten, "natten")),
    "hilo": (FUSED, WINDOW),
    "biformer": (FUSED, WINDOW),
    "flatten": (FUSED, WINDOW),
    "maxvit": (FUSED, Peer("timm block and grid attention with their MLPs", _timm_partition, "timm")),
    "cbam": (Peer("timm CbamModule", _timm_cbam, "timm"), Peer("timm SEModule", _timm_squeeze, "timm")),
    "triplet-attention": (Peer("timm CbamModule", _timm_cbam, "timm"), Peer("timm SEModule", _timm_squeeze, "timm")),
    "rela": (
        CAUSAL,
        Peer("entmax15", lambda dim, num_heads, grid: _Entmax(dim, num_heads, causal=True), "entmax"),
        Peer("rela-transformer ReLA", _rectified, "rela_transformer"),
    ),
    "multi-query-attention": (
        CAUSAL,
        Peer(
            "transformers GPTBigCodeAttention", lambda dim, num_heads, grid: _ManyToOne(dim, num_heads), "transformers"
        ),
        Peer("x-transformers one_kv_head", _one_key_head, "x_transformers"),
    ),
    "dual-attention-transformer": (
        CAUSAL,
        Peer(
            "dual-attention DualAttention", lambda dim, num_heads, grid: _Relational(dim, num_heads), "dual_attention"
        ),
    ),
}


def peers_of(record: Method) -> tuple[Peer, ...]:
    """Peers of a layer; plain fused attention where nobody said anything else, causal for a layer that can be."""
    return PEERS.get(record.name, (CAUSAL if record.tags.causal else FUSED,))


def parameters_like(layer: nn.Module, peer: nn.Module) -> float:
    """How many times as many parameters the peer has."""
    mine, theirs = (sum(p.numel() for p in m.parameters()) for m in (layer, peer))
    return theirs / mine if mine else float("nan")


def tokens(batch: int, grid: Grid, dim: int) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(0))
