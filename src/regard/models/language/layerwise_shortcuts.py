"""Layerwise attention shortcuts: the last block of a decoder attends to what every block before it made of the past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.models.language._decoder import Block, DecoderLM, Held, States
from regard.nn.attention import Attention
from regard.nn.blocks import MLP
from regard.nn.cache import Cache


def by_depth(weights: Float[Tensor, "b h l sk"], taps: int) -> Float[Tensor, "b h l k s"]:
    """Weights of a captured shortcut, keys sorted by depth: every token has its ``taps`` keys side by side."""
    return weights.unflatten(-1, (-1, taps)).transpose(-1, -2)


def depth_usage(weights: Float[Tensor, "b h l k s"]) -> Float[Tensor, "h k"]:
    """The share of each depth in what a head attends to; queries that see nothing do not count."""
    mass = weights.sum((0, 2, 4))
    return mass / mass.sum(-1, keepdim=True)


def context_usage(weights: Float[Tensor, "b h l k s"]) -> Float[Tensor, "h s"]:
    """The share of each distance, from the token itself to s - 1 tokens before it, the last query standing at the last key."""
    flat = weights.sum((0, 3))
    ahead = flat.shape[2] - flat.shape[1]
    mass = torch.stack([flat.diagonal(ahead - i, 1, 2).sum(-1) for i in range(flat.shape[2])], -1)
    return mass / mass.sum(-1, keepdim=True)


def depth_entropy(weights: Float[Tensor, "b h l k s"]) -> Float[Tensor, "b h l"]:
    """How spread over depths each query is, in nats."""
    return torch.special.entr(weights.sum(-1)).sum(-1)


class Shortcut(nn.Module):
    """Attention to the states at several depths, of this token and those before it, under one softmax.

    Args:
        dim: channels of the states.
        num_heads: heads.
        taps: depths; 0 is the embedding, i the output of block i.
        tap_dim: channels of what is attended to.
        dropout: of the weights.
    """

    def __init__(self, dim: int, num_heads: int, taps: Sequence[int], tap_dim: int, dropout: float) -> None:
        super().__init__()
        self.taps, self.norm = tuple(taps), nn.LayerNorm(dim)
        self.maps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, tap_dim), nn.GELU(), nn.Linear(tap_dim, tap_dim))
            for _ in taps
        )
        self.depth = nn.Parameter(0.02 * torch.randn(len(taps), tap_dim))
        self.attn = Attention(dim, num_heads, context_dim=tap_dim, dropout=dropout)

    def memory(self, states: States) -> Float[Tensor, "b nk e"]:
        """Token by token what its depths hold: a step of decoding adds its keys at the end."""
        mapped = [m(states[tap]) for m, tap in zip(self.maps, self.taps)]
        return (torch.stack(mapped, 2) + self.depth).flatten(1, 2)

    def visible(
        self, n: int, start: int, mask: Bool[Tensor, "b s"] | None, device: torch.device
    ) -> Bool[Tensor, "_ n sk"]:
        """Every depth of a token, if the token is no later than the query, and there."""
        here = torch.arange(start + n, device=device)
        past = (here <= here[start:, None])[None]
        seen = past if mask is None else past & mask[:, None]
        return seen.repeat_interleave(len(self.taps), -1)

    def forward(
        self, x: Tensor, states: States, start: int, mask: Bool[Tensor, "b s"] | None, cache: Cache | None
    ) -> Tensor:
        allowed = self.visible(x.shape[1], start, mask, x.device)
        return self.attn(self.norm(x), self.memory(states), mask=allowed, cache=cache)


class ShortcutBlock(Block):
    """:class:`Block` with a shortcut between self-attention and MLP."""

    def __init__(self, shortcut: Shortcut, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__(dim, num_heads, mlp_dim, dropout)
        self.shortcut = shortcut

    def new_cache(self, batch: int, capacity: int, **where: Any) -> list[Cache]:
        wide = self.shortcut.attn.new_cache(batch, len(self.shortcut.taps) * capacity, **where)
        return [*super().new_cache(batch, capacity, **where), wide]

    def attend(self, x: Tensor, states: States, start: int, mask: Tensor | None, cache: Held) -> Tensor:
        x = super().attend(x, states, start, mask, cache)
        return x + self.drop(self.shortcut(x, states, start, mask, cache[1]))


class CrossBlock(nn.Module):
    """A shortcut in place of self-attention, and an MLP."""

    def __init__(self, shortcut: Shortcut, dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.shortcut, self.norm2, self.mlp = shortcut, nn.LayerNorm(dim), MLP(dim, mlp_dim)
        self.drop = nn.Dropout(dropout)

    def new_cache(self, batch: int, capacity: int, **where: Any) -> list[Cache]:
        return [self.shortcut.attn.new_cache(batch, len(self.shortcut.taps) * capacity, **where)]

    def forward(self, x: Tensor, states: States, start: int, mask: Tensor | None, cache: Held) -> Tensor:
        x = x + self.drop(self.shortcut(x, states, start, mask, cache[0]))
        return x + self.drop(self.mlp(self.norm2(x)))


def checked(taps: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The depths that are tapped, by default the outputs of all blocks but the last."""
    found = tuple(range(1, depth)) if taps is None else tuple(taps)
    if not found or len(set(found)) < len(found) or not all(0 <= tap < depth for tap in found):
        raise ValueError(f"taps={found} must be one or more different depths from 0 (embedding) to {depth - 1}")
    return found


