"""Multi-query attention: all query heads read one head of keys and values, so that decoding moves less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regard.catalog.registry import Tags, method
from regard.nn import Attention, expand_mask
from regard.ops.attend import causal_mask, merge_masks
from regard.ops.positions import rotary_angles, rotate_halves

Heads = Float[Tensor, "g r *parameter"]


def naive(
    layer: MultiQueryAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One head after the other, each with a copy of the key head that it reads."""
    q, k, v = layer.project(x, x if context is None else context)
    everything = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    past = causal_mask(q.shape[2], k.shape[2]) if layer.causal else everything
    allowed = merge_masks(everything, past, expand_mask(mask))
    assert allowed is not None
    outs = []
    for head in range(layer.num_heads):
        shared = head // (layer.num_heads // layer.num_kv_heads)
        logits = q[:, head] @ k[:, shared].transpose(-1, -2) / layer.head_dim**0.5
        seen = logits.exp() * allowed[:, head]
        total = seen.sum(-1, keepdim=True)
        outs.append(seen / total.masked_fill(total == 0, 1.0) @ v[:, shared])
    return layer.out(torch.cat(outs, -1))


@dataclass(frozen=True)
class DecodeCost:
    """What one decoding step takes: multiplications with their additions, numbers read or written, bytes held."""

    multiply_adds: int
    numbers_moved: int
    cache_bytes: int

    @property
    def memory_per_compute(self) -> float:
        """Numbers moved for each multiplication; a large ratio means that the memory sets the speed."""
        return self.numbers_moved / self.multiply_adds


@method(
    "multi-query-attention",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class MultiQueryAttention(Attention):
    r"""Attention in which all query heads share one head of keys and values, or one per group of query heads.

    Decoding token by token re-reads every cached key and value; with one shared head there are ``num_heads`` times
    fewer of them, while training costs nearly what it did. ``num_kv_heads`` between 1 and ``num_heads`` is
    grouped-query attention; ``num_kv_heads=num_heads`` is multi-head attention. Query head i reads key head ``i //
    (num_heads // num_kv_heads)``.

    .. math:: y = \sum_h \mathrm{softmax}\big(x W^q_h (x W^k)^\top / \sqrt d\big)\, x W^v \, W^o_h

    Args:
        dim: channels in and out.
        num_heads: query heads (the paper's h).
        num_kv_heads: heads of keys and values.
        head_dim: channels of one head (the paper's k and v); default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        rope: rotate queries and keys by their positions, keys before they are cached.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: heads that do not divide, ``rope`` with an odd ``head_dim`` or with a context.

    Cost: with g key heads, the projections have 2 c d g parameters for keys and values instead of 2 c d h, and the
    cache 2 g d numbers per token instead of 2 h d. In one decoding step :meth:`decode_cost` moves :math:`\Theta(1/c +
    s/(ch) + 1/b)` numbers per multiplication, multi-head attention :math:`\Theta(s/c + 1/b)`.

    Example:
        >>> layer = MultiQueryAttention(dim=32, num_heads=4, causal=True)
        >>> x = torch.randn(2, 7, 32)
        >>> cache = layer.new_cache(batch=2, capacity=16)
        >>> steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
        >>> torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-6)
        True
        >>> cache.k.shape
        torch.Size([2, 1, 16, 8])

    Differs: the scores are always divided by :math:`\sqrt d`, which the paper's listing leaves to the initialisation.
    Keys and values have one width; in all of the paper's models they have. The output projection has a bias. Grouped
    heads and rotary positions came after the paper.

    Reference: Noam Shazeer, Fast Transformer Decoding: One Write-Head is All You Need, 2019, arXiv:1911.02150.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int = 1,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rope: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        if rope and self.head_dim % 2:
            raise ValueError(f"rope=True needs an even head_dim; got head_dim={self.head_dim}")
        self.rope = rope

    def project(self, x: Tensor, context: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, start)
        if self.rope:
            if context is not x:
                raise ValueError("context was given to a layer with rope=True, whose positions are those of x")
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            angles = rotary_angles(positions.to(torch.promote_types(x.dtype, torch.float32)), self.head_dim)
            q, k = rotate_halves(q, angles), rotate_halves(k, angles)
        return q, k, v

    def decode_cost(self, length: int, batch: int = 1) -> DecodeCost:
        """The cost of one step for ``batch`` sequences that have ``length`` tokens with the new one.

        Weights and cache are read once, tokens come in and go out once; the softmax is not counted. The cache is that
        of the dtype of the parameters.
        """
        weights = sum(linear.weight.numel() for linear in (self.q, self.k, self.v, self.out))
        held = 2 * batch * self.num_kv_heads * self.head_dim * length
        return DecodeCost(
            multiply_adds=batch * (weights + 2 * self.num_heads * self.head_dim * length),
            numbers_moved=weights + held + 2 * batch * self.dim,
            cache_bytes=held * self.k.weight.element_size(),
        )


def mean_head(heads: Heads) -> Float[Tensor, "g *parameter"]:
    """The mean of the heads of each group."""
    return heads.mean(1)


def first_head(heads: Heads) -> Float[Tensor, "g *parameter"]:
    """The first head of each group."""
    return heads[:, 0]


def convert(
    layer: Attention, num_kv_heads: int = 1, pool: Callable[[Tensor], Tensor] = mean_head
) -> MultiQueryAttention:
    """A trained layer with its key heads pooled to ``num_kv_heads``, to be trained a little further.

    Args:
        layer: any attention whose projections are those of ``nn.Attention``; it is not changed.
        num_kv_heads: heads of keys and values to be left, dividing those of ``layer``.
        pool: from parameters (groups, heads of the group, ...) to (groups, ...): :func:`mean_head`, :func:`first_head`.

    Raises:
        ValueError: ``num_kv_heads`` does not divide the key heads of ``layer``.
    """
    if num_kv_heads < 1 or layer.num_kv_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide the {layer.num_kv_heads} key heads of layer")
    grouped = MultiQueryAttention(
        layer.dim,
        layer.num_heads,
        num_kv_heads,
        layer.head_dim,
        context_dim=layer.k.in_features,
        causal=layer.causal,
        bias=layer.q.bias is not None,
        rope=isinstance(layer, MultiQueryAttention) and layer.rope,
        dropout=layer.dropout,
    ).to(layer.q.weight)
    state = layer.state_dict()
    for name in [name for name in state if name.startswith(("k.", "v."))]:
        heads = state[name].unflatten(0, (num_kv_heads, layer.num_kv_heads // num_kv_heads, layer.head_dim))
        state[name] = pool(heads).flatten(0, 1)
    grouped.load_state_dict(state)
    return grouped.train(layer.training)
