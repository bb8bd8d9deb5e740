r"""Attention over chosen blocks or chosen tokens only, from an index table (see :mod:`regard.ops.select`).

:func:`block_sparse` is one softmax over the union of the blocks that a query (or a block of queries) chose, computed
block by block: all queries that chose a key block are multiplied with it at once, and the parts of a query, output and
log-sum-exp :math:`(o_j, \ell_j)`, are merged,

.. math:: o = \sum_j \frac{e^{\ell_j}}{\sum_i e^{\ell_i}} \, o_j .

The scores are made again in the backward pass, so no more than a few million of them exist at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.ops.attend import check_heads, merge_masks, reference, softmax
from regard.ops.select import to_dense

CHUNK = 1 << 22  # elements of scores and gathered keys that are made at one time
ROWS = 64  # query rows that share one read of a key block


def _check_table(
    q: Tensor, k: Tensor, index: Tensor, valid: Tensor, *, block_size: int, query_block: int, causal: bool
) -> tuple[int, int]:
    """Query blocks and key blocks; ValueError when the table does not fit them."""
    if block_size < 1 or query_block < 1:
        raise ValueError(f"block_size={block_size} and query_block={query_block} must be at least 1")
    b, h, l, _ = q.shape
    if causal and l > k.shape[2]:
        raise ValueError(f"causal=True needs at least as many keys as queries; got l={l}, s={k.shape[2]}")
    u, n = -(-l // query_block), -(-k.shape[2] // block_size)
    if index.shape != valid.shape or index.ndim != 4 or index.shape[0] not in (1, b) or index.shape[1] not in (1, h):
        raise ValueError(
            f"index {tuple(index.shape)} and valid {tuple(valid.shape)} must both be ({b} or 1, {h} or 1, {u}, k)"
        )
    if index.shape[2] != u:
        raise ValueError(f"index has {index.shape[2]} rows but {l} queries in blocks of {query_block} make {u}")
    if not torch.compiler.is_compiling():
        used = index[valid]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < n:
            raise ValueError(f"index must name blocks 0..{n - 1}; got {int(used.min())}..{int(used.max())}")
    return u, n


def table_mask(
    index: Int[Tensor, "b h u k"],
    valid: Bool[Tensor, "b h u k"],
    l: int,
    s: int,
    *,
    block_size: int,
    query_block: int = 1,
) -> Bool[Tensor, "b h l s"]:
    """The table as a mask over ``l`` queries and ``s`` keys."""
    dense = to_dense(index, valid, -(-s // block_size))
    return dense.repeat_interleave(query_block, 2)[:, :, :l].repeat_interleave(block_size, 3)[..., :s]


def block_sparse_dense(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    index: Int[Tensor, "..."],
    valid: Bool[Tensor, "..."],
    *,
    block_size: int,
    query_block: int = 1,
    causal: bool = False,
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h l e"]:
    """:func:`block_sparse` as dense attention under the mask of the table."""
    check_heads(q, k, v)
    _check_table(q, k, index, valid, block_size=block_size, query_block=query_block, causal=causal)
    l, s = q.shape[2], k.shape[2]
    chosen = table_mask(index, valid, l, s, block_size=block_size, query_block=query_block)
    return reference(q, k, v, mask=merge_masks(chosen, mask), causal=causal, scale=scale)


def _recompute(function: Callable[..., Any], again: bool) -> Callable[..., Any]:
    """``function``, or the same made again in the backward pass instead of kept."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False) if again else function


