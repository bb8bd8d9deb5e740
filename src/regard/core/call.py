"""One execution of one attention site, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.core.slices import as_met, exact, heads_of, rows_of, taken, tolerance
from regard.core.step import Step
from regard.core.tokens import Rows, Tokens, pick
from regard.ops import attend as ops
from regard.ops import summaries

LIMIT_BYTES = 1 << 30


class OpaqueSite(ValueError):
    """What was recorded at the site does not recompute its output, so no weights are given."""


class WeightsTooLarge(ValueError):
    """The matrix asked for is above the size limit."""


class Call:
    """q, k, v and what surrounds them in one call of a site; every other quantity is recomputed when it is asked for.

    Attributes:
        q: (b, h, l, d) queries, after position rotation, as they meet the keys.
        k, v: (b, g, s, d) and (b, g, s, e), as stored: one per key head.
        out: (b, h, l, e) per head, before the output projection.
        mask: boolean (True = may look) or added to the scores, broadcastable to (b, h, l, s).
        bias: added to the scores besides ``mask``.
        causal: query i looks at keys up to i, both counted from the front (torch's ``is_causal``).
        scale: factor on q k^T. ``softcap``: scores become ``cap * tanh(scores / cap)`` before mask and bias.
        final_weights: the weights after an edit of scores or weights, in place of the softmax.
        host_scores: the scores as a hand-written host computed them, in place of q k^T.
        key_scale: factors on the weights of each key, after the softmax; ``v`` is without them.
        stages: (scores, normalize) of a layer of this library, when they are its own.
        dropout: probability with which the host dropped weights in this call; ``weights`` are those before it.
        step: where in the host's loop this call stands.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        host_scores: Tensor | None = None,
        stages: tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor | None], Tensor]] | None = None,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.mask, self.bias, self.causal = mask, bias, causal
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.softcap, self.dropout = softcap, dropout
        self.host_scores, self.stages = host_scores, stages
        self.out: Tensor = q
        self.mixed: Tensor | None = None
        self.final_weights: Tensor | None = None
        self.key_scale: Tensor | None = None
        self.product: int | None = None
        self.site, self.kind, self.step = "", "self", Step()
        self.tokens_q: Tokens | None = None
        self.tokens_k: Tokens | None = None
        self.unscaled: Tensor | None = None
        self.graded = self.unsure = False
        self.q_start = 0
        self.versions: tuple[int, ...] = ()
        self.out_grad: Tensor | None = None
        self._verified = False

    def allowed(self, index: Tensor | None = None) -> Tensor | None:
        """Boolean mask (b|1, h|1, rows, s) of query rows ``index``, or None when everything is allowed."""
        causal = None
        if self.causal:
            queries = torch.arange(self.q.shape[2], device=self.q.device) if index is None else index
            causal = torch.arange(self.k.shape[2], device=self.q.device) <= queries[:, None]
        mask = self.mask if self.mask is not None and self.mask.dtype == torch.bool else None
        return ops.merge_masks(causal, None if mask is None else rows_of(mask, index))

    def added(self, index: Tensor | None = None) -> Tensor | None:
        """What is added to the scores of query rows ``index``."""
        parts = [m for m in (self.mask, self.bias) if m is not None and m.dtype != torch.bool]
        total = None
        for part in parts:
            part = rows_of(part, index)
            total = part if total is None else total + part
        return total

    def raw_scores(self, index: Tensor | None = None, heads: Any = None) -> Tensor:
        """Scores (b, heads, rows, s) with scale, soft-cap and bias, without the boolean mask."""
        if self.host_scores is not None:
            return exact(as_met(taken(self.host_scores, index), heads, self.q.shape[1]))
        q, k = taken(self.q, index), self.k
        with torch.autocast(q.device.type, enabled=False):
            if self.stages is not None:
                scores = heads_of(self.stages[0](exact(q), exact(k)), heads)
            else:
                q, k = (as_met(x, heads, self.q.shape[1]) for x in (q, k))
                scores = ops.scores(exact(q), exact(k), scale=self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        added = self.added(index)
        return scores if added is None else scores + heads_of(added, heads).to(scores.dtype)

    def normalize(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if self.stages is not None:
            return self.stages[1](scores, mask)
        if self.host_scores is not None or self.added() is not None:
            # An added -inf forbids a pair as a boolean mask does: a row may have nothing to look at.
            mask = ops.merge_masks(mask, scores != float("-inf"))
        return ops.softmax(scores, mask)

    # -- what is asked of it ----------------------------------------------------------------------------------------

    def rows(self, rows: Rows | None) -> Tensor | None:
        """Query positions as an index; names are looked up in the site's tokens."""
        if rows is None:
            return None
        if isinstance(rows, str):
            if self.tokens_q is None:
                raise ValueError(
                    f"rows={rows!r}: the tokens of {self.site or 'this site'} have no names; "
                    "describe them with regard.tokens(model, q='cls + image[14,14]')"
                )
            return self.tokens_q.index(rows, self.q.device)
        return pick(torch.arange(self.q.shape[2], device=self.q.device), rows)

    def scores(self, *, rows: Rows | None = None, heads: Any = None) -> Tensor:
        """Scores (b, h, l, s) as they enter the softmax; a forbidden pair is -inf."""
        index = self._asked(rows, heads)
        scores = self.raw_scores(index, heads)
        allowed = self.allowed(index)
        return scores if allowed is None else scores.masked_fill(~heads_of(allowed, heads), float("-inf"))

    def weights(self, *, rows: Rows | None = None, heads: Any = None) -> Tensor:
        """Weights (b, h, l, s) per query head, after normalisation, before dropout; float32 or better.

        Args:
            rows: only these queries: numbers, a slice, or names such as ``"cls"``.
            heads: only these heads.

        Raises:
            OpaqueSite: the recomputed output differs from what the site returned.
            WeightsTooLarge: more than ``LIMIT_BYTES`` would be needed.
        """
        return self._weights(self._asked(rows, heads), heads)

    def _weights(self, index: Tensor | None, heads: Any = None) -> Tensor:
        if self.final_weights is not None:
            weights = exact(as_met(taken(self.final_weights, index), heads, self.q.shape[1]))
        elif self.stages is not None:
            weights = heads_of(self.normalize(self.raw_scores(index), self.allowed(index)), heads)
        else:
            allowed = self.allowed(index)
            allowed = None if allowed is None else heads_of(allowed, heads)
            weights = self.normalize(self.raw_scores(index, heads), allowed)
        return weights if self.key_scale is None else weights * heads_of(self.key_scale, heads)

    def weights_grad(self, *, rows: Rows | None = None, heads: Any = None) -> Tensor:
        r"""Gradient of the loss with respect to the weights, :math:`\partial L/\partial A = \partial L/\partial O \; V^\top`.

        Needs a capture with ``grad=True`` and a backward pass through the host. Raises ValueError otherwise.
        """
        if self.out_grad is None:
            raise ValueError(
                f"{self.site or 'this call'} has no gradient: capture with grad=True and call backward() on a loss that "
                "depends on the model's output"
            )
        if self.dropout:
            raise ValueError(
                f"{self.site or 'this call'} dropped weights with probability {self.dropout}, and which ones is not known: "
                "its gradient needs a call without dropout"
            )
        index = self._asked(rows, heads)
        grad, v = (as_met(x, heads, self.q.shape[1]) for x in (taken(self.out_grad, index), self.v))
        with torch.autocast(grad.device.type, enabled=False):
            return ops.scores(exact(grad), exact(v), scale=1.0)

    def received(self) -> Tensor:
        """(b, h, s): how much weight each key receives from all queries together."""
        return reduce(torch.add, self._by_rows(lambda weights: weights.sum(-2)))

    def mass(self, roles: Tensor) -> Tensor:
        """(b, h, l, r): how much weight each query gives to each role; ``roles`` (s, r) says which key is in which role."""
        if roles.shape[0] != self.k.shape[2]:
            raise ValueError(f"roles must have {self.k.shape[2]} rows, one a key; got {tuple(roles.shape)}")
        roles = roles.to(exact(self.q[:0]).dtype)
        special = (self.softcap, self.host_scores, self.stages, self.final_weights, self.key_scale)
        if any(x is not None for x in special) or self.causal:
            return torch.cat(list(self._by_rows(lambda weights: weights @ roles)), -2)
        self.verify()
        with torch.autocast(self.q.device.type, enabled=False):
            return summaries.mass(self.q, self.k, roles, mask=self.allowed(), bias=self.added(), scale=self.scale)

    def role_mass(self) -> dict[str, Tensor]:
        """(b, h, l) for every role of the site's key tokens."""
        tokens = self._key_tokens()
        columns = torch.zeros(tokens.size, len(tokens.segments), device=self.q.device)
        for i, segment in enumerate(tokens.segments):
            columns[tokens.span(segment.role), i] = 1
        return {s.role: mass for s, mass in zip(tokens.segments, self.mass(columns).unbind(-1), strict=True)}

    def map(self, role: str = "image", *, rows: Rows | None = None, heads: Any = None) -> Tensor:
        """Weights on the grid of key role ``role``: (b, h, rows, H, W)."""
        span, grid = self._key_tokens().span(role), self._key_tokens().grid(role)
        return self.weights(rows=rows, heads=heads)[..., span].unflatten(-1, grid)

    def _key_tokens(self) -> Tokens:
        if self.tokens_k is None:
            raise ValueError(
                f"the key tokens of {self.site} have no names; describe them with regard.tokens(model, k=...)"
            )
        return self.tokens_k

    def _by_rows(self, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """``function`` of the weights of a few query rows at a time, forward and backward: the whole matrix never exists."""
        self.verify()
        l, s = self.q.shape[2], self.k.shape[2]
        # One chunk stays below 1/128 of the matrix (and one row at least).
        chunk = max(1, min(l // 128, (1 << 22) // max(1, self.q.shape[0] * self.q.shape[1] * s)))

        def part(index: Tensor) -> Tensor:
            with torch.autocast(self.q.device.type, enabled=False):
                return function(self._weights(index))

        for index in torch.arange(l, device=self.q.device).split(chunk):
            if torch.is_grad_enabled() and self.q.requires_grad:
                yield checkpoint(part, index, use_reentrant=False, preserve_rng_state=False)
            else:
                yield part(index)

    def error(self, rows: int = 8) -> float:
        """Largest difference between recomputed and recorded output over a few query rows, relative to its size."""
        if self.mixed is None:
            return 0.0
        l = self.q.shape[2]
        index = torch.linspace(0, l - 1, min(rows, l), device=self.q.device).round().long().unique()
        with torch.no_grad():
            mixed = exact(self.mixed[:, :, index])
            again = ops.mix(self._weights(index), exact(self.v))
            if mixed.numel() == 0:
                return 0.0
            # A row that the host itself made NaN (all keys forbidden by the smallest number) says nothing.
            finite = mixed.isfinite()
            if not finite.any():
                return float("nan")
            mixed, again = mixed.where(finite, 0.0), again.where(finite, 0.0)
            return float((again - mixed).abs().max() / mixed.abs().max().clamp_min(1e-12))

    def verify(self) -> None:
        """Raise OpaqueSite unless the weights recompute the site's own output."""
        if self._verified:
            return
        if self.versions and self.versions != tuple(t._version for t in (self.q, self.k, self.v)):
            raise OpaqueSite(
                f"{self.site}: q, k or v were overwritten in place after the call (a static cache, for example), so the "
                "weights cannot be recomputed; read them before the next call of the model"
            )
        if self.dropout == 0.0:
            error, bound = self.error(), tolerance(self.q.dtype)
            if not error <= bound:
                raise OpaqueSite(
                    f"{self.site or 'this site'} is opaque: weights times values differ from what it returned by {error:.1e} "
                    f"(allowed {bound:.0e}); its attention is not softmax(scores) v"
                )
        self._verified = True

    def _asked(self, rows: Rows | None, heads: Any) -> Tensor | None:
        """``rows`` as an index, once it is known that the answer fits in memory and is true."""
        index = self.rows(rows)
        b, h, l, s = *self.q.shape[:3], self.k.shape[2]
        rows = l if index is None else len(index)
        count = h if heads is None else len(pick(torch.arange(h), heads))
        size = b * count * rows * s * max(4, self.q.element_size())
        if size > LIMIT_BYTES:
            raise WeightsTooLarge(
                f"the weights of {self.site or 'this site'} would take {size / 2**20:,.0f} MiB "
                f"({b} x {count} heads x {rows} queries x {s} keys; limit {LIMIT_BYTES / 2**20:,.0f} MiB): "
                "ask for fewer with rows= or heads=, or for mass(roles) or received(), which never hold the matrix"
            )
        self.verify()
        return index

    def __repr__(self) -> str:
        b, h, l, d = self.q.shape
        g, s = self.k.shape[1:3]
        return f"Call({self.site!r}, b={b}, h={h}, g={g}, l={l}, s={s}, d={d}, step={self.step.index})"
