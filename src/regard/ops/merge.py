"""Attention over parts of the keys, and the parts put together by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.attend import check_heads, mix, softmax
from regard.ops.rows import by_rows, single


def logsumexp(scores: Float[Tensor, "*r s"], mask: Tensor | None = None) -> Float[Tensor, "*r"]:
    """Log-sum-exp over the last axis where ``mask`` is True; -inf, with zero gradient, where nothing is."""
    if mask is None:
        mask = torch.ones_like(scores[..., :1], dtype=torch.bool)
    mask = mask.expand(scores.shape)
    rows = mask.any(-1)
    open_scores = scores.masked_fill(~mask, float("-inf")).masked_fill(~rows[..., None], 0.0)
    return open_scores.logsumexp(-1).masked_fill(~rows, float("-inf"))


def attend_lse(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    chunk: int = 256,
) -> tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l"]]:
    r"""Attention and the log of its normaliser.

    .. math:: o = \mathrm{softmax}(z)\, v, \qquad \ell = \log \sum_j e^{z_j}, \qquad z = q k^\top \cdot scale + bias

    Both are differentiable in q, k, v and bias. A row that may look nowhere is zero with -inf. The matrix is held for
    ``chunk`` query rows at a time, forward and backward; the log is in single precision or better.

    Args:
        mask: boolean, broadcastable to (b, h, l, s), True where a query may look.
        bias: added to the scores, broadcastable to (b, h, l, s).
        causal: no key later than the query; the last query stands at the last key.
        scale: default 1 / sqrt(d).
        chunk: query rows at a time.
    """
    check_heads(q, k, v)
    values = single(v)

    def part(scores: Tensor, allowed: Tensor | None, rows: slice) -> tuple[Tensor, Tensor]:
        return mix(softmax(scores, allowed), values).to(q.dtype), logsumexp(scores, allowed)

    parts = by_rows(part, q, k, mask=mask, bias=bias, causal=causal, scale=scale, chunk=chunk)
    outs, lses = zip(*parts)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def merge_lse(
    outs: Sequence[Float[Tensor, "*r e"]], lses: Sequence[Float[Tensor, "*r"]]
) -> tuple[Float[Tensor, "*r e"], Float[Tensor, "*r"]]:
    r"""One attention from attentions over disjoint parts of the keys.

    .. math:: o = \sum_p e^{\ell_p - \ell} o_p, \qquad \ell = \log \sum_p e^{\ell_p}

    A part with :math:`\ell_p = -\infty` adds nothing, whatever it holds; where every part has it, o is zero.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many and at least one; got {len(outs)} and {len(lses)}")
    logs = torch.stack([single(lse) for lse in lses], -1)
    present = logs > float("-inf")
    shares = softmax(logs, present)
    total = sum(
        shares[..., p, None] * single(out).masked_fill(~present[..., p, None], 0.0) for p, out in enumerate(outs)
    )
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype), logsumexp(logs, present)
