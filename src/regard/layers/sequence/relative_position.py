"""Attention whose scores know how far, and in which direction, a key is from its query: five ways to tell them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.catalog.registry import Tags, method
from regard.nn import Attention, Cache, KVCache, expand_mask
from regard.ops import attend as ops

Scores = Float[Tensor, "b h l s"]
Queries = Float[Tensor, "b h l d"]
Keys = Float[Tensor, "b g s d"]
Index = Int[Tensor, "b l s"]

# A position is two channels, p // 256 and p % 256: whole numbers up to 256 are exact in every floating point type.
BASE = 256
PRODUCTS = 1 << 22
TAGS = Tags(causal=True, mask=True, cache=True, grouped=True)
EXAMPLE = {"dim": 32, "num_heads": 4, "max_distance": 8}


def naive(layer: RelativeAttention, x: Tensor, *, mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
    """Pair by pair."""
    q, k, v = Attention.project(layer, x, x)
    (b, h, n, d), m, table = q.shape, layer.max_distance, layer.table
    shared = torch.arange(h) // (h // k.shape[1])
    k, v = k[:, shared], v[:, shared]

    def score(q: Tensor, k: Tensor, apart: int) -> Tensor:
        apart = max(1 - m, min(m - 1, apart))
        a = table[abs(apart) if isinstance(layer, RelativeM1) else apart + m - 1]
        match layer:
            case RelativeM1() | RelativeM2():
                return (q * k).sum(-1) * a
            case RelativeM3():
                return (q * k * a).sum(-1)
            case RelativeM4():
                return (q * k + q * a + k * a).sum(-1)
        return (q * k + q * a).sum(-1)

    everything = torch.ones(b, h, n, n, dtype=torch.bool)
    allowed = ops.merge_masks(everything, ops.causal_mask(n, n) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    rows = []
    for i in range(n):
        scores = torch.stack([score(q[:, :, i], k[:, :, j], j - i) for j in range(n)], -1) / d**0.5
        shares = torch.where(allowed[:, :, i], (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
        total = shares.sum(-1, keepdim=True)
        weights = shares / torch.where(total > 0, total, 1.0)
        rows.append(torch.einsum("bhs,bhse->bhe", weights, v).flatten(1))
    return layer.out(torch.stack(rows, 1))


class RelativeAttention(Attention, ABC):
    """What all forms share: where tokens stand, and the entry of a table for every query and key.

    Positions are the last two channels of queries and keys, so that both know their place whatever rows are asked for and
    whatever a cache has forgotten.
    """

    takes_rotary = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        max_distance: int = 512,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        if max_distance < 1:
            raise ValueError(f"max_distance={max_distance} must be at least 1")
        self.max_distance = max_distance
        self.table = nn.Parameter(self.make_table())

    @abstractmethod
    def make_table(self) -> Tensor:
        """The entries of all distances, as a layer starts."""

    @abstractmethod
    def compare(self, q: Queries, k: Keys, index: Index) -> Scores:
        """Scores before their scale; ``index`` is where a table of 2 m - 1 entries holds that of a pair, m - 1 being here."""

    def scores(self, q: Queries, k: Keys) -> Scores:
        d, m = self.head_dim, self.max_distance
        at_q, at_k = ((y[:, 0, :, d] * BASE + y[:, 0, :, d + 1]).long() for y in (q.float(), k.float()))
        index = (at_k[:, None] - at_q[:, :, None]).clamp(1 - m, m - 1) + m - 1
        return self.compare(q[..., :d], k[..., :d], index) * self.scale

    def project(
        self,
        x: Tensor,
        context: Tensor,
        start: int = 0,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if context is not x and context_positions is None:
            raise ValueError("context was given without context_positions: how far its tokens are from x is not known")
        q, k, v = super().project(x, context, start)
        if positions is None:
            check_exact(start + x.shape[1] - 1, q.dtype)
        own = torch.arange(start, start + x.shape[1], device=x.device) if positions is None else positions
        return self.place(q, own), self.place(k, own if context_positions is None else context_positions), v

    def place(self, y: Float[Tensor, "b h n d"], positions: Tensor) -> Float[Tensor, "b h n more"]:
        at = torch.stack((positions // BASE, positions % BASE), -1).unsqueeze(-3).to(y.dtype)
        return torch.cat((y, at.expand(*y.shape[:3], 2)), -1)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        if positions is None and context_positions is None:
            return super().forward(x, context, mask=mask, grid=grid, cache=cache)
        source = x if context is None else context
        for name, at, tokens in (("positions", positions, x), ("context_positions", context_positions, source)):
            if at is not None and (at.shape != tokens.shape[:2] or at.is_floating_point()):
                raise ValueError(f"{name} must be whole, {tuple(tokens.shape[:2])}; got {at.dtype}, {tuple(at.shape)}")
            if at is not None and at.numel():
                check_exact(int(at.abs().max()), tokens.dtype)
        if context is None and context_positions is not None:
            raise ValueError("context_positions were given without a context")
        where = {"positions": positions, "context_positions": context_positions}
        return self.merge(self.seam(*self.prepare(x, context, mask, cache, **where)))

    def new_cache(self, batch: int, capacity: int, **where: object) -> KVCache:
        return KVCache(batch, self.num_kv_heads, capacity, self.head_dim + 2, self.head_dim, **where)  # type: ignore[arg-type]


def check_exact(farthest: int, dtype: torch.dtype) -> None:
    if farthest >= 2 * BASE / torch.finfo(dtype).eps:
        raise ValueError(f"position {farthest} is not exact as two numbers of {dtype}")


def toward(y: Float[Tensor, "b h l d"], table: Float[Tensor, "t d"], index: Index) -> Scores:
    r""":math:`y_i \cdot a_{ij}`, without the tensor of all :math:`a_{ij}`: products with the table, entries picked."""
    return (y @ table.T).gather(-1, index[:, None].expand(-1, y.shape[1], -1, -1))


@method("relative-position", kind="layer", tags=TAGS, example=EXAMPLE, naive=naive)
class RelativeM4(RelativeAttention):
    r"""Method 4: query, key and the embedding of their distance are multiplied with each other, two by two, and summed.

    Adding embeddings p of absolute positions to tokens gives scores with four terms, of which three have a position in
    them. Here the position is that of the key as seen from the query, :math:`a_{ij}`, which interacts with both, so the
    layer contains what absolute positions can say and does not depend on where a sequence begins. Distances are clipped:
    sequences may be longer than those of training. Replace absolute embeddings with it, do not add to them. The paper's
    other methods are ``relative-position-m1``, ``-m2``, ``-m3`` and ``-shaw``.

    .. math:: s_{ij} = \frac{q_i \cdot k_j + q_i \cdot a_{ij} + k_j \cdot a_{ij}}{\sqrt d}, \qquad
        a_{ij} = \mathrm{table}[\mathrm{clip}(j - i,\, 1 - m,\, m - 1) + m - 1]

    Args:
        dim: channels in and out.
        num_heads: query heads; all share one table.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head, d; default ``dim // num_heads``.
        max_distance: m; pairs at least m - 1 apart share an embedding.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        dropout: of the weights, in training.

    Shape: x (b, n, dim) -> (b, n, dim); weights (b, num_heads, n, s). ``positions`` (b, n), whole numbers, where they are
    not 0 .. n - 1 after what is cached. With a context (b, s, context_dim), ``context_positions`` (b, s) say where its
    tokens are.

    Raises:
        ValueError: heads that do not divide, ``max_distance`` below 1, a context without positions, positions of another
            shape or not whole, or of 65,536 and more in bfloat16.

    Cost: that of attention with the matrix in the open, 4 b n (2 m - 1) c more FLOPs and, for one key head at a time, a
    tensor of b n (2 m - 1); (2 m - 1) d more parameters.

    Example:
        >>> layer = RelativeM4(dim=32, num_heads=4, max_distance=16)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> torch.allclose(layer(x), layer(x, positions=torch.arange(90, 97).expand(2, -1)), atol=1e-5)
        True

    Differs: rows of the table count key minus query as the paper writes; transformers counts query minus key
    (:func:`from_transformers`). Longer distances are clipped, which transformers does not do. Where the gains of m1 to m3
    start is not in the paper; at 1 they are plain attention. One table serves all heads of a layer.

    Reference: Zhiheng Huang, Davis Liang, Peng Xu, Bing Xiang, Improve Transformer Models with Better Relative Position
    Embeddings, Findings of EMNLP 2020, arXiv:2009.13658
    """

    def make_table(self) -> Tensor:
        return 0.02 * torch.randn(2 * self.max_distance - 1, self.head_dim)

    def compare(self, q: Queries, k: Keys, index: Index) -> Scores:
        scores, back = [], index.mT.contiguous()
        for own, key in zip(q.unflatten(1, (k.shape[1], -1)).unbind(1), k.split(1, 1)):
            scores.append(own @ key.mT + toward(own, self.table, index) + toward(key, self.table, back).mT)
        return torch.cat(scores, 1)


@method("relative-position-shaw", kind="layer", paper="relative-position", tags=TAGS, example=EXAMPLE, naive=naive)
class RelativeShaw(RelativeAttention):
    r"""The baseline of the paper: the embedding of the distance meets the query alone, :math:`q_i \cdot (k_j + a_{ij})`.

    Shaw et al. (2018) also add embeddings to values; BERT's variants do not, as here. Arguments as for :class:`RelativeM4`.
    """

    def make_table(self) -> Tensor:
        return 0.02 * torch.randn(2 * self.max_distance - 1, self.head_dim)

    def compare(self, q: Queries, k: Keys, index: Index) -> Scores:
        return ops.scores(q, k, scale=1.0) + toward(q, self.table, index)


@method("relative-position-m1", kind="layer", paper="relative-position", tags=TAGS, example=EXAMPLE, naive=naive)
class RelativeM1(RelativeAttention):
    r"""Method 1: a score times one number per head and distance without direction, :math:`(q_i \cdot k_j)\, a_{|i - j|}`.

    They start at 1, plain attention; weight decay pulls them to attention without content. Arguments: :class:`RelativeM4`.
    """

    def make_table(self) -> Tensor:
        return torch.ones(self.max_distance, self.num_heads)

    def compare(self, q: Queries, k: Keys, index: Index) -> Scores:
        apart = (index - self.max_distance + 1).abs()
        return ops.scores(q, k, scale=1.0) * self.table[apart].permute(0, 3, 1, 2)


@method("relative-position-m2", kind="layer", paper="relative-position", tags=TAGS, example=EXAMPLE, naive=naive)
class RelativeM2(RelativeAttention):
    r"""Method 2: as :class:`RelativeM1`, with a number per direction as well, :math:`(q_i \cdot k_j)\, a_{j - i}`."""

    def make_table(self) -> Tensor:
        return torch.ones(2 * self.max_distance - 1, self.num_heads)

    def compare(self, q: Queries, k: Keys, index: Index) -> Scores:
        return ops.scores(q, k, scale=1.0) * self.table[index].permute(0, 3, 1, 2)


@method("relative-position-m3", kind="layer", paper="relative-position", tags=TAGS, example=EXAMPLE, naive=naive)
class RelativeM3(RelativeAttention):
    r"""Method 3: query, key and a vector per distance multiplied channel by channel, :math:`\sum_c q_{ic} k_{jc} a_{ijc}`.

    The vectors start at 1, as plain attention. There are n s d products per head; they are taken a few rows at a time, and
    again for the backward pass. Arguments as for :class:`RelativeM4`.
    """

    def make_table(self) -> Tensor:
        return torch.ones(2 * self.max_distance - 1, self.head_dim)

    def compare(self, q: Queries, k: Keys, index: Index) -> Scores:
        k = ops.widen(k, q.shape[1] // k.shape[1])
        chunk = max(1, PRODUCTS // max(1, k.numel()))

        def part(q: Tensor, index: Tensor) -> Tensor:
            return torch.einsum("bhld,blsd,bhsd->bhls", q, self.table[index], k)

        parts = list(zip(q.split(chunk, 2), index.split(chunk, 1)))
        if len(parts) == 1:
            return part(*parts[0])
        return torch.cat([checkpoint(part, *p, use_reentrant=False, preserve_rng_state=False) for p in parts], 2)


def from_transformers(weight: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
    """The ``table`` for a ``distance_embedding.weight`` of transformers (``relative_key``: Shaw, ``relative_key_query``: M4).

    Raises:
        ValueError: an even number of rows.
    """
    if len(weight) % 2 == 0:
        raise ValueError(f"weight must have 2 m - 1 rows; got {len(weight)}")
    return weight.flip(0)
