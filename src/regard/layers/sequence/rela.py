"""Rectified linear attention: ReLU in place of softmax, and a norm of what was summed in place of its row sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, expand_mask
from regard.ops import normalizers
from regard.ops.attend import causal_mask, merge_masks

Weights = Float[Tensor, "b h l s"]


def naive(
    layer: RectifiedLinearAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One query after the other."""
    q, k, v = layer.project(x, x if context is None else context)
    (b, h, l, d), (g, s) = q.shape, k.shape[1:3]
    everything = torch.ones(b, h, l, s, dtype=torch.bool)
    allowed = merge_masks(everything, causal_mask(l, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    shared = torch.arange(h) // (h // g)
    k, v = k[:, shared], v[:, shared]
    rows = []
    for t in range(l):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k) / sqrt(d)
        weights = torch.where(allowed[:, :, t] & (scores > 0), scores, 0.0)
        o = torch.einsum("bhs,bhsd->bhd", weights, v).flatten(1)
        y = layer.norm.weight * o / (o.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        rows.append(y / (1 + (-layer.norm.gate * o).exp()) if isinstance(layer.norm, GatedRMSNorm) else y)
    return layer.out(torch.stack(rows, 1))


class GatedRMSNorm(nn.RMSNorm):
    r"""Root-mean-square norm gated by its own input, :math:`\mathrm{RMSNorm}(x) \odot \sigma(w \odot x)`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.gate = nn.Parameter(torch.empty_like(self.weight).uniform_(-sqrt(3 / dim), sqrt(3 / dim)))

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return super().forward(x) * (self.gate * x).sigmoid()


class RectifiedLinearAttention(Attention, ABC):
    r"""What both forms of ReLA share: rectified scores as weights, and a root-mean-square norm over all heads.

    .. math:: y = \mathrm{RMSNorm}(o)\, W^o, \qquad o = \mathrm{concat}_h\; \mathrm{ReLU}(q_h k_h^\top / \sqrt d)\, v_h
    """

    form = "relu"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        eps: float = 1e-8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        if eps <= 0.0:
            raise ValueError(f"eps={eps} must be positive")
        self.eps = eps
        self.norm = self.make_norm()

    def normalize(self, scores: Weights, mask: Tensor | None) -> Weights:
        return normalizers.relu(scores, mask)

    def merge(self, out: Float[Tensor, "b h l e"]) -> Float[Tensor, "b l c"]:
        return self.out(self.norm(out.transpose(1, 2).flatten(2)))

    @abstractmethod
    def make_norm(self) -> nn.RMSNorm:
        """A norm over the channels of all heads, as the paper's form starts it."""


@method(
    "rela",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class ReLAGated(RectifiedLinearAttention):
    r"""ReLA-g: attention with ReLU for softmax, its sum normalised and gated by itself.

    Weights are exactly zero where a score is not positive, so sparsity comes from the data, a head may look at nothing,
    and no row has to be normalised. What a query gathers grows with the number of keys; a norm over the concatenated
    heads takes that out again.

    .. math::

        o = \mathrm{concat}_h\; \mathrm{ReLU}(q_h k_h^\top / \sqrt d)\, v_h, \qquad
        y = \Big(\frac{g \odot o}{\sqrt{\mathrm{mean}(o^2) + \epsilon}} \odot \sigma(w \odot o)\Big) W^o

    The norm brings the smallest positive weight to full size: a query looks at something or at nothing, hardly at a
    little. Weights are no probabilities; divide by their sum, which may be zero, where they are read as such.

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v; without it a head that sees only negative scores is harder to revive.
        eps: added to the mean square.
        dropout: of the weights, in training (the paper trains with 0.1).

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: heads that do not divide, ``eps`` that is not positive.

    Cost: that of softmax attention with the matrix in the open, 4 b n s c FLOPs and b h n s weights; 2 c more
    parameters.

    Example:
        >>> layer = ReLAGated(dim=32, num_heads=4)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> q, k, _ = layer.project(x, x)
        >>> weights = layer.normalize(layer.scores(q, k), None)
        >>> bool((weights == 0).any() and (weights >= 0).all())
        True

    Differs: the official code multiplies masked scores by zero before the ReLU; here masked weights are set to zero
    after it, which is the same. Grouped key heads are an addition. The gate starts uniform in :math:`\pm\sqrt{3 / c}`,
    what the official training settings give.

    Reference: Biao Zhang, Ivan Titov, Rico Sennrich, Sparse Attention with Linear Units, EMNLP 2021, arXiv:2104.07012.
    """

    def make_norm(self) -> nn.RMSNorm:
        return GatedRMSNorm(self.num_heads * self.head_dim, self.eps)


@method(
    "rela-init",
    kind="layer",
    paper="rela",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class ReLAInit(RectifiedLinearAttention):
    r"""ReLA-i: attention with ReLU for softmax, its sum normalised with a gain that starts small.

    As :class:`ReLAGated`, without the gate: instead the gain g starts uniform in :math:`\pm\sqrt{3 / d}`, which is
    :math:`1 / \sqrt d` in the mean square, so that a layer adds little to its residual branch at first.

    .. math:: y = \frac{g \odot o}{\sqrt{\mathrm{mean}(o^2) + \epsilon}}\, W^o, \qquad
        o = \mathrm{concat}_h\; \mathrm{ReLU}(q_h k_h^\top / \sqrt d)\, v_h

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head, d; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        eps: added to the mean square.
        dropout: of the weights, in training (the paper trains with 0.1).

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: heads that do not divide, ``eps`` that is not positive.

    Cost: that of softmax attention with the matrix in the open, 4 b n s c FLOPs and b h n s weights; c more parameters.

    Example:
        >>> layer = ReLAInit(dim=32, num_heads=4)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    Differs: the paper describes its initialisation without a constant, and the official code holds only the gated form;
    :math:`\sqrt{3 / d}` is what a published reimplementation draws from.

    Reference: Biao Zhang, Ivan Titov, Rico Sennrich, Sparse Attention with Linear Units, EMNLP 2021, arXiv:2104.07012.
    """

    def make_norm(self) -> nn.RMSNorm:
        norm = nn.RMSNorm(self.num_heads * self.head_dim, self.eps)
        nn.init.uniform_(norm.weight, -sqrt(3 / self.head_dim), sqrt(3 / self.head_dim))
        return norm


def sparsity(weights: Weights, mask: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "h"]:
    """The share of exact zeros among the allowed weights of each head."""
    allowed = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    zeros = ((weights == 0) & allowed).sum((0, 2, 3))
    return zeros / allowed.sum((0, 2, 3)).clamp(min=1)


def null_rate(weights: Weights) -> Float[Tensor, "h"]:
    """The share of queries of each head that look at nothing."""
    return (weights == 0).all(-1).float().mean((0, 2))


def head_diversity(weights: Weights) -> Float[Tensor, ""]:
    """How much the heads of a query differ: the Jensen-Shannon divergence of their weights, rows brought to sum 1.

    In nats, from 0 (all heads alike) to log h; a row that looks at nothing takes no part.
    """
    total = weights.sum(-1, keepdim=True)
    present = (total > 0).to(weights.dtype)
    p = weights / total.masked_fill(total == 0, 1.0)
    heads = present.sum(1).clamp(min=1.0)
    mixture = p.sum(1) / heads
    each = (torch.special.entr(p).sum(-1, keepdim=True)).sum(1) / heads
    return (torch.special.entr(mixture).sum(-1, keepdim=True) - each).mean()


def alignment_error_rate(
    links: Bool[Tensor, "*r l s"], sure: Bool[Tensor, "*r l s"], possible: Bool[Tensor, "*r l s"]
) -> float:
    """One minus the agreement of ``links`` (``weights > 0``, or the largest of a row) with a gold word alignment.

    Args:
        links: pairs that the model aligns.
        sure: pairs that must be aligned.
        possible: pairs that may be, the sure ones among them.
    """
    hits = (links & sure).sum() + (links & possible).sum()
    return 1.0 - float(hits / (links.sum() + sure.sum()).clamp(min=1))
