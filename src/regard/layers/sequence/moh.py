"""Mixture-of-head attention: every token picks the heads that answer it, and how much each counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, Cache, expand_mask
from regard.ops import attend as ops
from regard.ops.rows import single

Queries = Float[Tensor, "b h n d"]
Shares = Float[Tensor, "b n e"]
Gates = Float[Tensor, "b n h"]


def naive(
    layer: MixtureOfHeads, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """One token and one head after the other; heads that are off are left out of the sum."""
    q, k, v = layer.project(x, x if context is None else context)
    (b, h, n, d), (g, s), shared = q.shape, k.shape[1:3], layer.shared_heads
    everything = torch.ones(b, h, n, s, dtype=torch.bool)
    allowed = ops.merge_masks(everything, ops.causal_mask(n, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None

    def most(p: Tensor) -> list[int]:
        return sorted(range(len(p)), key=lambda head: -p[head].item())[: layer.active_heads]

    def gates(token: Tensor, queries: Tensor) -> dict[int, Tensor]:
        one = token.new_ones(())
        if not isinstance(layer, MixtureOfHeadAttention):
            norms = queries[shared:].square().sum(-1).sqrt()
            p = (norms / (norms.std() if len(norms) > 1 else 1.0)).softmax(-1)
            return {**dict.fromkeys(range(shared), one), **{shared + j: 1 + p[j] - p[j].item() for j in most(p)}}
        own = [one] * shared if shared < 2 else [*(shared * (layer.share.weight @ token).softmax(-1))]
        if not layer.active_heads:
            return dict(enumerate(own))
        p = (layer.router.weight @ token).softmax(-1)
        mine, theirs = 2 * (layer.balance.weight @ token).softmax(-1) if shared else (one, one)
        total = sum(p[j] for j in most(p)) / layer.active_heads
        return {**{i: mine * y for i, y in enumerate(own)}, **{shared + j: theirs * p[j] / total for j in most(p)}}

    rows = []
    for i, t in ((i, t) for i in range(b) for t in range(n)):
        y: Tensor = layer.out.bias
        for head, gate in gates(x[i, t], q[i, :, t]).items():
            seen = (q[i, head, t] @ k[i, head * g // h].T / d**0.5).exp() * allowed[i, head, t]
            mixed = seen @ v[i, head * g // h] / (seen.sum() if seen.sum() > 0 else 1.0)
            y = y + layer.out.weight[:, head * d : (head + 1) * d] @ (gate * mixed)
        rows.append(y)
    return torch.stack(rows).unflatten(0, (b, n))


def highest(p: Shares, k: int) -> Bool[Tensor, "b n e"]:
    """True for the ``k`` largest of each row, the first ones of those that are equal."""
    order = p.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order[..., :k], True)


class MixtureOfHeads(Attention, ABC):
    """What both routers share: heads that are always on come first, of the others each token takes a few."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        shared_heads = num_heads // 4 if shared_heads is None else shared_heads
        active_heads = max(1, num_heads // 2) if active_heads is None else active_heads
        if min(shared_heads, active_heads) < 0 or not 1 <= shared_heads + active_heads <= num_heads:
            raise ValueError(
                f"shared_heads={shared_heads} and active_heads={active_heads} must add up to 1 .. num_heads={num_heads}"
            )
        if not active_heads and shared_heads < num_heads:
            raise ValueError(f"active_heads=0 leaves {num_heads - shared_heads} of num_heads={num_heads} never on")
        self.shared_heads, self.active_heads = shared_heads, active_heads
        self.add_routers()

    def add_routers(self) -> None:
        """What a router learns, if it learns something."""

    @property
    def routed_heads(self) -> int:
        return self.num_heads - self.shared_heads

    @abstractmethod
    def route(self, x: Float[Tensor, "b n c"], q: Queries | None = None) -> Shares:
        """How much each token wants each of the routed heads; rows sum to 1. ``q``: its queries, where they are at hand."""

    @abstractmethod
    def gates(self, x: Float[Tensor, "b n c"], q: Queries | None = None) -> Gates:
        """What the output of each head is multiplied by, zero where it is off. ``q``: queries before a turn, if at hand."""

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        q, k, v, allowed = self.prepare(x, context, mask, cache)
        gates = self.gates(x, q if self.rotary is None else None)
        return self.merge(gates.mT[..., None] * self.seam(q, k, v, allowed))

    def balance_loss(self, x: Float[Tensor, "b n c"], mask: Tensor | None = None) -> Float[Tensor, ""]:
        r"""How unevenly tokens pick routed heads, :math:`E \sum_j P_j f_j`: K when they are balanced, up to E with K = 1.

        :math:`P_j` is the mean share of head j and :math:`f_j` how often it is picked, over tokens that are not padding: a
        2-D ``mask`` (b, s), of which the last n count. Zero where no head is routed.
        """
        if not self.active_heads:
            return x.new_zeros(())
        p = self.route(x)
        counted = p.new_ones(p.shape[:2]) if mask is None or mask.ndim != 2 else mask[:, -x.shape[1] :].to(p.dtype)
        counted = counted[..., None] / counted.sum().clamp(min=1.0)
        wanted, picked = ((counted * y).sum((0, 1)) for y in (p, highest(p, self.active_heads)))
        return self.routed_heads * wanted @ picked


TAGS = Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True)
HARD = replace(TAGS, xfail={"gradcheck": "gates are 0 or 1; their gradient is that of the share, straight through"})
EXAMPLE = {"dim": 32, "num_heads": 4, "shared_heads": 1, "active_heads": 2}