def _inputs(batch: int, seed: int) -> dict[str, Any]:
    return {"tokens": torch.randint(11, (batch, 7), generator=torch.Generator().manual_seed(seed))}


_EXAMPLE = {"vocab_size": 11, "dim": 16, "num_heads": 2, "depth": 3, "context": 7}


@method(
    "layerwise-shortcuts", kind="model", tags=Tags(causal=True, mask=True, cache=True), example=_EXAMPLE, inputs=_inputs
)
class LayerwiseShortcutLM(DecoderLM):
    r"""Predict the next token with a last block that attends to the outputs of all blocks before it, at all earlier tokens.

    Before its MLP the last block has, beside self-attention, a shortcut: keys and values of every tapped depth, each
    through a small perceptron of its own, in one softmax over depths and tokens. What a token reads, and how deep
    a feature it is, is thus chosen by content.

    .. math:: u_{lj} = \mathrm{MLP}_l(\mathrm{norm}(h_{lj})) + e_l, \qquad
        y_i = \sum_{l} \sum_{j \le i} \underset{(l, j)}{\mathrm{softmax}} \big( q_i \cdot k_{lj} / \sqrt d \big) \, v_{lj}

    Weights can be watched at ``last.shortcut.attn``; :func:`by_depth` sorts them, :func:`depth_usage`,
    :func:`context_usage` and :func:`depth_entropy` sum them up.

    Args:
        vocab_size: number of tokens.
        dim: channels.
        num_heads: heads of every attention.
        depth: blocks, L.
        context: longest sequence.
        taps: depths to attend to, 0 for the embedding and i for the output of block i; default 1 to L - 1.
        tap_dim: channels of u; default ``dim``.
        mlp_dim: hidden channels of the MLPs; default 4 ``dim``.
        dropout: of weights and residual branches, in training.

    Shape: tokens (b, n) -> logits (b, n, vocab_size). ``mask`` (b, s) is True where there is a token, those of the cache
        included; positions are counted from the first. ``cache`` comes from ``new_cache``.

    Raises:
        ValueError: taps that are none, twice, or not below ``depth``; sequences beyond ``context``; sizes not positive.

    Cost: over the decoder without shortcuts, per token with T taps, s tokens before it and tap_dim = c: parameters
        2 T c c + 4 c c, FLOPs 8 T c c + 4 c c + 4 T s c, cache 2 T c. Scores of the shortcut are n by T n, and so is its mask.

    Example:
        >>> import regard
        >>> model = LayerwiseShortcutLM(11, 16, 2, depth=4, context=8)
        >>> with regard.capture(model, "last.shortcut.attn") as seen:
        ...     logits = model(torch.arange(6)[None])
        >>> logits.shape, depth_usage(by_depth(seen["last.shortcut.attn"].weights(), taps=3)).shape
        (torch.Size([1, 6, 11]), torch.Size([2, 3]))

    Differs: reconstructed from the paper, for which no code was found. Which depths are tapped, the width of the
        perceptrons, and whether self-attention stays in the last block are not known: here all, ``tap_dim``, and yes
        (:class:`LayerwiseShortcutCrossLM` is without it). The embedding e of the depth is ours. Keys of a
        token stand side by side, not depth by depth, so that a cache only grows at its end; the sum is the same.

    Reference: Prateek Verma, Mert Pilanci, Adaptive Large Language Models By Layerwise Attention Shortcuts, 2024,
        arXiv:2409.10870
    """

    def __init__(
        self,
        vocab_size: int = 50_257,
        dim: int = 768,
        num_heads: int = 12,
        *,
        depth: int = 12,
        context: int = 1024,
        taps: Sequence[int] | None = None,
        tap_dim: int | None = None,
        mlp_dim: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab_size, dim, num_heads, depth=depth, context=context, mlp_dim=mlp_dim, dropout=dropout)
        if tap_dim is not None and tap_dim < 1:
            raise ValueError(f"tap_dim={tap_dim} must be positive")
        shortcut = Shortcut(dim, num_heads, checked(taps, depth), tap_dim or dim, dropout)
        self.last = self.finish(shortcut, dim, num_heads, dropout)

    def finish(self, shortcut: Shortcut, dim: int, num_heads: int, dropout: float) -> nn.Module:
        return ShortcutBlock(shortcut, dim, num_heads, self.mlp_dim, dropout)


@method(
    "layerwise-shortcuts-cross",
    kind="model",
    paper="layerwise-shortcuts",
    tags=Tags(causal=True, mask=True, cache=True),
    example=_EXAMPLE,
    inputs=_inputs,
)
class LayerwiseShortcutCrossLM(LayerwiseShortcutLM):
    """:class:`LayerwiseShortcutLM` whose last block has the shortcut in place of self-attention, the block before it tapped."""

    def finish(self, shortcut: Shortcut, dim: int, num_heads: int, dropout: float) -> nn.Module:
        if len(self.blocks) not in shortcut.taps:
            raise ValueError(
                f"taps={shortcut.taps} must have {len(self.blocks)}, the last that self-attention would see"
            )
        return CrossBlock(shortcut, dim, self.mlp_dim, dropout)
