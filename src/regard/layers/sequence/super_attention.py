"""Attention with fewer projections: values, and keys, are slices of the input; a learned matrix over positions mixes values."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, KVCache, expand_mask
from regard.ops.attend import causal_mask, merge_masks

ONE_MASK = "values are mixed once for all queries, so a mask can only be about keys, (b, s)"


def naive(
    layer: OptimisedAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One head and one query after the other, each head with its slice of the input."""
    source = x if context is None else context
    (b, l, _), s, d = x.shape, source.shape[1], layer.head_dim
    everything = torch.ones(b, layer.num_heads, l, s, dtype=torch.bool)
    allowed = merge_masks(everything, causal_mask(l, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    heads = []
    for h, own in enumerate(torch.arange(layer.dim).split(d)):
        q, values = layer.q(x)[..., own], source[..., own]
        k = values if isinstance(layer, EfficientAttention) else layer.k(source)[..., own]
        if isinstance(layer, SuperAttention):
            values = _mixed(layer, h, values if mask is None else values * mask[..., None])
        rows = []
        for t in range(l):
            logits = torch.einsum("bd,bsd->bs", q[:, t], k) / d**0.5
            shares = torch.where(allowed[:, h, t], (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
            total = shares.sum(-1, keepdim=True)
            rows.append(torch.einsum("bs,bsd->bd", shares / torch.where(total > 0, total, 1.0), values))
        heads.append(torch.stack(rows, 1))
    return layer.out(torch.cat(heads, -1))


def _mixed(layer: SuperAttention, head: int, values: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
    group, mixed = head // (layer.num_heads // layer.num_alignments), []
    for j in range(values.shape[1]):
        sources = range(j + 1 if layer.causal else values.shape[1])
        one = torch.stack([layer.align[group, j, i] * values[:, i] for i in sources]).sum(0)
        mixed.append(one if layer.shift is None else one + layer.shift[group, j])
    return torch.stack(mixed, 1)


@method(
    "super-attention-optimised",
    kind="layer",
    paper="super-attention",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class OptimisedAttention(Attention):
    r"""Attention without a projection of the values: each head reads its own slice of their channels.

    Nothing nonlinear stands between the projection of the values and that of the output, so one can do the work of both.

    .. math:: y = \mathrm{concat}_h\; \mathrm{softmax}(x W^q_h (x W^k_h)^\top / \sqrt d)\, x_{[h]}\; W^o

    Args:
        dim: channels in and out, and those of ``context``.
        num_heads: heads; head h reads channels h d to (h + 1) d.
        causal: no token looks at a later one.
        bias: of the projections to q and k.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, dim) -> (b, n, dim).

    Cost: that of attention with three quarters of the weights, 3 c^2.

    Example:
        >>> layer = OptimisedAttention(dim=32, num_heads=4)
        >>> sum(p.numel() for p in layer.parameters() if p.ndim == 2) == 3 * 32**2
        True

    Reference: Mehran Hosseini, Peyman Hosseini, You Need to Pay Better Attention, 2024, arXiv:2403.01643.
    """

    left_out: tuple[str, ...] = ("v",)

    def __init__(
        self, dim: int, num_heads: int = 8, *, causal: bool = False, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, dropout=dropout)
        for name in self.left_out:
            delattr(self, name)
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.ndim == 2 else nn.init.zeros_(p)

    def project(self, x: Tensor, context: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        slices = self.slices(context)
        return self.split(self.q(x), self.num_heads), self.split(self.k(context), self.num_heads), slices

    def slices(self, context: Float[Tensor, "b s c"]) -> Float[Tensor, "b h s d"]:
        """The channels of each head."""
        if context.shape[-1] != self.dim:
            raise ValueError(f"context must have dim={self.dim} channels to be sliced; got {context.shape[-1]}")
        return self.split(context, self.num_heads)

    def new_cache(self, batch: int, capacity: int, **where: object) -> KVCache:
        return KVCache(batch, self.num_heads, capacity, self.head_dim, **where)  # type: ignore[arg-type]


@method(
    "super-attention-efficient",
    kind="layer",
    paper="super-attention",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, equivariant=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class EfficientAttention(OptimisedAttention):
    r"""Attention that projects its queries only: keys and values are slices of the input.

    .. math:: y = \mathrm{concat}_h\; \mathrm{softmax}(x W^q_h\, x_{[h]}^\top / \sqrt d)\, x_{[h]}\; W^o

    Args:
        dim: as for :class:`OptimisedAttention`, and all that follow.

    Cost: that of attention with half of the weights, 2 c^2.

    Example:
        >>> layer = EfficientAttention(dim=32, num_heads=4)
        >>> sum(p.numel() for p in layer.parameters() if p.ndim == 2) == 2 * 32**2
        True

    Reference: Mehran Hosseini, Peyman Hosseini, You Need to Pay Better Attention, 2024, arXiv:2403.01643.
    """

    left_out = ("k", "v")

    def project(self, x: Tensor, context: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        slices = self.slices(context)
        return self.split(self.q(x), self.num_heads), slices, slices


@method(
    "super-attention",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, xfail={"mask_forms": ONE_MASK}),
    example={"dim": 32, "num_heads": 4, "context_length": 64},
    naive=naive,
)
class SuperAttention(EfficientAttention):
    r"""Attention that projects its queries only, over values that a learned matrix has mixed from all positions.

    Keys and values are slices of the input, which saves half of the weights of attention. What is saved pays for a
    matrix from positions to positions, applied to the values from the left before they are gathered; it ties the layer
    to places, and to at most ``context_length`` of them.

    .. math:: y = \mathrm{concat}_h\; \mathrm{softmax}(x W^q_h\, x_{[h]}^\top / \sqrt d)\, W^a x_{[h]}\; W^o

    Args:
        dim: channels in and out, and those of ``context``.
        num_heads: heads; head h reads channels h d to (h + 1) d.
        context_length: the most keys there can be, the paper's N; fewer use the leading block of :math:`W^a`.
        num_alignments: matrices over positions, dividing ``num_heads``: 1 for all heads, as in the paper, up to one for
            each.
        causal: no token looks at a later one; :math:`W^a` is cut to its lower triangle.
        bias: of the projection to q, and one number for each position after :math:`W^a`.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, dim) -> (b, n, dim). ``mask`` is (b, s), True on keys that may be looked at;
    what stands at the others is not mixed into any value.

    Raises:
        ValueError: heads that do not divide, a context of other width or longer than ``context_length``, a mask that
            differs between queries.

    Cost: that of attention with 2 c^2 + N^2 weights, fewer than :class:`OptimisedAttention` has where N < c, and 2 b s^2 c
    more FLOPs, in each step of decoding too: a cache holds what is mixed, not the mixtures.

    Example:
        >>> layer = SuperAttention(dim=32, num_heads=4, context_length=16)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
        >>> sum(p.numel() for p in (layer.q.weight, layer.align, layer.out.weight)) == 2 * 32**2 + 16**2
        True

    Differs: no code was published. The paper is about encoders of fixed length; shorter inputs, the causal form, masks and a
    matrix for each group of heads are readings or additions. The output projection always has a bias.

    Reference: Mehran Hosseini, Peyman Hosseini, You Need to Pay Better Attention, 2024, arXiv:2403.01643.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        context_length: int = 256,
        *,
        num_alignments: int = 1,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, dropout=dropout)
        if context_length < 1:
            raise ValueError(f"context_length={context_length} must be positive")
        if num_alignments < 1 or num_heads % num_alignments:
            raise ValueError(f"num_alignments={num_alignments} must be positive and divide num_heads={num_heads}")
        self.context_length, self.num_alignments = context_length, num_alignments
        self.align = nn.Parameter(torch.empty(num_alignments, context_length, context_length))
        self.shift = nn.Parameter(torch.zeros(num_alignments, context_length)) if bias else None
        for table in self.align:
            nn.init.xavier_uniform_(table)

    @torch.no_grad()
    def start_as_efficient(self) -> None:
        """Let every value be itself: what the layer then computes is :class:`EfficientAttention`."""
        self.align.copy_(torch.eye(self.context_length))
        if self.shift is not None:
            self.shift.zero_()

    def mixed(self, slices: Float[Tensor, "b h s d"], seen: Tensor | None) -> Float[Tensor, "b h s d"]:
        """Every value from those of all tokens that are ``seen`` (b, 1, 1, s)."""
        s = slices.shape[2]
        if s > self.context_length:
            raise ValueError(f"{s} keys are more than context_length={self.context_length}")
        if seen is not None:
            if seen.shape[-2] != 1:
                raise ValueError(f"mask must be (b, s), the same for every query; got {tuple(seen.shape)}")
            slices = slices.masked_fill(~seen.transpose(-1, -2), 0.0)
        table = self.align[:, :s, :s].tril() if self.causal else self.align[:, :s, :s]
        values = torch.einsum("mij,bmrjd->bmrid", table, slices.unflatten(1, (self.num_alignments, -1)))
        if self.shift is not None:
            values = values + self.shift[:, None, :s, None]
        return values.flatten(1, 2)

    def seam(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b h l e"]:
        return super().seam(q, k, self.mixed(v, mask), mask)


@torch.no_grad()
def convert(
    attention: nn.MultiheadAttention, to: type[OptimisedAttention], *, strict: bool = False
) -> OptimisedAttention:
    r"""A layer with fewer projections from a multi-head attention, the same function where that has one head.

    The projections that go are multiplied into those that stay: that of the values into the output's, that of the keys
    into the queries'. With more heads a slice holds a part of each product only, which is the nearest there is.

    Args:
        attention: of torch, with keys and values as wide as the queries; it is not changed.
        to: :class:`OptimisedAttention` or :class:`EfficientAttention`.
        strict: refuse more than one head, where otherwise there is a warning.

    Raises:
        ValueError: another ``to``, keys or values of another width, ``strict`` with more than one head.
    """
    if to not in (OptimisedAttention, EfficientAttention):
        raise ValueError(f"to={to.__name__} must be OptimisedAttention or EfficientAttention")
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError("attention must have keys and values of embed_dim channels, and no keys of its own")
    heads, bias = attention.num_heads, attention.in_proj_bias
    if heads > 1 and strict:
        raise ValueError(f"attention has num_heads={heads}: one head converts exactly; strict=False takes the nearest")
    if heads > 1:
        warnings.warn(f"num_heads={heads}: only one head converts exactly", stacklevel=2)
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = (w_q.new_zeros(3 * len(w_q)) if bias is None else bias).chunk(3)
    out = attention.out_proj
    state = {"q.weight": w_q.clone(), "q.bias": b_q.clone(), "k.weight": w_k, "k.bias": b_k}
    state["out.weight"] = torch.empty_like(out.weight)
    state["out.bias"] = out.weight @ b_v + (0.0 if out.bias is None else out.bias)
    for own in torch.arange(len(w_q)).chunk(heads):
        state["out.weight"][:, own] = out.weight[:, own] @ w_v[own][:, own]
        if to is EfficientAttention:
            state["q.weight"][own] = w_k[own][:, own].T @ w_q[own]
            state["q.bias"][own] = w_k[own][:, own].T @ b_q[own]
    layer = to(attention.embed_dim, heads, bias=bias is not None, dropout=attention.dropout).to(w_q)
    layer.load_state_dict({name: state[name] for name in layer.state_dict()})
    return layer.train(attention.training)