@method("moh", kind="layer", tags=TAGS, example=EXAMPLE, naive=naive)
class MixtureOfHeadAttention(MixtureOfHeads):
    r"""Attention as a sum over heads in which each token weighs the heads, and leaves some of them out.

    Concatenating heads before the output projection is the same as adding up what each contributes. Here contributions
    are weighed: S shared heads take part for every token, and of the E others the K that a router wants most. Gates sum to
    nearly the number of heads that are on, so an untrained layer starts near attention with fewer heads.

    .. math::

        y = \sum_h g_h \, \mathrm{softmax}(q_h k_h^\top / \sqrt d)\, v_h W^o_h, \qquad
        (b_0, b_1) = 2\, \mathrm{softmax}(W_0 x)

        g_{shared} = b_0\, S\, \mathrm{softmax}(W_1 x), \qquad
        g_{routed} = b_1\, K\, \frac{p \odot \mathrm{TopK}(p)}{\sum_{\mathrm{TopK}} p}, \qquad p = \mathrm{softmax}(W_g x)

    Train with a hundredth of :func:`balance_losses` on top, or few heads do all the work. A head that is off for a token
    still keeps that token's key and value: others may look at it. All heads are computed; :func:`active_only` skips rows.

    Args:
        dim: channels in and out.
        num_heads: query heads, the shared ones first.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head, d; default ``dim // num_heads``.
        shared_heads: S, always on; all of them with ``active_heads=0``; default a quarter of the heads.
        active_heads: K, routed heads that are on for a token; default half of the heads.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v; routers have none.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s).

    Raises:
        ValueError: heads that do not divide, none on, more on than there are, or some that never are.

    Cost: that of attention and (h + 2) c parameters at most; (S + K) / h of its products over tokens in :func:`active_only`.

    Example:
        >>> layer = MixtureOfHeadAttention(dim=32, num_heads=4, shared_heads=1, active_heads=2)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> (layer.gates(x, layer.project(x, x)[0]) > 0).sum(-1).unique().tolist()
        [3]

    Differs: the official code adds its balancing loss to a list that all layers share; here it is asked for. It breaks ties
    between heads as ``topk`` happens to, here the first wins. Cross-attention and grouped heads are additions.

    Reference: Peng Jin, Bo Zhu, Li Yuan, Shuicheng Yan, MoH: Multi-Head Attention as Mixture-of-Head Attention, ICML 2025,
    arXiv:2410.11842
    """

    router: nn.Linear
    share: nn.Linear
    balance: nn.Linear

    def add_routers(self) -> None:
        if self.active_heads:
            self.router = nn.Linear(self.dim, self.routed_heads, bias=False)
        if self.shared_heads > 1:
            self.share = nn.Linear(self.dim, self.shared_heads, bias=False)
        if self.shared_heads and self.active_heads:
            self.balance = nn.Linear(self.dim, 2, bias=False)

    def route(self, x: Float[Tensor, "b n c"], q: Queries | None = None) -> Shares:
        return single(self.router(x)).softmax(-1)

    def gates(self, x: Float[Tensor, "b n c"], q: Queries | None = None) -> Gates:
        shared, active = self.shared_heads, self.active_heads
        own = shared * single(self.share(x)).softmax(-1) if shared > 1 else x.new_ones(*x.shape[:2], shared)
        if not active:
            return own.to(x.dtype)
        p = self.route(x)
        kept = p * highest(p, active)
        routed = active * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
        if not shared:
            return routed.to(x.dtype)
        weights = 2 * single(self.balance(x)).softmax(-1)
        return torch.cat((weights[..., :1] * own, weights[..., 1:] * routed), -1).to(x.dtype)


