r"""Distribution functions: from scores to weights over the last axis.

Each takes scores (..., s), a boolean ``mask`` that broadcasts to them, True where a query may look, and its own
parameters. What is masked has weight exactly zero and passes no gradient; a row that is masked everywhere is zero.
Written out are the weights p of one row z. Half precision is computed in single precision and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.attend import softmax
from regard.ops.merge import logsumexp
from regard.ops.rows import single

Scores = Float[Tensor, "*r s"]
Mask = Bool[Tensor, "..."] | None


def _drop(weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights if mask is None else weights.masked_fill(~mask, 0.0)


def _floored(z: Tensor, mask: Tensor | None) -> Tensor:
    """Detached scores, 0 at the row's largest; masked ones and those too far below it to get any weight are -2."""
    z = z.detach() if mask is None else z.detach().masked_fill(~mask, float("-inf"))
    top = z.amax(-1, keepdim=True)
    return (z - top.masked_fill(top == float("-inf"), 0.0)).clamp(min=-2.0)


def _support(kept: Tensor, order: Tensor, mask: Tensor | None) -> Tensor:
    """The first ``kept`` places of a sorted row, in the row's own order."""
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    support = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, ranks < kept)
    return support if mask is None else support & mask


def sigmoid(scores: Scores, mask: Mask = None) -> Scores:
    r""":math:`p_j = 1 / (1 + e^{-z_j})`, each key on its own."""
    return _drop(scores.sigmoid(), mask)


