"""Exact quantities of the attention matrix that never hold the matrix.

:func:`mass` and :func:`position` are fused attention with other values; the rest reads the matrix ``chunk`` query rows
at a time, forward and backward. Everything is per query head, differentiable in q and k, and in single precision or
better. A query that may look nowhere has zero everywhere, and -inf as log-sum-exp.

``q`` is (b, h, l, d) and ``k`` (b, g, s, d). ``mask``, ``bias``, ``causal`` and ``scale`` mean what they mean in
:func:`~regard.ops.attend.attend`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from regard.ops import merge
from regard.ops.attend import attend, merge_masks, scores, softmax
from regard.ops.rows import by_rows, single


def mass(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    roles: Shaped[Tensor, "... r"],
    **attend_kwargs: Any,
) -> Float[Tensor, "b h l r"]:
    r"""How much of its attention each query gives to each role, :math:`\sum_j A_{ij} R_{jr}`.

    Args:
        roles: R, 1 where a key has a role (text, image, sink, ...) and 0 where not; shared or one per sequence.
        attend_kwargs: mask, bias, causal, scale and backend of :func:`~regard.ops.attend.attend`.
    """
    b, g, s, d = k.shape
    if roles.shape[:-1] not in ((s,), (b, s)):
        raise ValueError(f"roles must be (s, r) or (b, s, r) with b={b}, s={s}; got {tuple(roles.shape)}")
    q, k = single(q), single(k)
    values = roles.to(q.dtype).expand(b, -1, -1)
    # Fused kernels want values as wide as the keys.
    parts = [F.pad(part, (0, d - part.shape[-1]))[:, None].expand(b, g, s, d) for part in values.split(d, -1)]
    return torch.cat([attend(q, k, part, **attend_kwargs) for part in parts], -1)[..., : roles.shape[-1]]


def position(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    positions: Shaped[Tensor, "... p"],
    **attend_kwargs: Any,
) -> Float[Tensor, "b h l p"]:
    r"""Where each query looks on average, :math:`\sum_j A_{ij} p_j`, for keys at ``positions``."""
    return mass(q, k, positions, **attend_kwargs)


def received(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    query_weights: Float[Tensor, "..."] | None = None,
    **rows_kwargs: Any,
) -> Float[Tensor, "b h s"]:
    r"""How much attention each key gets, :math:`\sum_i w_i A_{ij}`, per query head.

    Args:
        query_weights: w, (l,) or (b, h, l); default 1.
        rows_kwargs: mask, bias, causal, scale and chunk.
    """
    if query_weights is not None and query_weights.shape not in (q.shape[:3], q.shape[2:3]):
        raise ValueError(
            f"query_weights must be {(q.shape[2],)} or {tuple(q.shape[:3])}; got {tuple(query_weights.shape)}"
        )

    def part(scores: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        weights = softmax(scores, mask)
        if query_weights is None:
            return weights.sum(-2)
        return (weights * query_weights[..., rows, None]).sum(-2)

    total = q.new_zeros(q.shape[0], q.shape[1], k.shape[2], dtype=single(q[:0]).dtype)
    for one in by_rows(part, q, k, **rows_kwargs):
        total = total + one
    return total


def distance(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    query_positions: Shaped[Tensor, "_ p"],
    key_positions: Shaped[Tensor, "_ p"],
    **rows_kwargs: Any,
) -> Float[Tensor, "b h l"]:
    r"""How far each query looks on average, :math:`\sum_j A_{ij} \lVert p_i - p_j \rVert`."""
    wanted, got = (q.shape[2], k.shape[2]), (len(query_positions), len(key_positions))
    if wanted != got:
        raise ValueError(f"query_positions and key_positions must have {wanted} rows; got {got}")
    here, there = (p.to(single(q[:0]).dtype) for p in (query_positions, key_positions))

    def part(scores: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        apart = torch.cdist(here[rows], there, compute_mode="donot_use_mm_for_euclid_dist")
        return (softmax(scores, mask) * apart).sum(-1)

    return torch.cat(list(by_rows(part, q, k, **rows_kwargs)), 2)


def entropy(q: Float[Tensor, "b h l d"], k: Float[Tensor, "b g s d"], **rows_kwargs: Any) -> Float[Tensor, "b h l"]:
    r"""How spread each query's attention is, :math:`-\sum_j A_{ij} \log A_{ij}`, in nats."""

    def part(scores: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        weights = softmax(scores, mask)
        logs = scores - merge.logsumexp(scores, mask)[..., None]
        if mask is not None:
            logs = logs.masked_fill(~mask, 0.0)
        return -(weights * logs).sum(-1)

    return torch.cat(list(by_rows(part, q, k, **rows_kwargs)), 2)


def logsumexp(q: Float[Tensor, "b h l d"], k: Float[Tensor, "b g s d"], **rows_kwargs: Any) -> Float[Tensor, "b h l"]:
    r"""The log of each query's normaliser, :math:`\log \sum_j \exp z_{ij}`; -inf for a query that may look nowhere."""
    parts = by_rows(lambda scores, mask, rows: merge.logsumexp(scores, mask), q, k, **rows_kwargs)
    return torch.cat(list(parts), 2)


def rows(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    index: Int[Tensor, "r"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h r s"]:
    """The weights of the queries in ``index`` and of no others."""
    l, s = q.shape[2], k.shape[2]
    if index.numel() and (index.min() < 0 or index.max() >= l):
        raise ValueError(f"index must be in 0..{l - 1}; got {int(index.min())}..{int(index.max())}")
    if causal and l > s:
        raise ValueError(f"causal=True needs at least as many keys as queries; got l={l}, s={s}")
    mask, bias = (x if x is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., index, :] for x in (mask, bias))
    if causal:
        mask = merge_masks(mask, torch.arange(s, device=q.device) <= index[:, None] + s - l)
    return softmax(scores(single(q[:, :, index]), single(k), scale=scale, bias=bias), mask)
