"""Dual attention: some heads gather what other tokens are, others how the token relates to them."""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, Cache, KVCache, expand_mask
from regard.ops import attend as ops


def naive(
    layer: DualAttention, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """Pair by pair: what token j sends to token i, then its weighted sum."""
    source = x if context is None else context
    (b, l, _), s, h, d = x.shape, source.shape[1], layer.num_heads, layer.head_dim
    everything = torch.ones(b, h, l, s, dtype=torch.bool)
    allowed = ops.merge_masks(everything, ops.causal_mask(l, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    q, k = layer.q(x).unflatten(-1, (h, d)), layer.k(source).unflatten(-1, (h, d))
    heads = []
    for head in range(h):
        logits = torch.einsum("bid,bjd->bij", q[:, :, head], k[:, :, head]) / sqrt(d)
        shares = torch.where(allowed[:, head], (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
        total = shares.sum(-1, keepdim=True)
        shares = shares / torch.where(total > 0, total, 1.0)
        if head < layer.num_sensory:
            message = layer.v(source).unflatten(-1, (-1, d))[:, None, :, head].expand(-1, l, -1, -1)
        else:
            own, chosen = head - layer.num_sensory, layer.symbols(source)  # type: ignore[misc]
            width = layer.num_relational * d // layer.num_relations
            of_queries, of_keys = (m.unflatten(-1, (-1, width)) for m in (layer.q_rel(x), layer.key_relations(source)))
            relations = torch.einsum("bird,bjrd->bijr", of_queries, of_keys) / sqrt(width)
            symbols = layer.v_symbol(chosen).unflatten(-1, (-1, d))[:, None, :, own]
            message = relations @ layer.w_r[own].T + symbols
        heads.append((shares[..., None] * message).sum(2))
    return layer.out(torch.cat(heads, -1))


class SymbolicAttention(nn.Module):
    r"""A symbol for each token, chosen from a learned library by what the token is, :math:`\mathrm{softmax}(x W T^\top) S`.

    Args:
        dim: channels of tokens and symbols.
        num_heads: choices made side by side.
        num_symbols: symbols in the library.
    """

    def __init__(self, dim: int, num_heads: int = 4, num_symbols: int = 64) -> None:
        super().__init__()
        if num_symbols < 1:
            raise ValueError(f"num_symbols={num_symbols} must be positive")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads, self.q = num_heads, nn.Linear(dim, dim)
        self.templates, self.library = (nn.Parameter(torch.randn(num_symbols, dim)) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = (
            m.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for m in (self.q(x), self.templates, self.library)
        )
        return ops.attend(q, k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1)).transpose(1, 2).flatten(2)


class PositionalSymbols(nn.Module):
    """A learned symbol for each position.

    Args:
        dim: channels of a symbol.
        max_length: positions that have one.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_length, dim)

    def forward(self, x: Float[Tensor, "b n c"], start: int = 0) -> Float[Tensor, "b n c"]:
        """``start``: the position of the first token."""
        if start + x.shape[1] > self.table.num_embeddings:
            raise ValueError(f"{start + x.shape[1]} positions are more than max_length={self.table.num_embeddings}")
        return self.table.weight[start : start + x.shape[1]].expand(len(x), -1, -1)


class SplitLinear(nn.Module):
    """A linear map of the first ``first`` channels and one of the others, each to as many as it reads."""

    def __init__(self, dim: int, first: int) -> None:
        super().__init__()
        self.sizes = [size for size in (first, dim - first) if size]
        self.parts = nn.ModuleList(nn.Linear(size, size) for size in self.sizes)

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return torch.cat([linear(part) for linear, part in zip(self.parts, x.split(self.sizes, -1))], -1)


@method(
    "dual-attention-transformer",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, equivariant=True),
    example={"dim": 32, "num_heads": 4, "num_relational": 2, "num_symbols": 8},
    naive=naive,
)
class DualAttention(Attention):
    r"""Attention with two kinds of heads: sensory ones gather values, relational ones gather relations and symbols.

    A relational head chooses tokens as any other does, but what they send says how the receiver relates to the sender,
    in R inner products that all heads share, and who the sender is, by a symbol. Features of the sender do not pass, so
    what is computed from relations holds for objects that were never seen.

    .. math::
        y^{sensory}_i = \sum_j \alpha^h_{ij}\, W_v^h x_j, \qquad
        y^{relational}_i = \sum_j \alpha^h_{ij} \big(W_r^h r_{ij} + W_s^h s_j\big), \qquad
        r_{ij} = \Big(\frac{W^{q,l}_{rel} x_i \cdot W^{k,l}_{rel} x_j}{\sqrt{d_r}}\Big)_{l = 1 .. R}

    A relation is linear in its key: the weighted sum of relations is the relation to the weighted sum of keys. So relational
    heads go through the attention kernel as others do, with the keys of the relations beside the symbols, and the relations
    of all pairs are never stored.

    Args:
        dim: channels in and out.
        num_heads: heads of both kinds.
        head_dim: channels of one head, d; default ``dim // num_heads``.
        num_relational: how many of them, the last ones, are relational; default half, rounded down.
        num_relations: inner products R that make up a relation, dividing ``num_relational * head_dim``; default
            ``num_relational``.
        num_symbols: size of the library that the layer's own :class:`SymbolicAttention` chooses from; None: it has none,
            and ``symbols`` must be given.
        symmetric: queries and keys of relations are projected by one matrix, so that r_ij = r_ji.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k, v and the symbols' values.
        dropout: of the weights, in training; relations and symbols alike go with them.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim). ``symbols`` (b, s, context_dim) are those of the tokens
    that are looked at, made once for all layers of a network; default the layer's own.

    Raises:
        ValueError: heads that do not divide, counts out of range, no symbols or symbols of another shape.

    Cost: 2 b n s d FLOPs for the scores of each head and 2 b n s d for what it gathers, plus 2 b n s d m for each of m
    relational heads, and b m s d (m + 1) numbers for what these heads read. Weights are in the open where torch's kernel
    wants values as wide as keys, as on a CPU. A cache holds m d numbers more for a token.

    Example:
        >>> layer = DualAttention(dim=32, num_heads=4, num_relational=2)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> symbols = PositionalSymbols(32, max_length=16)
        >>> DualAttention(dim=32, num_relational=8, num_symbols=None)(x, symbols=symbols(x)).shape
        torch.Size([2, 7, 32])

    Differs: the official code adds up relations pair by pair, which allows for an activation of them; with none, as in its
    examples, the order used here is the same function. Its dropout of symbols goes on in ``eval``; here symbols have none.
    Output projections always have a bias. Grouped key heads, shared attention of both kinds and symbols of relative
    positions are left out, and so are the network's blocks.

    Reference: Awni Altabaa, John Lafferty, Disentangling and Integrating Relational and Sensory Information in Transformer
    Architectures, ICML 2025, arXiv:2405.16727.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        num_relational: int | None = None,
        num_relations: int | None = None,
        num_symbols: int | None = 64,
        symmetric: bool = False,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, head_dim=head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        context_dim = self.k.in_features
        m = num_heads // 2 if num_relational is None else num_relational
        if not 0 <= m <= num_heads:
            raise ValueError(f"num_relational={m} must be in 0..num_heads={num_heads}")
        self.num_sensory, self.num_relational, self.symmetric = num_heads - m, m, symmetric
        self.num_relations = m if num_relations is None else num_relations
        inner, relational = num_heads * self.head_dim, m * self.head_dim
        if m and (self.num_relations < 1 or relational % self.num_relations):
            raise ValueError(f"num_relations={self.num_relations} must divide {m} heads x {self.head_dim} channels")
        if symmetric and m and context_dim != dim:
            raise ValueError(f"symmetric relations need context_dim={context_dim} to be dim={dim}")
        self.spare = -relational % num_heads
        self.v = nn.Linear(context_dim, inner - relational, bias=bias) if m < num_heads else None  # type: ignore[assignment]
        self.out = SplitLinear(inner, inner - relational)  # type: ignore[assignment]
        if not m:
            return
        self.q_rel = nn.Linear(dim, relational, bias=False)
        self.k_rel = None if symmetric else nn.Linear(context_dim, relational, bias=False)
        self.v_symbol = nn.Linear(context_dim, relational, bias=bias)
        self.w_r = nn.Parameter(torch.empty(m, self.head_dim, self.num_relations))
        nn.init.kaiming_uniform_(self.w_r, a=sqrt(5))
        self.symbols = None if num_symbols is None else SymbolicAttention(context_dim, 1, num_symbols)

    def key_relations(self, context: Float[Tensor, "b s e"]) -> Float[Tensor, "b s m"]:
        return self.q_rel(context) if self.k_rel is None else self.k_rel(context)

    def spread(self, x: Float[Tensor, "b n m"]) -> Float[Tensor, "b h n w"]:
        """Channels of the relations, an equal share to each head: that is how they travel with queries and keys."""
        return self.split(nn.functional.pad(x, (0, self.spare)), self.num_heads)

    def gathered(self, x: Float[Tensor, "b h n dw"]) -> Float[Tensor, "b 1 n m"]:
        """What :meth:`spread` put behind the channels of a head."""
        shares = x[..., self.head_dim :].transpose(1, 2).flatten(2)
        return shares[:, None, :, : self.num_relational * self.head_dim]

    def project(
        self, x: Tensor, context: Tensor, start: int = 0, symbols: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.split(self.q(x), self.num_heads), self.split(self.k(context), self.num_heads)
        values = [] if self.v is None else [self.v(context)]
        if self.num_relational:
            if symbols is None:
                if self.symbols is None:
                    raise ValueError("symbols must be given: num_symbols=None, so the layer has none of its own")
                symbols = self.symbols(context)
            if symbols.shape != context.shape:
                raise ValueError(
                    f"symbols must be {tuple(context.shape)}, one for each token; got {tuple(symbols.shape)}"
                )
            values.append(self.v_symbol(symbols))
            q = torch.cat([q, self.spread(self.q_rel(x))], -1)
            k = torch.cat([k, self.spread(self.key_relations(context))], -1)
        return q, k, self.split(torch.cat(values, -1), self.num_heads)

    def scores(self, q: Float[Tensor, "b h l dw"], k: Float[Tensor, "b h s dw"]) -> Float[Tensor, "b h l s"]:
        return super().scores(q[..., : self.head_dim], k[..., : self.head_dim])

    def relations(self, q: Float[Tensor, "b h l dw"], k: Float[Tensor, "b h s dw"]) -> Float[Tensor, "b r l s"]:
        """Every r_ij in the open."""
        r = self.num_relations
        of_queries, of_keys = (self.gathered(m)[:, 0].unflatten(-1, (r, -1)).transpose(1, 2) for m in (q, k))
        return ops.scores(of_queries, of_keys)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b h l e"]:
        d, first, outs = self.head_dim, self.num_sensory, []
        for heads in (slice(0, first), slice(first, self.num_heads)):
            if heads.start == heads.stop:
                continue
            values, relational = v[:, heads], heads.start == first
            if relational:
                values = torch.cat([values, self.gathered(k).expand(-1, self.num_relational, -1, -1)], -1)
            out = ops.attend(
                q[:, heads, :, :d],
                k[:, heads, :, :d],
                values,
                mask=mask if mask is None or mask.shape[1] == 1 else mask[:, heads],
                causal=self.causal,
                scale=self.scale,
                dropout=self.dropout if self.training else 0.0,
            )
            if relational:
                products = (self.gathered(q) * out[..., d:]).unflatten(-1, (self.num_relations, -1))
                relations = products.sum(-1) * products.shape[-1] ** -0.5
                out = out[..., :d] + torch.einsum("bhlr,hdr->bhld", relations, self.w_r)
            outs.append(out)
        return torch.cat(outs, 1)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        symbols: Tensor | None = None,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        return self.merge(self.seam(*self.prepare(x, context, mask, cache, symbols=symbols)))

    def new_cache(self, batch: int, capacity: int, **where: object) -> KVCache:
        share = (self.num_relational * self.head_dim + self.spare) // self.num_heads
        return KVCache(batch, self.num_heads, capacity, self.head_dim + share, self.head_dim, **where)  # type: ignore[arg-type]