def sparsemax(scores: Scores, mask: Mask = None) -> Scores:
    r"""The point of the simplex nearest to the scores, :math:`p_j = \max(z_j - \tau, 0)` with :math:`\sum_j p_j = 1`.

    Reference: From Softmax to Sparsemax, ICML 2016, arXiv:1602.02068.
    """
    z = single(scores)
    ordered, order = _floored(z, mask).sort(-1, descending=True)
    size = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    kept = (1.0 + size * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    support = _support(kept, order, mask)
    members = support.sum(-1, keepdim=True).clamp(min=1).to(z.dtype)
    inside = z.masked_fill(~support, 0.0)
    mean = inside.sum(-1, keepdim=True) / members
    return ((inside - mean) + 1.0 / members).masked_fill(~support, 0.0).clamp(min=0.0).to(scores.dtype)


def entmax15(scores: Scores, mask: Mask = None) -> Scores:
    r"""Entmax with :math:`\alpha = 1.5`, between softmax and sparsemax: :math:`p_j = \max(z_j / 2 - \tau, 0)^2`.

    The threshold is exact: for a support of n scores with mean m and scatter c about it (in halves of z),
    :math:`\tau = m - \sqrt{(1 - c) / n}`.

    Reference: Sparse Sequence-to-Sequence Models, ACL 2019, arXiv:1905.05702.
    """
    z = single(scores) / 2.0
    ordered, order = _floored(z, mask).sort(-1, descending=True)
    size = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = ordered.cumsum(-1) / size
    scatter = ordered.square().cumsum(-1) - size * mean.square()
    taus = mean - ((1.0 - scatter) / size).clamp(min=0.0).sqrt()
    support = _support((taus <= ordered).sum(-1, keepdim=True), order, mask)
    members = support.sum(-1, keepdim=True).clamp(min=1).to(z.dtype)
    inside = z.masked_fill(~support, 0.0)
    centred = (inside - inside.sum(-1, keepdim=True) / members).masked_fill(~support, 0.0)
    room = (1.0 - centred.square().sum(-1, keepdim=True)) / members
    return (centred + room.sqrt()).masked_fill(~support, 0.0).square().to(scores.dtype)


def entmax_alpha(scores: Scores, mask: Mask = None, alpha: float | Tensor = 1.5) -> Scores:
    r"""Entmax for any :math:`\alpha > 1`: :math:`p_j = \max((\alpha - 1) z_j - \tau, 0)^{1 / (\alpha - 1)}`.

    The threshold comes from bisection and one Newton step, which carries its exact gradient, in the scores and in
    ``alpha``; second derivatives are not exact.

    Args:
        alpha: above 1 (2 is sparsemax; softmax is the limit at 1), a number or a tensor that broadcasts to the scores.

    Reference: Sparse Sequence-to-Sequence Models, ACL 2019, arXiv:1905.05702.
    """
    if not bool((torch.as_tensor(alpha) > 1.0).all()):
        raise ValueError(f"alpha={alpha} must be above 1")
    power = 1.0 / (alpha - 1.0)
    z = single(scores) * (alpha - 1.0)
    with torch.no_grad():
        floored = _floored(z, mask)
        low = torch.full_like(floored[..., :1], -1.0)
        high = torch.zeros_like(low)
        for _ in range(60 if z.dtype == torch.float64 else 30):
            middle = (low + high) / 2.0
            above = (floored - middle).clamp(min=0.0).pow(power).sum(-1, keepdim=True) >= 1.0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        support = floored > low
        if mask is not None:
            support = support & mask
        shift = low + z - floored
        slopes = power * (floored - low).clamp(min=0.0).pow(power - 1.0)
        slope = slopes.masked_fill(~support, 0.0).sum(-1, keepdim=True)
    above = (z - shift).masked_fill(~support, 1.0)
    excess = above.pow(power).masked_fill(~support, 0.0).sum(-1, keepdim=True) - 1.0
    step = excess / slope.masked_fill(slope == 0.0, 1.0)
    above = (above - step).masked_fill(~support, 1.0)
    positive = support & (above > 0.0)
    return above.masked_fill(~positive, 1.0).pow(power).masked_fill(~positive, 0.0).to(scores.dtype)


def relu(scores: Scores, mask: Mask = None) -> Scores:
    r""":math:`p_j = \max(z_j, 0)`, not normalised: a row may be empty."""
    return _drop(scores.relu(), mask)


def relu_squared(scores: Scores, mask: Mask = None) -> Scores:
    r""":math:`p_j = \max(z_j, 0)^2`, not normalised: a row may be empty."""
    return _drop(scores.relu().square(), mask)


def standardize(
    scores: Scores, mask: Mask = None, gain: float | Tensor = 1.0, bias: float | Tensor = 0.0, eps: float = 1e-3
) -> Scores:
    r"""Zero mean and unit variance over the allowed keys: :math:`p_j = gain \, (z_j - \mu) / (\sigma + eps) + bias`.

    Weights may be negative; a row with one key, or equal scores, is ``bias``.

    Args:
        gain, bias: numbers, or tensors that broadcast to the scores, such as (h, 1, 1).
        eps: added to the standard deviation, which is that of the population.

    Reference: Normalized Attention Without Probability Cage, arXiv:2005.09561.
    """
    if eps <= 0.0:
        raise ValueError(f"eps={eps} must be positive")
    z = single(scores)
    allowed = torch.ones_like(z, dtype=torch.bool) if mask is None else mask.expand(z.shape)
    keys = allowed.sum(-1, keepdim=True).clamp(min=1)
    centred = _drop(z - _drop(z, allowed).sum(-1, keepdim=True) / keys, allowed)
    variance = centred.square().sum(-1, keepdim=True) / keys
    flat = variance == 0.0
    deviation = variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
    return _drop(gain * centred / (deviation + eps) + bias, allowed).to(scores.dtype)


def l1(scores: Scores, mask: Mask = None) -> Scores:
    r""":math:`p_j = z_j / \sum_i |z_i|`, keeping signs; a row of zeros stays zero."""
    z = _drop(single(scores), mask)
    total = z.abs().sum(-1, keepdim=True)
    return (z / total.masked_fill(total == 0.0, 1.0)).to(scores.dtype)


def sinkhorn(scores: Float[Tensor, "*r l s"], mask: Mask = None, iterations: int = 20) -> Float[Tensor, "*r l s"]:
    r"""Scale rows and columns of :math:`e^z` in turn, ``iterations`` times, rows last.

    Rows sum to 1; columns sum to the same number each (l / s where all is allowed) in the limit.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    logs = single(scores)
    allowed = torch.ones_like(logs, dtype=torch.bool) if mask is None else mask.expand(logs.shape)
    across = allowed.transpose(-1, -2)
    for _ in range(iterations):
        columns = logsumexp(logs.transpose(-1, -2), across).masked_fill(~across.any(-1), 0.0)
        logs = logs - columns[..., None, :]
        logs = logs - logsumexp(logs, allowed).masked_fill(~allowed.any(-1), 0.0)[..., None]
    return logs.masked_fill(~allowed, float("-inf")).exp().to(scores.dtype)


def hard_sample(scores: Scores, mask: Mask = None, generator: torch.Generator | None = None) -> Scores:
    """One key per row, drawn with the probabilities of softmax: weight 1 for it, 0 for the others, no gradient."""
    p = softmax(single(scores.detach()), mask)
    chosen = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return _drop(torch.zeros_like(scores).scatter(-1, chosen, 1.0), mask)


def gumbel(
    scores: Scores, mask: Mask = None, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Scores:
    r"""A differentiable draw: softmax of :math:`(z_j + g_j) / temperature`, with Gumbel noise g; the largest weight
    falls on key j as often as softmax would have it.

    Reference: Categorical Reparameterization with Gumbel-Softmax, ICLR 2017, arXiv:1611.01144.
    """
    if temperature <= 0.0:
        raise ValueError(f"temperature={temperature} must be positive")
    z = single(scores)
    noise = -torch.empty_like(z).exponential_(generator=generator).log()
    return softmax((z + noise) / temperature, mask).to(scores.dtype)


def topk_softmax(scores: Scores, mask: Mask = None, k: int = 1) -> Scores:
    """Softmax over the ``k`` largest allowed scores of a row (all, if fewer); of equal scores the first come first."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    z = scores.detach() if mask is None else scores.detach().masked_fill(~mask, float("-inf"))
    order = z.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.full_like(order[..., :1], k)
    return softmax(scores, _support(kept, order, mask))


def identity(scores: Scores, mask: Mask = None) -> Scores:
    """The scores as they are."""
    return _drop(scores, mask)


NORMALIZERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        softmax,
        sigmoid,
        sparsemax,
        entmax15,
        entmax_alpha,
        relu,
        relu_squared,
        standardize,
        l1,
        sinkhorn,
        hard_sample,
        gumbel,
        topk_softmax,
        identity,
    )
}
