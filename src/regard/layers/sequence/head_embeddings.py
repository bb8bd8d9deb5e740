"""Attention with one projection to queries, keys and values for all heads, told apart by a learned vector per head."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, Cache, KVCache, expand_mask
from regard.ops.attend import causal_mask, merge_masks

Shared = Float[Tensor, "b 1 n d"]
Heads = Float[Tensor, "b h n d"]
Either = Float[Tensor, "b g n d"]


def naive(
    layer: HeadEmbeddingAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One head after the other, each with queries, keys and values of its own."""
    source = x if context is None else context
    everything = torch.ones(len(x), layer.num_heads, x.shape[1], source.shape[1], dtype=torch.bool)
    past = causal_mask(x.shape[1], source.shape[1]) if layer.causal else everything
    allowed = merge_masks(everything, past, expand_mask(mask))
    assert allowed is not None
    shared, outs = (layer.q(x), layer.k(source), layer.v(source)), []
    for head in range(layer.num_heads):
        vectors = (layer.q_embed[head], layer.k_embed[head], layer.v_embed[head])
        multiplied = isinstance(layer, HeadEmbeddingMultiplied)
        q, k, v = (y * (1 + e) if multiplied else y + e for y, e in zip(shared, vectors))
        seen = (q @ k.transpose(1, 2) / layer.head_dim**0.5).exp() * allowed[:, head]
        total = seen.sum(-1, keepdim=True)
        outs.append(seen / torch.where(total > 0, total, 1.0) @ v)
    return layer.out(torch.cat(outs, -1))


class HeadEmbeddingAttention(Attention, ABC):
    """What both forms share: three projections to one head, and three tables of head embeddings.

    Keys and values are never copied for the heads, unless rotary positions, which do not commute with an embedding, stand
    between projection and score.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        init_std: float = 0.02,
        dropout: float = 0.0,
    ) -> None:
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim={head_dim} must be at least 1")
        if init_std < 0:
            raise ValueError(f"init_std={init_std} must not be negative")
        super().__init__(
            dim, num_heads, 1, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        self.q = nn.Linear(dim, self.head_dim, bias=bias)
        self.q_embed, self.k_embed, self.v_embed = (
            nn.Parameter(init_std * torch.randn(num_heads, self.head_dim)) for _ in range(3)
        )

    @abstractmethod
    def embed(self, x: Either, table: Float[Tensor, "h d"]) -> Heads:
        """What each head has in the place of what all share."""

    @abstractmethod
    def queries(self, q: Shared) -> Heads:
        """Queries that score shared keys as each head's own queries score its own keys, as far as softmax can tell."""

    def project(self, x: Tensor, context: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(y, 1) for y in (self.q(x), self.k(context), self.v(context)))
        if self.rotary is None:
            return self.queries(q), k, v
        return self.embed(q, self.q_embed), self.embed(k, self.k_embed), v.expand(-1, self.num_heads, -1, -1)

    def new_cache(self, batch: int, capacity: int, **where: object) -> KVCache:
        heads = 1 if self.rotary is None else self.num_heads
        return KVCache(batch, heads, capacity, self.head_dim, **where)  # type: ignore[arg-type]


