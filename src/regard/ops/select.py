"""Which blocks or tokens to look at, chosen from data: an index table with a mask of the slots in use.

A table is ``index`` (..., k), integer, and ``valid`` (..., k), boolean; a slot that is not valid names block 0 and is
not looked at. Choosing is not differentiable and carries no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def block_means(
    k: Float[Tensor, "b g s d"], size: int, lengths: Int[Tensor, "b"] | None = None
) -> Float[Tensor, "b g n d"]:
    """The mean key of every block of ``size`` tokens, in float32 or wider; the last block may be shorter.

    Args:
        size: tokens of a block.
        lengths: real tokens of each sample, the first ones; a block with none of them has a mean of zero.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    s = k.shape[2]
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    valid = torch.ones(1, 1, s, 1, dtype=torch.bool, device=k.device)
    if lengths is not None:
        valid = (torch.arange(s, device=k.device) < lengths[:, None])[:, None, :, None]
    blocks, real = (F.pad(t, (0, 0, 0, -s % size)).unflatten(2, (-1, size)) for t in (wide * valid, valid))
    return blocks.sum(3) / real.sum(3).clamp(min=1)


def topk_blocks(
    affinity: Float[Tensor, "*r n"],
    k: int,
    eligible: Bool[Tensor, "..."] | None = None,
    forced: Bool[Tensor, "..."] | None = None,
) -> tuple[Int[Tensor, "*r k"], Bool[Tensor, "*r k"]]:
    """The ``k`` blocks of highest affinity in every row; ties go to the lowest index.

    Args:
        affinity: one row per query or query block, usually (b, h, l, n).
        k: slots of the table; more than there are blocks is allowed and leaves slots unused.
        eligible: what may be chosen, broadcastable to ``affinity``; default everything.
        forced: chosen first, eligible or not, and counted in ``k``; of more than ``k`` those of highest affinity.

    Returns:
        index and valid, both (..., k), forced blocks first, then by falling affinity.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    affinity = affinity.detach()
    # Two stable sorts: by affinity, then by rank (0 forced, 1 eligible, 2 neither). No affinity, not even -inf, can be
    # taken for a mark.
    order = affinity.sort(dim=-1, descending=True, stable=True).indices
    if eligible is None and forced is None and k <= affinity.shape[-1]:
        index = order[..., :k].contiguous()  # not a view that keeps the whole order
        return index, torch.ones_like(index, dtype=torch.bool)
    rank = torch.ones_like(affinity, dtype=torch.uint8)
    if eligible is not None:
        rank = rank.masked_fill(~eligible, 2)
    if forced is not None:
        rank = rank.masked_fill(forced, 0)
    rank, place = rank.gather(-1, order).sort(dim=-1, stable=True)
    valid = rank[..., :k] < 2
    index = order.gather(-1, place)[..., :k].masked_fill(~valid, 0)
    unused = k - valid.shape[-1]
    return (F.pad(index, (0, unused)), F.pad(valid, (0, unused))) if unused > 0 else (index, valid)


def to_dense(index: Int[Tensor, "*r k"], valid: Bool[Tensor, "*r k"], n: int) -> Bool[Tensor, "*r n"]:
    """The table as a mask over ``n`` blocks."""
    return (
        torch.zeros(*index.shape[:-1], n, dtype=torch.int32, device=index.device).scatter_add(-1, index, valid.int())
        > 0
    )


def to_table(dense: Bool[Tensor, "*r n"]) -> tuple[Int[Tensor, "*r k"], Bool[Tensor, "*r k"]]:
    """A mask over blocks as a table with as many slots as its fullest row needs (one at least), by rising index."""
    k = max(1, int(dense.sum(-1).max())) if dense.numel() else 1
    return topk_blocks(dense.to(torch.float32), k, eligible=dense)