@method("moh-query-norm", kind="layer", paper="moh", tags=HARD, example=EXAMPLE, naive=naive)
class QueryNormMixture(MixtureOfHeads):
    r"""The form for models that are trained already: heads whose queries are longest are on, and all that are on count 1.

    .. math:: p = \mathrm{softmax}\big(\|q_j\|_2 / \mathrm{std}_j \|q_j\|_2\big), \qquad g_j = \mathrm{TopK}(p)_j \in \{0, 1\}

    There is nothing new to learn: queries are those before rotary positions, and gradients reach them as if a gate were its
    share p. The standard deviation is over the routed heads of a token, by E - 1. With all heads on it is attention. Swapped
    into a model it takes over the weights, the first heads being the shared ones. Arguments as for
    :class:`MixtureOfHeadAttention`.
    """

    def route(self, x: Float[Tensor, "b n c"], q: Queries | None = None) -> Shares:
        q = self.split(self.q(x), self.num_heads) if q is None else q
        norms = single(q[:, self.shared_heads :]).norm(dim=-1).mT
        spread = norms.std(-1, correction=min(1, self.routed_heads - 1), keepdim=True)
        return (norms / spread.clamp(min=torch.finfo(norms.dtype).eps)).softmax(-1)

    def gates(self, x: Float[Tensor, "b n c"], q: Queries | None = None) -> Gates:
        shared = x.new_ones(*x.shape[:2], self.shared_heads)
        if not self.active_heads:
            return shared
        p = self.route(x, q)
        return torch.cat((shared, (highest(p, self.active_heads) * (1 + (p - p.detach()))).to(x.dtype)), -1)


@contextmanager
def balance_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect :meth:`MixtureOfHeads.balance_loss` of every layer in ``model`` that runs within; add 0.01 of their mean."""
    losses: list[Tensor] = []

    def note(layer: MixtureOfHeads, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        losses.append(layer.balance_loss(args[0] if args else kwargs["x"], kwargs.get("mask")))

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, MixtureOfHeads):
                hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield losses


def active_only(
    layer: MixtureOfHeads, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """``layer(x, mask=mask)``, of each routed head only the rows of tokens for which it is on."""
    q, k, v = layer.project(x, x)
    gates, groups = layer.gates(x, q).mT, layer.num_heads // layer.num_kv_heads
    if layer.rotary is not None:
        q, k = layer.rotary(q), layer.rotary(k)
    (b, h, n, _), shared = q.shape, layer.shared_heads
    allowed = ops.merge_masks(ops.causal_mask(n, n, x.device) if layer.causal else None, expand_mask(mask))
    allowed = None if allowed is None else allowed.expand(b, h, n, n)
    k, v, out = ops.widen(k, groups), ops.widen(v, groups), q.new_zeros(b, h, n, v.shape[-1])
    if shared:
        seen = None if allowed is None else allowed[:, :shared]
        out[:, :shared] = ops.attend(q[:, :shared], k[:, :shared], v[:, :shared], mask=seen, scale=layer.scale)
    for i, head in ((i, head) for i in range(b) for head in range(shared, h)):
        one, on = (slice(i, i + 1), slice(head, head + 1)), gates[i, head].nonzero().flatten()
        seen = None if allowed is None else allowed[one][:, :, on]
        out[i, head, on] = ops.attend(q[one][:, :, on], k[one], v[one], mask=seen, scale=layer.scale)[0, 0]
    return layer.merge(gates[..., None] * out)
