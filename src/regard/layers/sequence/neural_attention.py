"""Neural attention: a small perceptron on query and key together scores them, in the place of their dot product."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.catalog.registry import Tags, method
from regard.nn import Attention, expand_mask
from regard.ops.attend import causal_mask, merge_masks


def naive(
    layer: NeuralAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One pair after the other: the perceptron on the two vectors, one behind the other."""
    q, k, v = layer.project(x, x if context is None else context)
    (b, h, l, _), (g, s) = q.shape, k.shape[1:3]
    everything = torch.ones(b, h, l, s, dtype=torch.bool)
    allowed = merge_masks(everything, causal_mask(l, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    shared = torch.arange(h) // (h // g)
    k, v = k[:, shared], v[:, shared]
    rows = []
    for t in range(l):
        row = []
        for j in range(s):
            both = torch.cat([layer.query(q[:, :, t]), layer.key(k[:, :, j])], -1)
            row.append(layer.last(layer.activation(layer.second(layer.activation(layer.first(both))))))
        logits = torch.cat(row, -1)
        shares = torch.where(allowed[:, :, t], (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
        total = shares.sum(-1, keepdim=True)
        rows.append(torch.einsum("bhs,bhsd->bhd", shares / torch.where(total > 0, total, 1.0), v).flatten(1))
    return layer.out(torch.stack(rows, 1))


@method(
    "neural-attention",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True),
    example={"dim": 32, "num_heads": 4, "score_dim": 8},
    naive=naive,
)
class NeuralAttention(Attention):
    r"""Attention whose scores come from a perceptron with two hidden layers on the query and the key together.

    A dot product ranks keys along one direction that the query chooses; a perceptron can ask for anything that two short
    vectors tell. Query and key are brought down to m channels first. Its weights are the same for all heads and everything
    but the score is plain attention, so a network can have it in the first layer only, as the paper does.

    .. math::
        s_{ij} = w_3 \cdot \phi\big(W_2\, \phi(W_1 [q'_i; k'_j] + b_1) + b_2\big) + b_3, \qquad
        q' = W_q q + b_q, \quad k' = W_k k + b_k

    with :math:`W_1` from 2m to m and :math:`W_2` from m to m/2 channels, and no division by :math:`\sqrt d`. Since
    :math:`W_1 [q'; k'] = W_{1a} q' + W_{1b} k'`, the first layer is computed for each token and added for each pair. Pairs
    are made a few queries at a time, and again in the backward pass.

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        score_dim: channels m that the perceptron sees of a query and of a key. With less than 8 the last hidden layer
            has so few units that all may die, which leaves uniform attention: that warns.
        activation: of the hidden layers, as a function of tensors.
        chunk: queries of a key head whose pairs are in memory at the same time.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: heads that do not divide, ``score_dim`` below 2, ``chunk`` below 1.

    Cost: of the scores m^2 + m FLOPs a pair with m multiplications more for the activation, against 2 d of a dot product,
    twice in training. Memory b h n s for scores and weights and b g chunk s m for the pairs, in the place of b h n s m.
    Parameters: 2 (d m + m) + 2 m^2 + m + (m + 1) m / 2 + m / 2 + 1 for all heads together.

    Example:
        >>> layer = NeuralAttention(dim=32, num_heads=4)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
        >>> q, k, _ = layer.project(torch.randn(2, 7, 32), torch.randn(2, 9, 32))
        >>> layer.scores(q, k).shape
        torch.Size([2, 4, 7, 9])

    Differs: the official code builds all pairs of concatenated vectors, and its default of m is ``head_dim // 32``, a last
    hidden layer of one unit. In its causal form a mask that is given is dropped; here masks combine. The output projection
    always has a bias. Grouped key heads and other activations are additions. Rotary positions turn q and k before the
    perceptron, whose scores then need not depend on distances alone.

    Reference: Andrew DiGiugno, Ausif Mahmood, Neural Attention: A Novel Mechanism for Enhanced Expressive Power in
    Transformer Models, 2025, arXiv:2502.17206.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        score_dim: int = 16,
        activation: Callable[[Tensor], Tensor] = F.relu,
        chunk: int = 64,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        if score_dim < 2:
            raise ValueError(f"score_dim={score_dim} must be at least 2")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be positive")
        if score_dim < 8:
            warnings.warn(
                f"score_dim={score_dim} leaves {score_dim // 2} units in the last hidden layer: if all die, attention is "
                "uniform and stays so; take 8 or more",
                stacklevel=2,
            )
        self.score_dim, self.activation, self.chunk = score_dim, activation, chunk
        self.query, self.key = nn.Linear(self.head_dim, score_dim), nn.Linear(self.head_dim, score_dim)
        self.first = nn.Linear(2 * score_dim, score_dim)
        self.second = nn.Linear(score_dim, score_dim // 2)
        self.last = nn.Linear(score_dim // 2, 1)

    def pairs(self, rows: Float[Tensor, "b g r m"], keys: Float[Tensor, "b g s m"]) -> Float[Tensor, "b g r s"]:
        """Scores from what the first layer makes of each query and of each key."""
        hidden = self.activation(rows[..., :, None, :] + keys[..., None, :, :])
        return self.last(self.activation(self.second(hidden))).squeeze(-1)

    def scores(self, q: Float[Tensor, "b h l d"], k: Float[Tensor, "b g s d"]) -> Float[Tensor, "b h l s"]:
        of_queries, of_keys = self.first.weight.chunk(2, 1)
        rows = F.linear(self.query(q), of_queries, self.first.bias).reshape(len(q), k.shape[1], -1, self.score_dim)
        keys = F.linear(self.key(k), of_keys)
        pairs = self.pairs
        if torch.is_grad_enabled():
            pairs = partial(checkpoint, pairs, use_reentrant=False, preserve_rng_state=False)
        parts = [pairs(part, keys) for part in rows.split(self.chunk, 2)]
        return torch.cat(parts, 2).view(*q.shape[:3], k.shape[2])
