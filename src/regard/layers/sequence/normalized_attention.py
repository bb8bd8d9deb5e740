"""Normalized attention: scores standardized over the keys, in place of softmax, so that weights may leave the simplex."""

from __future__ import annotations

from math import erf, sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, expand_mask
from regard.ops import normalizers
from regard.ops.attend import causal_mask, merge_masks


def naive(
    layer: NormalizedAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One query and one head after the other, over the keys that the query may look at."""
    q, k, v = layer.project(x, x if context is None else context)
    (b, h, l, _), (g, s) = q.shape, k.shape[1:3]
    everything = torch.ones(b, h, l, s, dtype=torch.bool)
    allowed = merge_masks(everything, causal_mask(l, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    hidden = q.new_zeros(b, l, h, v.shape[-1])
    for row, head, t in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(l)).tolist():
        seen = allowed[row, head, t].nonzero()[:, 0]
        if len(seen):
            logits = k[row, head // (h // g), seen] @ q[row, head, t]
            centred = logits - logits.sum() / len(seen)
            square = (centred * centred).sum() / len(seen)
            deviation = square.sqrt() if square > 0 else square
            weights = layer.gain[head, 0, 0] * centred / (deviation + layer.eps) + layer.bias[head, 0, 0]
            hidden[row, t, head] = weights @ v[row, head // (h // g), seen]
    o = hidden.flatten(2)
    centred = o - o.mean(-1, keepdim=True)
    o = (
        centred / (centred.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt() * layer.norm.weight
        + layer.norm.bias
    )
    return layer.out(0.5 * o * (1 + ((2 / torch.pi) ** 0.5 * (o + 0.044715 * o**3)).tanh()))


@method(
    "normalized-attention",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class NormalizedAttention(Attention):
    r"""Attention whose scores are brought to mean 0 and variance 1 over the keys, and not to a sum of 1.

    Softmax keeps what a query gathers inside the convex hull of the values, and the more keys there are, the closer it
    starts to their mean. Standardized scores have no such cage: a weight may be negative or large, a row sums to n
    times its bias, and what is gathered grows with the number of keys as a random sum does. A layer norm over the heads
    takes that size out again; a GELU follows before the output projection.

    .. math::

        a_{ij} = \gamma_h \frac{z_{ij} - \mu_i}{\sigma_i + \epsilon} + \beta_h, \quad z_{ij} = q_i \cdot k_j, \qquad
        y = \mathrm{GELU}\big(\mathrm{LN}(\mathrm{concat}_h\, a_h v_h)\big) W^o

    with :math:`\mu_i, \sigma_i` the mean and the standard deviation (of the population) of row i over the keys that it
    may look at. A query with a single key has :math:`\sigma = 0` and weighs it by :math:`\beta_h`, which starts at 0: the
    first token of a causal layer passes on nothing at first. Weights are no probabilities.

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        eps: added to the standard deviation.
        init_std: of the normal numbers, cut off at two deviations, that the four projections start from.
        dropout: of the weights, in training (the paper's layer has 0.1).

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: heads that do not divide, ``eps`` or ``init_std`` that is not positive.

    Cost: that of softmax attention with the matrix in the open, 4 b n s c FLOPs and b h n s weights; 2 h + 2 c more
    parameters.

    Example:
        >>> layer = NormalizedAttention(dim=32, num_heads=4)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> q, k, _ = layer.project(x, x)
        >>> weights = layer.normalize(layer.scores(q, k), None)
        >>> bool(weights.mean(-1).abs().max() < 1e-6) and bool((weights < 0).any())
        True

    Differs: the scores are not divided by :math:`\sqrt d`, as in the official code; only :math:`\epsilon` would notice.
    A query that may look at nothing gives zeros where the official code divides by zero, and half precision takes its
    statistics in single. The official plots of the initialisation weigh a lone key by 1; its layer does not, nor does
    this one. Grouped key heads and a context are additions. The L2 penalty on the weights, a switch of the official code
    that is off in its experiments, is left to the optimiser.

    Reference: Oliver Richter, Roger Wattenhofer, Normalized Attention Without Probability Cage, 2020, arXiv:2005.09561.
    """

    form = "standardize"

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
        eps: float = 1e-3,
        init_std: float = 0.02,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        if eps <= 0.0 or init_std <= 0.0:
            raise ValueError(f"eps={eps} and init_std={init_std} must be positive")
        self.eps, self.scale = eps, 1.0
        self.gain, self.bias = nn.Parameter(torch.ones(num_heads, 1, 1)), nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.norm = nn.LayerNorm(self.num_heads * self.head_dim, eps=1e-3)
        inside = erf(2.0 / sqrt(2.0))
        for linear in (self.q, self.k, self.v, self.out):
            with torch.no_grad():
                linear.weight.uniform_(-inside, inside).erfinv_().mul_(sqrt(2.0) * init_std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def normalize(self, scores: Float[Tensor, "b h l s"], mask: Tensor | None) -> Float[Tensor, "b h l s"]:
        return normalizers.standardize(scores, mask, self.gain, self.bias, self.eps)

    def merge(self, out: Float[Tensor, "b h l e"]) -> Float[Tensor, "b l c"]:
        return self.out(F.gelu(self.norm(out.transpose(1, 2).flatten(2)), approximate="tanh"))
