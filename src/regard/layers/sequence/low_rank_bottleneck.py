"""Multi-head attention whose head size is chosen on its own, so that scores between n tokens may have any rank."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, expand_mask
from regard.ops.attend import causal_mask, merge_masks

PRACTICE = 128


def naive(
    layer: FixedHeadAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One head after the other, its projections cut out of the weights."""
    source = x if context is None else context
    d, e, share = layer.head_dim, layer.v_head_dim, layer.num_heads // layer.num_kv_heads
    everything = torch.ones(len(x), layer.num_heads, x.shape[1], source.shape[1], dtype=torch.bool)
    past = causal_mask(x.shape[1], source.shape[1]) if layer.causal else everything
    allowed = merge_masks(everything, past, expand_mask(mask))
    assert allowed is not None

    def rows(linear: nn.Linear, head: int, width: int, tokens: Tensor) -> Tensor:
        part = slice(head * width, (head + 1) * width)
        return tokens @ linear.weight[part].T + (0 if linear.bias is None else linear.bias[part])

    y = layer.out.bias
    for head in range(layer.num_heads):
        q = rows(layer.q, head, d, x)
        k, v = rows(layer.k, head // share, d, source), rows(layer.v, head // share, e, source)
        seen = (q @ k.transpose(1, 2) / d**0.5).exp() * allowed[:, head]
        total = seen.sum(-1, keepdim=True)
        weights = seen / torch.where(total > 0, total, 1.0)
        y = y + weights @ v @ layer.out.weight[:, head * e : (head + 1) * e].T
    return y


@method(
    "low-rank-bottleneck",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True),
    example={"dim": 32, "num_heads": 4, "head_dim": 12},
    naive=naive,
)
class FixedHeadAttention(Attention):
    r"""Multi-head attention with heads as wide as sequences are long, whatever the width of the model.

    With heads of d = c / h channels the scores of n tokens are a matrix of rank at most d, and where d < n most patterns
    of attention cannot be represented, the fewer the more heads there are. Heads of :math:`d_p \ge n` channels can
    represent every positive pattern, as :func:`realize` constructs; more heads then only add.

    .. math::

        y = \mathrm{concat}_h\; \mathrm{softmax}\big(x W^q_h (x W^k_h)^\top / \sqrt{d_p}\big)\, x W^v_h \; W^o, \qquad
        W^q, W^k, W^v \in \mathbb R^{c \times h d_p}

    It is no free lunch: parameters grow with :math:`h d_p`, so compare at equal parameters too
    (``low-rank-bottleneck-study``).

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of a query and key, :math:`d_p`; default 128, the paper's choice, or ``max_length`` if less.
        v_head_dim: channels of a value; default ``head_dim``.
        max_length: tokens of the longest sequence.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: sizes below 1, heads that do not divide.

    Cost: :math:`4 c h d_p` parameters and :math:`2 b n h d_p (4 c + 2 s)` FLOPs, multi-head attention's with c in the place
    of :math:`h d_p`; a cache of :math:`2 h d_p` numbers a token.

    Example:
        >>> layer = FixedHeadAttention(dim=32, num_heads=4, max_length=64)
        >>> layer.head_dim
        64
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    Differs: nothing known of the layer. As softmax ignores what is added to a whole row of scores, :math:`d_p = n - 1`
    already suffices where the paper's theorem asks for n. Grouped heads and widths of values are additions.

    Reference: Srinadh Bhojanapalli, Chulhee Yun, Ankit Singh Rawat, Sashank J. Reddi, Sanjiv Kumar, Low-Rank Bottleneck in
    Multi-head Attention Models, ICML 2020, arXiv:2002.07028
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        v_head_dim: int | None = None,
        max_length: int | None = None,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        if head_dim is None:
            head_dim = PRACTICE if max_length is None else min(PRACTICE, max_length)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        if head_dim < 1 or v_head_dim < 1:
            raise ValueError(f"head_dim={head_dim} and v_head_dim={v_head_dim} must be at least 1")
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        self.v_head_dim = v_head_dim
        if v_head_dim != head_dim:
            self.v = nn.Linear(self.v.in_features, self.num_kv_heads * v_head_dim, bias=bias)
            self.out = nn.Linear(num_heads * v_head_dim, dim)


def realize(
    pattern: Float[Tensor, "n n"], x: Float[Tensor, "n c"], head_dim: int, eps: float = 0.0
) -> tuple[Float[Tensor, "d c"], Float[Tensor, "d c"]]:
    r"""Weights :math:`W^q, W^k` of one head with which the tokens ``x`` attend exactly as ``pattern`` says.

    .. math:: \mathrm{softmax}\big(x W^{q\top} W^k x^\top / \sqrt{d_p}\big) = P, \qquad
        W^{q\top} W^k = \sqrt{d_p}\; x^+ L\, x^{+\top}

    where L is log P with every row centred, which softmax does not see and which leaves rank n - 1 at most; its singular
    vectors are what the two share.

    Args:
        pattern: P, positive, rows sum to 1.
        x: linearly independent tokens.
        head_dim: channels of the head, at least the rank of L.
        eps: added to every entry of P, rows divided by their new sum, for patterns with zeros.

    Raises:
        ValueError: tokens that depend on each other (always so if n > c), a pattern that is not positive or whose rows do
            not sum to 1, a head that is too small for it.
    """
    n, c = x.shape
    x64, p = x.double(), (pattern.double() + eps) / (1 + n * eps)
    if n > c or torch.linalg.matrix_rank(x64) < n:
        raise ValueError(f"x holds n={n} tokens of c={c} channels that are not linearly independent")
    if not (p > 0).all():
        raise ValueError(f"pattern has entries down to {pattern.min().item():g}, without a log; give eps, such as 1e-6")
    if not torch.allclose(p.sum(-1), torch.ones_like(p[0]), atol=1e-5):
        raise ValueError(f"pattern must have rows that sum to 1; got sums down to {p.sum(-1).min().item():g}")
    logits = p.log()
    u, size, v = torch.linalg.svd(logits - logits.mean(-1, keepdim=True))
    rank = int((size > 1e-12 * n * size[0].clamp(min=1.0)).sum())
    if rank > head_dim:
        raise ValueError(f"head_dim={head_dim} is too small: log pattern has rank {rank} when its rows are centred")
    inverse, root = torch.linalg.pinv(x64), (size[:rank] * head_dim**0.5).sqrt()
    sides = ((inverse @ side * root).T for side in (u[:, :rank], v[:rank].T))
    w_q, w_k = (nn.functional.pad(w, (0, 0, 0, head_dim - rank)).to(x.dtype) for w in sides)
    return w_q, w_k


def widen(layer: Attention, head_dim: int) -> FixedHeadAttention:
    r"""The same function with larger heads: zeros are added, and queries grow by :math:`\sqrt{d_p / d}` against the new scale.

    Args:
        layer: any attention whose projections are those of ``nn.Attention``; it is not changed.
        head_dim: the new size of its heads.

    Raises:
        ValueError: ``head_dim`` below that of ``layer``.
    """
    old = layer.head_dim
    if head_dim < old:
        raise ValueError(f"head_dim={head_dim} must be at least that of layer, {old}")
    wide = FixedHeadAttention(
        layer.dim,
        layer.num_heads,
        layer.num_kv_heads,
        head_dim,
        context_dim=layer.k.in_features,
        causal=layer.causal,
        bias=layer.q.bias is not None,
        dropout=layer.dropout,
    ).to(layer.q.weight)
    state = layer.state_dict()
    for name in [name for name in state if name[0] in "qkv"]:
        heads = state[name].unflatten(0, (-1, old)) * ((head_dim / old) ** 0.5 if name[0] == "q" else 1.0)
        zeros = heads.new_zeros(heads.shape[0], head_dim - old, *heads.shape[2:])
        state[name] = torch.cat((heads, zeros), 1).flatten(0, 1)
    out = state["out.weight"].unflatten(1, (-1, old))
    state["out.weight"] = nn.functional.pad(out, (0, head_dim - old)).flatten(1)
    wide.load_state_dict(state)
    return wide.train(layer.training)
