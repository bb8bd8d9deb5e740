"""A plain decoder language model, to which papers add their part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.nn.attention import Attention
from regard.nn.blocks import MLP
from regard.nn.cache import Cache

States = Sequence[Tensor]
Held = Sequence[Cache | None]


@dataclass
class DecoderCache:
    """Keys and values of every attention, block by block, and how many tokens they are of."""

    blocks: list[list[Cache]]
    length: int = 0


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)
        self.attn = Attention(dim, num_heads, causal=True, dropout=dropout)
        self.mlp = MLP(dim, mlp_dim)

    def new_cache(self, batch: int, capacity: int, **where: Any) -> list[Cache]:
        return [self.attn.new_cache(batch, capacity, **where)]

    def attend(self, x: Tensor, states: States, start: int, mask: Tensor | None, cache: Held) -> Tensor:
        return x + self.drop(self.attn(self.norm1(x), mask=mask, cache=cache[0]))

    def forward(self, x: Tensor, states: States, start: int, mask: Tensor | None, cache: Held) -> Tensor:
        x = self.attend(x, states, start, mask, cache)
        return x + self.drop(self.mlp(self.norm2(x)))


class DecoderLM(nn.Module):
    """A decoder with learned positions, norms before its parts, and a head tied to the embedding.

    Args:
        vocab_size: number of tokens.
        dim: channels.
        num_heads: heads of every attention.
        depth: blocks.
        context: longest sequence.
        mlp_dim: hidden channels of the MLPs; default 4 ``dim``.
        dropout: of weights and residual branches, in training.

    Shape: tokens (b, n) -> logits (b, n, vocab_size). ``mask`` (b, s) is True where there is a token, those of the cache
        included; positions are counted from the first. ``cache`` comes from ``new_cache``.

    A block is called with its input, the ``states`` so far (embedding first), the position of the first token, mask and caches.
    """

    def __init__(
        self,
        vocab_size: int = 50_257,
        dim: int = 768,
        num_heads: int = 12,
        *,
        depth: int = 12,
        context: int = 1024,
        mlp_dim: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("depth", depth), ("context", context)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        self.context, self.mlp_dim = context, 4 * dim if mlp_dim is None else mlp_dim
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(context, dim)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        parts = (Block(dim, num_heads, self.mlp_dim, dropout) for _ in range(depth - 1))
        self.blocks, self.norm, self.drop = nn.ModuleList(parts), nn.LayerNorm(dim), nn.Dropout(dropout)
        self.last: nn.Module = Block(dim, num_heads, self.mlp_dim, dropout)

    def new_cache(self, batch: int, capacity: int, **where: Any) -> DecoderCache:
        """An empty cache for ``capacity`` tokens; ``where`` takes dtype and device."""
        return DecoderCache([block.new_cache(batch, capacity, **where) for block in (*self.blocks, self.last)])  # type: ignore[operator]

    def forward(
        self,
        tokens: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b s"] | None = None,
        cache: DecoderCache | None = None,
    ) -> Float[Tensor, "b n v"]:
        start = 0 if cache is None else cache.length
        n, end = tokens.shape[1], start + tokens.shape[1]
        if end > self.context:
            raise ValueError(f"tokens end at {end}, which is beyond context={self.context}")
        if mask is not None and mask.shape != (len(tokens), end):
            raise ValueError(f"mask must be {(len(tokens), end)}, cached tokens included; got {tuple(mask.shape)}")
        where = torch.arange(start, end, device=tokens.device)
        if mask is not None:
            where = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        x = self.drop(self.tokens(tokens) + self.positions(where))
        states = [x]
        for i, block in enumerate((*self.blocks, self.last)):
            held: Held = [None, None] if cache is None else cache.blocks[i]
            states.append(block(states[-1], states, start, mask, held))
        if cache is not None:
            cache.length += n
        return F.linear(self.norm(states[-1]), self.tokens.weight)
