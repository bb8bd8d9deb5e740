"""Mixture of block attention: every query reads its own block of keys and the few past blocks that fit it best."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.catalog.registry import Tags, method
from regard.nn import Attention
from regard.ops.attend import check_heads, scores
from regard.ops.select import block_means, topk_blocks
from regard.ops.sparse import block_sparse


def _check(block_size: int, topk: int) -> None:
    for name, value in (("block_size", block_size), ("topk", topk)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def moba_gate(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    *,
    block_size: int,
    topk: int,
    visible: Bool[Tensor, "b s"] | None = None,
) -> tuple[Int[Tensor, "b h l k"], Bool[Tensor, "b h l k"]]:
    r"""The blocks that every query reads: its own, and those before it with the largest :math:`q \cdot \bar k_i`.

    The last query stands at the last key. A block is chosen only when it ended before the query's own began, so that no
    mean holds a later key. The choice is made in single precision or better, is not differentiable, and prefers earlier
    blocks among equals.

    Args:
        block_size: keys of a block.
        topk: blocks per query with its own; a query with fewer past blocks reads fewer.
        visible: keys that exist; the others are in no mean. Default all.

    Returns:
        Block numbers and which of them are in use, the query's own first.

    Raises:
        ValueError: a block size or number of blocks below 1, more queries than keys.
    """
    _check(block_size, topk)
    l, s = q.shape[2], k.shape[2]
    if l > s:
        raise ValueError(f"every query needs a key of its own; got l={l}, s={s}")
    real = torch.ones_like(k[:, :1, :, :1]) if visible is None else visible[:, None, :, None].to(k.dtype)
    share = block_means(real, block_size)
    means = block_means(k * real, block_size) / share.masked_fill(share == 0, 1.0)
    affinity = scores(q.to(means.dtype), means, scale=1.0)
    own = torch.arange(s - l, s, device=q.device)[:, None] // block_size
    block = torch.arange(means.shape[2], device=q.device)
    eligible = (block < own) & (share > 0).transpose(-1, -2)
    return topk_blocks(affinity, min(topk, len(block)), eligible, forced=block == own)


def moba_attention(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    *,
    block_size: int,
    topk: int,
    cu_seqlens: Int[Tensor, "m"] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h l e"]:
    """Causal attention over the blocks that :func:`moba_gate` chooses, as one softmax over their keys.

    Args:
        block_size: keys of a block.
        topk: blocks per query with its own.
        cu_seqlens: where packed sequences begin and end, from 0 to the number of tokens; blocks begin anew in each.
        mask: keys that exist, boolean, (b, 1, 1, s), the same for every query and head.
        scale: default 1 / sqrt(d).

    Raises:
        ValueError: what :func:`moba_gate` refuses, heads that do not fit, a mask that differs between queries or heads,
            an empty sequence in ``cu_seqlens`` or one that does not end at the last token.
    """
    check_heads(q, k, v)
    _check(block_size, topk)
    (b, _, l, _), s = q.shape, k.shape[2]
    visible = None
    if mask is not None:
        if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            raise ValueError(f"mask must be (b, 1, 1, s), the same for every query and head; got {tuple(mask.shape)}")
        visible = mask.expand(b, 1, 1, s)[:, 0, 0]
    if cu_seqlens is None:
        index, valid = moba_gate(q, k, block_size=block_size, topk=topk, visible=visible)
        return block_sparse(q, k, v, index, valid, block_size=block_size, causal=True, mask=mask, scale=scale)
    bounds = cu_seqlens.tolist()
    if l != s or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != s or any(i >= j for i, j in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the number of queries and keys; got {l} and {s}")
    outs = [
        moba_attention(
            *(x[:, :, i:j] for x in (q, k, v)),
            block_size=block_size,
            topk=topk,
            mask=None if visible is None else visible[:, None, None, i:j],
            scale=scale,
        )
        for i, j in pairwise(bounds)
    ]
    return torch.cat(outs, 2)


def naive(layer: MoBA, x: Tensor, *, mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
    """One query after the other, with the mean of every block that ended before its own."""
    q, k, v = layer.project(x, x)
    b, h, l, _ = q.shape
    visible = torch.ones(b, l, dtype=torch.bool) if mask is None else mask
    rows = []
    for i in range(b):
        for t in range(l):
            blocks = torch.arange(t + 1).split(layer.block_size)
            blocks = [block[visible[i, block]] for block in blocks]
            for head in range(h):
                query, (keys, values) = q[i, head, t], (z[i, head // (h // k.shape[1])] for z in (k, v))
                past = [block for block in blocks[:-1] if len(block)]
                past.sort(key=lambda block: (query @ keys[block].mean(0)).item(), reverse=True)
                seen = torch.cat(blocks if layer.full else [blocks[-1], *past[: layer.topk - 1]])
                rows.append((keys[seen] @ query * layer.scale).softmax(0) @ values[seen])
    return layer.out(torch.stack(rows).view(b, l, -1))


@method(
    "moba",
    kind="layer",
    tags=Tags(
        causal=True,
        mask=True,
        cache=True,
        grouped=True,
        xfail={"mask_forms": "which blocks a query reads follows from one set of keys: the mask is (b, s)"},
    ),
    example={"dim": 32, "num_heads": 4, "block_size": 4, "topk": 2},
    naive=naive,
)
class MoBA(Attention):
    r"""Causal attention in which each query and head reads its own block of keys and the best fitting past blocks.

    Keys are cut into blocks. A query goes, like a token to its experts, to the ``topk - 1`` past blocks whose mean key
    has the largest dot product with it, and always to its own. There is no parameter more than in attention, so that
    :meth:`set_full` switches between the two in the middle of training.

    .. math::

        y = \mathrm{softmax}\big(q\, K_I^\top / \sqrt d\big) V_I, \qquad
        I = \mathrm{own} \cup \mathrm{top}_{k-1}\big\{ q \cdot \mathrm{mean}(K_i) : i < \mathrm{own} \big\}

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``. Each query head chooses
            for itself.
        head_dim: channels of one head; default ``dim // num_heads``.
        block_size: keys of a block.
        topk: blocks per query with its own.
        full: begin with attention to the whole past.
        bias: of the projections to q, k and v.

    Shape: x (b, n, dim) -> (b, n, dim). ``mask`` is (b, s), tokens that exist. Blocks are counted from the first token,
    so that padding on the left moves them; with a ``cache`` they are counted from the first token that it holds.

    Raises:
        ValueError: a block size or ``topk`` below 1, a context, a mask that differs between queries.

    Cost: 4 b n topk block_size c FLOPs for attention, and 2 b n (n / block_size) c with b h n (n / block_size) numbers
    for the choice. The cache is that of attention.

    Example:
        >>> layer = MoBA(dim=32, num_heads=4, block_size=4, topk=2)
        >>> x = torch.randn(1, 17, 32)
        >>> layer(x).shape
        torch.Size([1, 17, 32])
        >>> q, k, _ = layer.project(x, x)
        >>> blocks, used = moba_gate(q, k, block_size=4, topk=2)
        >>> int(blocks[0, 0, 16, 0]), int(used[0, 0, 2].sum())  # own block of the last token; no past in block 0
        (4, 1)

    Differs: with a cache the blocks are chosen as without; the paper decodes with full attention, which is
    ``set_full(True)`` after the prompt. Masked keys are left out of the means. There is no dropout of weights. Later
    tokens may change the order in which an earlier output is summed, and so its last digit.

    Reference: Enzhe Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, 2025, arXiv:2502.13189.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        block_size: int = 512,
        topk: int = 3,
        full: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, causal=True, bias=bias)
        _check(block_size, topk)
        self.block_size, self.topk, self.full = block_size, topk, full

    def set_full(self, full: bool) -> None:
        """Attend to the whole past, or to the chosen blocks again."""
        self.full = full

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b h l e"]:
        if self.full:
            return super().attend(q, k, v, mask)
        return moba_attention(q, k, v, block_size=self.block_size, topk=self.topk, mask=mask, scale=self.scale)
