"""What reading costs: a twelve-layer ViT alone, with a capture of every site, and after the capture has ended."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.cost import interleave, peak_memory
from regard.core.capture import capture
from regard.core.site import sites

SHAPES = (  # ViT-B, ViT-S and ViT-Ti on an image of 224 pixels in patches of 16, and a single token
    (1, 197, 768, 12),
    (1, 197, 384, 6),
    (8, 197, 384, 6),
    (1, 197, 192, 3),
    (1, 1, 192, 3),
)


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _SelfAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _vit(depth: int, dim: int, num_heads: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(_Block(dim, num_heads) for _ in range(depth))).eval()


def reading(*, rounds: int, budget: float) -> Iterator[Any]:
    """Forward of the model alone beside (a) the same while every site is captured, (b) the same after a capture has ended."""
    from regard.bench.run import Measured, device_name

    for batch, tokens, dim, heads in SHAPES:
        model, untouched = _vit(12, dim, heads), _vit(12, dim, heads)
        x = torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(0))
        sites(model, x)
        with capture(model):
            model(x)

        @torch.no_grad()
        def watched(model: nn.Module = model, x: Tensor = x) -> object:
            with capture(model) as cap:
                model(x)
            return cap

        @torch.no_grad()
        def after(model: nn.Module = model, x: Tensor = x) -> object:
            return model(x)

        @torch.no_grad()
        def plain(model: nn.Module = untouched, x: Tensor = x) -> object:
            return model(x)

        calls = {"capture of 12 sites": watched, "after a capture": after, "never watched": plain}
        times = interleave(calls, rounds=rounds, budget=3 * budget)
        theirs, memory = times["never watched"], {n: peak_memory(c) / 2**20 for n, c in calls.items()}
        for name in ("capture of 12 sites", "after a capture"):
            mine = times[name]
            yield Measured(
                subject="capture",
                peer="never watched",
                mode=name,
                shape=f"b={batch} tokens={tokens} dim={dim} heads={heads} depth=12",
                milliseconds=mine.median,
                spread=(mine.high - mine.low) / 2,
                peer_milliseconds=theirs.median,
                peer_spread=(theirs.high - theirs.low) / 2,
                ratio=theirs.median / mine.median,
                mebibytes=memory[name],
                peer_mebibytes=memory["never watched"],
                peer_parameters=1.0,
                device=device_name("cpu"),
                torch=torch.__version__.partition("+")[0],
                date=datetime.now(UTC).strftime("%Y-%m-%d"),
            )
