"""Scaled dot-product attention on (b, h, l, d), with grouped heads and rows that may see nothing.

Layout everywhere: queries (b, h, l, d); keys (b, g, s, d) and values (b, g, s, e) with g dividing h; query head i reads
key head i // (h // g). A boolean mask is True where a query may look. A row that may look nowhere is zero, in the
output, in the weights and in every gradient.
"""

from __future__ import annotations

from typing import Literal, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Backend = Literal["reference", "sdpa", "flex"]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Queries per key head; ValueError when q, k and v cannot be attended."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be (b, heads, tokens, dim); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    h, g = q.shape[1], k.shape[1]
    if v.shape[1] != g or v.shape[2] != k.shape[2]:
        raise ValueError(f"k has {g} heads and {k.shape[2]} tokens but v has {v.shape[1]} and {v.shape[2]}")
    if g == 0 or h % g:
        raise ValueError(f"query heads must be a multiple of key heads; got {h} and {g}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have one width; got {q.shape[-1]} and {k.shape[-1]}")
    return h // g


def widen(x: Tensor, groups: int) -> Tensor:
    """(b, g, s, d) -> (b, g * groups, s, d): each key head serves ``groups`` query heads that follow each other."""
    return x if groups == 1 else x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def causal_mask(l: int, s: int, device: torch.device | str | None = None) -> Bool[Tensor, "l s"]:
    """True where key j is no later than query i; the last query is aligned with the last key (cached decoding)."""
    return torch.ones(l, s, dtype=torch.bool, device=device).tril(s - l)


def merge_masks(*masks: Tensor | None) -> Tensor | None:
    """Logical and of the boolean masks given, None meaning everything."""
    present = [m for m in masks if m is not None]
    if not present:
        return None
    merged = present[0]
    for m in present[1:]:
        merged = merged & m
    return merged


def scores(
    q: Float[Tensor, "b h l d"], k: Float[Tensor, "b g s d"], *, scale: float | None = None, bias: Tensor | None = None
) -> Float[Tensor, "b h l s"]:
    r""":math:`q k^\top \cdot scale + bias`, one map per query head; keys are read once per key head."""
    b, h, l, d = q.shape
    g = k.shape[1]
    scaled = q * (d**-0.5 if scale is None else scale)
    out = (scaled.reshape(b, g, (h // g) * l, d) @ k.transpose(-1, -2)).view(b, h, l, k.shape[2])
    return out if bias is None else out + bias.to(out.dtype)


def softmax(scores: Float[Tensor, "*r s"], mask: Tensor | None = None) -> Float[Tensor, "*r s"]:
    """Softmax over the last axis where ``mask`` is True; a row with nothing to look at is zero, not NaN."""
    if mask is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~mask, float("-inf"))
    # A fully masked row gets finite scores before the softmax, so that its gradient is zero and not NaN.
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def mix(weights: Float[Tensor, "b h l s"], v: Float[Tensor, "b g s e"]) -> Float[Tensor, "b h l e"]:
    """:math:`A v` for every query head, values read once per key head."""
    b, h, l, s = weights.shape
    g = v.shape[1]
    return (weights.reshape(b, g, (h // g) * l, s) @ v).view(b, h, l, v.shape[-1])


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`attend` with the matrix in the open: what every faster form is tested against."""
    if causal:
        mask = merge_masks(mask, causal_mask(q.shape[2], k.shape[2], q.device))
    weights = softmax(scores(q, k, scale=scale, bias=bias), mask)
    return mix(F.dropout(weights, dropout) if dropout else weights, v)


def _one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """One query per head: the query heads of a key head become its rows, so that no kernel widens or re-reads the keys."""
    (b, h, _, d), (_, g, s, e) = q.shape, v.shape
    mask, bias = (x if x is None else x.expand(b, h, 1, s).reshape(b, g, h // g, s) for x in (mask, bias))
    rows = q.reshape(b, g, h // g, d)
    return _sdpa(rows, k, v, mask=mask, bias=bias, causal=False, scale=scale, dropout=dropout).reshape(b, h, 1, e)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1:
        return _one_query(q, k, v, mask=mask, bias=bias, scale=scale, dropout=dropout)
    if grouped and q.device.type == "cpu" and torch.is_grad_enabled():
        # The backward pass of the fused kernel for CPUs takes twice as long over shared heads as over repeated ones.
        k, v, grouped = widen(k, q.shape[1] // k.shape[1]), widen(v, q.shape[1] // k.shape[1]), False
    square = q.shape[2] == k.shape[2]
    if causal and (mask is not None or bias is not None or not square):
        mask, causal = merge_masks(mask, causal_mask(q.shape[2], k.shape[2], q.device)), False
    rows = None if mask is None else mask.any(-1, keepdim=True)
    attn_mask = mask
    if bias is not None:
        attn_mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, float("-inf"))
    if rows is not None and attn_mask is not None:
        open_row = torch.ones_like(attn_mask) if attn_mask.dtype == torch.bool else torch.zeros_like(attn_mask)
        attn_mask = torch.where(rows, attn_mask, open_row)
    if attn_mask is not None:
        attn_mask = torch.atleast_2d(attn_mask)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out if rows is None else out.masked_fill(~rows, 0.0)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if dropout:
        raise ValueError(f"backend='flex' has no dropout; got dropout={dropout}")
    if causal:
        mask = merge_masks(mask, causal_mask(q.shape[2], k.shape[2], q.device))
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    allowed = None if mask is None else mask.expand(full)
    added = None if bias is None else bias.expand(full)

    @no_type_check  # Flex attention traces it.
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if added is not None:
            score = score + added[b, h, i, j]
        return score if allowed is None else torch.where(allowed[b, h, i, j], score, -float("inf"))

    out = flex_attention(q, k, v, score_mod=score_mod, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out if mask is None else torch.where(mask.any(-1, keepdim=True), out, 0.0)


_BACKENDS = {"reference": reference, "sdpa": _sdpa, "flex": _flex}


def attend(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "sdpa",
) -> Float[Tensor, "b h l e"]:
    r"""Attention :math:`\mathrm{softmax}(q k^\top \cdot scale + bias) \, v` over the allowed keys.

    Args:
        mask: boolean, broadcastable to (b, h, l, s), True where a query may look.
        bias: added to the scores, broadcastable to (b, h, l, s).
        causal: no key later than the query; the last query stands at the last key.
        scale: default 1 / sqrt(d).
        dropout: of the weights; the caller passes 0 outside training.
        backend: ``reference`` (matrix in the open), ``sdpa`` (fused), ``flex``.

    Raises:
        ValueError: heads or widths that do not fit, a causal call with more queries than keys, an unknown backend.
    """
    check_heads(q, k, v)
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal=True needs at least as many keys as queries; got l={q.shape[2]}, s={k.shape[2]}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {sorted(_BACKENDS)}")
    if k.shape[2] == 0:
        backend = "reference"
    return _BACKENDS[backend](q, k, v, mask=mask, bias=bias, causal=causal, scale=scale, dropout=dropout)