@method(
    "head-embeddings",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class HeadEmbeddingMultiplied(HeadEmbeddingAttention):
    r"""Attention whose heads share one query, key and value, each multiplied channel by channel with its head's embedding.

    Nearly all parameters of the projections go: one head's are left, and three vectors per head. A head's key embedding can
    be moved to its queries and its value embedding behind the sum, so all heads read the same keys and values, as in
    multi-query attention, and the cache holds one of each.

    .. math::

        y = \mathrm{concat}_i\; \mathrm{softmax}\big((Q \odot w_i) K^\top / \sqrt d\big) V \odot (1 + e^v_i) \; W^o, \qquad
        w_i = (1 + e^q_i) \odot (1 + e^k_i)

    with :math:`Q = x W^q`, :math:`K = x W^k`, :math:`V = x W^v` of d channels. It equals multi-head attention with
    :math:`W^q_i = W^q \mathrm{diag}(1 + e^q_i)`, and so on. The embeddings act as gains: leave them out of weight decay.

    Args:
        dim: channels in and out, c.
        num_heads: heads, h.
        head_dim: channels of one head, d, and of the shared projections; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the shared projections.
        init_std: of the embeddings at the start.
        dropout: of the weights, in training (the paper trains with 0.1).

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: sizes below 1, heads that do not divide, ``init_std`` below 0.

    Cost: 3 c d + 3 h d + h d c parameters without biases, multi-head attention 4 h d c; projections to q, k and v take 1/h of
    the FLOPs, the cache 1/h of the memory (all of it under rotary positions). Attention itself costs the same.

    Example:
        >>> layer = HeadEmbeddingMultiplied(dim=32, num_heads=4, causal=True)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
        >>> layer.new_cache(batch=2, capacity=16).k.shape
        torch.Size([2, 1, 16, 8])

    Differs: there is no official code, only the paper's description; the start of the embeddings is a reconstruction, that
    of the projections is torch's.

    Reference: Huiyin Xue, Nikolaos Aletras, Pit One Against Many: Leveraging Attention-head Embeddings for
    Parameter-efficient Multi-head Attention, Findings of EMNLP 2023, arXiv:2310.07911
    """

    def embed(self, x: Either, table: Float[Tensor, "h d"]) -> Heads:
        return x * (1 + table)[:, None]

    def queries(self, q: Shared) -> Heads:
        return q * ((1 + self.q_embed) * (1 + self.k_embed))[:, None]

    def merge(self, out: Float[Tensor, "b h l e"]) -> Float[Tensor, "b l c"]:
        return super().merge(self.embed(out, self.v_embed))


@method(
    "head-embeddings-add",
    kind="layer",
    paper="head-embeddings",
    tags=Tags(
        cross=True,
        causal=True,
        mask=True,
        cache=True,
        equivariant=True,
        xfail={
            "parameters_have_gradients": "k_embed adds the same to all scores of a row, which softmax does not see",
            "swap_trains": "k_embed adds the same to all scores of a row, which softmax does not see",
        },
    ),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class HeadEmbeddingAdded(HeadEmbeddingAttention):
    r"""Attention whose heads share one query, key and value, to each of which its head's embedding is added.

    .. math:: y = \mathrm{concat}_i\; \big(\mathrm{softmax}\big((Q + e^q_i) K^\top / \sqrt d\big) V + e^v_i\big)\; W^o

    This is exact: :math:`(Q + e^q_i) \cdot e^k_i` is the same for all keys of a row, so :math:`e^k_i` has no effect and no
    gradient, and weights that sum to one let :math:`e^v_i` through. Heads differ by :math:`e^q_i K^\top` alone. A query that
    may look nowhere stays zero. With rotary positions, which turn an embedded key, :math:`e^k_i` has an effect.

    Arguments, shapes and cost are those of :class:`HeadEmbeddingMultiplied`. Dropout does not touch :math:`e^v_i`, which is
    added behind the weights; in the mean that is the same.

    Example:
        >>> HeadEmbeddingAdded(dim=32, num_heads=4)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def embed(self, x: Either, table: Float[Tensor, "h d"]) -> Heads:
        return x + table[:, None]

    def queries(self, q: Shared) -> Heads:
        return self.embed(q, self.q_embed)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        y = super().forward(x, context, mask=mask, grid=grid, cache=cache)
        allowed = expand_mask(mask)
        if allowed is None:
            allowed = x.new_ones(1, 1, 1, (x if context is None else context).shape[1], dtype=torch.bool)
        elif self.causal:
            allowed = allowed & causal_mask(x.shape[1], allowed.shape[-1], x.device)
        shift = allowed.any(-1, keepdim=True) * self.v_embed[:, None]
        return y + nn.functional.linear(shift.transpose(1, 2).flatten(2), self.out.weight)


def projection_parameters(dim: int, num_heads: int, head_dim: int) -> dict[str, int]:
    """Weights of the projections to q, k and v, without biases, of kinds of attention with heads of one size."""
    single = 3 * dim * head_dim
    return {
        "multi-head": num_heads * single,
        "multi-query": (num_heads + 2) * dim * head_dim,
        "head embeddings": single + 3 * num_heads * head_dim,
        "single head": single,
    }