def _tiles(key_block: Int[Tensor, "p"], blocks: int, width: int) -> tuple[Int[Tensor, "t w"], Int[Tensor, "t"]]:
    """Pairs in tiles of up to ``width`` of one key block: pair numbers, -1 where unused, and the block of each tile.

    A pair of block ``blocks`` goes nowhere. While compiling, the number of tiles is its upper bound.
    """
    order = key_block.argsort(stable=True)
    start = torch.searchsorted(key_block[order], torch.arange(blocks + 1, device=order.device))
    tiles = -(-start.diff() // width)
    end = tiles.cumsum(0)
    total = len(order) // width + min(blocks, len(order)) if torch.compiler.is_compiling() else int(tiles.sum())
    tile = torch.arange(total, device=order.device)
    block = torch.searchsorted(end, tile, right=True).clamp(max=blocks - 1)
    at = start[block] + (tile - (end - tiles)[block]) * width
    at = at[:, None] + torch.arange(width, device=order.device)
    return torch.where(at < start[block + 1][:, None], order[at.clamp(max=len(order) - 1)], -1), block


def _part(
    q: Float[Tensor, "u r d"],
    k: Float[Tensor, "n s d"],
    v: Float[Tensor, "n s e"],
    unit: Int[Tensor, "t w"],
    block: Int[Tensor, "t"],
    allowed: Bool[Tensor, "t wr s"],
    scale: float,
) -> tuple[Float[Tensor, "t w r e"], Float[Tensor, "t w r"]]:
    """Attention of the units of each tile over the tile's key block, and its log-sum-exp."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q[unit].flatten(1, 2).to(wide) * scale) @ k[block].to(wide).transpose(-1, -2)
    some = allowed.any(-1, keepdim=True)
    # A row with no key here gets finite scores, so that its gradient is zero and not NaN.
    scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~some, 0.0)
    out = (scores.softmax(-1) @ v[block].to(wide)).masked_fill(~some, 0.0)
    lse = scores.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))
    shape = unit.shape[1:] + q.shape[1:2]
    return out.unflatten(1, shape), lse.unflatten(1, shape)


def block_sparse(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    index: Int[Tensor, "..."],
    valid: Bool[Tensor, "..."],
    *,
    block_size: int,
    query_block: int = 1,
    causal: bool = False,
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h l e"]:
    """Attention of every query over the key blocks that the table gives it.

    Time is that of the chosen pairs, memory O(l k e) for the parts of ``k`` slots. A block listed twice counts once; a
    query with nothing to look at is zero. Softmax and sums are in float32 or wider.

    Args:
        index: (b, h, u, k), block numbers, one row per query head and query block; b and h may be 1.
        valid: as ``index``, True on the slots in use.
        block_size: tokens of a key block; the last may be shorter.
        query_block: queries that share a row of the table; ``u = ceil(l / query_block)``.
        causal: no key later than the query; the last query stands at the last key.
        mask: boolean, broadcastable to (b, h, l, s), True where a query may look.
        scale: default 1 / sqrt(d).

    Raises:
        ValueError: heads or widths that do not fit, a table of the wrong shape or with a block that does not exist, a
            causal call with more queries than keys.
    """
    groups = check_heads(q, k, v)
    u, n = _check_table(q, k, index, valid, block_size=block_size, query_block=query_block, causal=causal)
    (b, h, l, d), (_, g, s, e), r = q.shape, v.shape, query_block
    scale = d**-0.5 if scale is None else scale
    mask = None if mask is None else mask.expand(b, h, l, s)
    q_units = F.pad(q, (0, 0, 0, u * r - l)).reshape(b * h * u, r, d)
    k_blocks, v_blocks = (
        F.pad(x, (0, 0, 0, n * block_size - s)).unflatten(2, (n, block_size)).flatten(0, 2) for x in (k, v)
    )

    # A pair is a query block and a slot of its row: with slots sorted, a block that comes again follows itself.
    slots, blocks = index.shape[-1], b * g * n
    index = index.masked_fill(~valid, n).sort(-1).values
    used = (index < n) & F.pad(index[..., 1:] != index[..., :-1], (1, 0), value=True)
    key_head = torch.arange(b, device=q.device)[:, None] * g + torch.arange(h, device=q.device) // groups
    key_block = torch.where(used, key_head[..., None, None] * n + index, blocks).flatten()
    width = max(1, min(ROWS // r, len(key_block) // max(1, blocks)))
    pair, block = _tiles(key_block, blocks, width)

    outs, lses = [], []
    pieces = torch.arange(len(block), device=q.device).split(max(1, CHUNK // (block_size * (width * r + d + e))))
    part = _recompute(_part, len(pieces) > 1)
    for at in pieces:
        unit = pair[at].clamp(min=0) // slots
        row = (unit[..., None] % u * r + torch.arange(r, device=q.device)).flatten(1)[..., None]
        key = (block[at, None] % n * block_size + torch.arange(block_size, device=q.device))[:, None]
        allowed = (row < l) & (key < s)
        if causal:
            allowed = allowed & (key <= row + s - l)
        if mask is not None:
            head = (unit // u).repeat_interleave(r, 1)[..., None]
            allowed = allowed & mask[head // h, head % h, row.clamp(max=l - 1), key.clamp(max=s - 1)]
        out, lse = part(q_units, k_blocks, v_blocks, unit, block[at], allowed, scale)
        outs.append(out.flatten(0, 1))
        lses.append(lse.flatten(0, 1))

    # The part of every pair goes to its slot, those of unused pairs to a last one; slots that got none stay empty.
    place = torch.where(pair < 0, len(key_block), pair).flatten()
    parts = outs[0].new_zeros(len(key_block) + 1, r, e).index_copy(0, place, torch.cat(outs))[:-1]
    lse = lses[0].new_full((len(key_block) + 1, r), float("-inf")).index_copy(0, place, torch.cat(lses))[:-1]
    lse = lse.view(b * h * u, slots, r).transpose(1, 2)
    shares = softmax(lse, lse > float("-inf"))
    merged = torch.einsum("urk,ukre->ure", shares, parts.view(b * h * u, slots, r, e))
    return merged.reshape(b, h, u * r, e)[:, :, :l].to(q.dtype)


def _gathered(
    q: Float[Tensor, "b h l r d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    index: Int[Tensor, "..."],
    valid: Bool[Tensor, "b h l r m"] | None,
    bias: Float[Tensor, "b h l r m"] | None,
    scale: float,
) -> Float[Tensor, "b h l r e"]:
    """Softmax over the listed keys; the ``r`` query heads of a group read one gathered copy."""
    wide = torch.promote_types(q.dtype, torch.float32)
    b, h = q.shape[:2]
    batch = torch.arange(b, device=q.device)[:, None, None, None]
    head = torch.arange(h, device=q.device)[:, None, None] // (h // k.shape[1])
    scores = (q.to(wide) * scale) @ k[batch, head, index].to(wide).transpose(-1, -2)
    weights = softmax(scores if bias is None else scores + bias, valid)
    return weights @ v[batch, head, index].to(wide)


def gather_attend(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    index: Int[Tensor, "..."],
    valid: Bool[Tensor, "..."] | None = None,
    *,
    bias: Float[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h l e"]:
    """Attention of every query over its own list of ``m`` keys.

    Keys are gathered a few million numbers at a time, once per key head where the query heads share a list. A key
    listed twice counts twice; a query with no valid slot is zero. Softmax and sums are in float32 or wider.

    Args:
        index: key numbers, (l, m) for one list per query, or (b, h, l, m) where b and h may be 1. Slots that are not
            valid must name a key too.
        valid: slots in use, broadcastable to (b, h, l, m); default all.
        bias: added to the scores, broadcastable to (b, h, l, m).
        scale: default 1 / sqrt(d).

    Raises:
        ValueError: heads or widths that do not fit, a list of the wrong shape or with a key that does not exist.
    """
    check_heads(q, k, v)
    (b, h, l, d), (_, g, s, e) = q.shape, v.shape
    table = index[None, None] if index.ndim == 2 else index
    if table.ndim != 4 or table.shape[0] not in (1, b) or table.shape[1] not in (1, h) or table.shape[2] != l:
        raise ValueError(f"index must be ({l}, m) or ({b} or 1, {h} or 1, {l}, m); got {tuple(index.shape)}")
    if not torch.compiler.is_compiling() and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < s:
        raise ValueError(f"index must name keys 0..{s - 1}; got {int(index.min())}..{int(index.max())}")
    m, heads = table.shape[3], g if table.shape[1] == 1 else h
    scale = d**-0.5 if scale is None else scale

    def grouped(x: Tensor) -> Tensor:  # (b, h, l, .) -> (b, heads, l, h // heads, .)
        return x.unflatten(1, (heads, h // heads)).transpose(2, 3)

    rows = max(1, CHUNK // max(1, b * heads * m * (d + e)))
    whole = grouped(q)
    allowed = None if valid is None else grouped(valid.expand(b, h, l, m))
    added = None if bias is None else grouped(bias.expand(b, h, l, m))
    outs = []
    for at in [slice(i, i + rows) for i in range(0, l, rows)]:
        part = [None if x is None else x[:, :, at] for x in (table, allowed, added)]
        outs.append(_recompute(_gathered, rows < l)(whole[:, :, at], k, v, *part, scale))
    out = torch.cat(outs, 2) if outs else whole.new_zeros(*whole.shape[:-1], e)
    return out.transpose(2, 3).flatten(1, 2).to(q.dtype)
