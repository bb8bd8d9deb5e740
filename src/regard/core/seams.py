"""The torch functions in which attention happens: the fused kernel, and the pattern product, softmax, product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.edit import BEFORE_QK, Edit
from regard.core.fold import Fold
from regard.core.slices import exact
from regard.core.tap import SEAMS, Tap


def sdpa_mask(call: Call) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` of the fused kernel for this call."""
    if call.bias is None and call.mask is None:
        return None, call.causal
    if call.bias is None and not call.causal:
        return call.mask, False
    allowed, added = call.allowed(), call.added()
    if added is None:
        return allowed, False
    added = added.to(call.q.dtype)
    return (added if allowed is None else added.masked_fill(~allowed, float("-inf"))), False


def _sdpa(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _sdpa_call(tap, func, args, kwargs, *args, **kwargs)


def _sdpa_call(
    tap: Tap,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    original: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    fold = Fold(query, None, 0) if query.ndim == 4 else tap.fold(query)
    mask = attn_mask
    if mask is not None and query.ndim != 4 and mask.ndim > 2:
        mask = fold.apart(mask.broadcast_to(*query.shape[:-2], *mask.shape[-2:]))
    call = Call(*map(fold.apart, (query, key, value)), mask=mask, causal=is_causal, scale=scale, dropout=dropout_p)
    before = (call.q, call.k, call.v, call.mask, call.bias)

    def native(c: Call) -> Tensor:
        if all(a is b for a, b in zip(before, (c.q, c.k, c.v, c.mask, c.bias), strict=True)):
            return fold.apart(func(*args, **original))
        mask, causal = sdpa_mask(c)
        grouped = enable_gqa or c.q.shape[1] != c.k.shape[1]
        return func(
            c.q, c.k, c.v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    return fold.back(tap.run(call, native, "function"))


def _product(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A matrix product: q k^T of a later softmax, or the weights of an earlier one times v."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if func is torch.baddbmm or func is Tensor.baddbmm:
        operands = operands[1:]
    if func is torch.einsum:
        plan = _einsum_plan(args[0], operands)
    else:
        plan = "plain" if len(operands) == 2 and all(o.ndim >= 3 for o in operands) else None
    if plan is None:
        return func(*args, **kwargs)
    left, right = operands
    tap.mixes = tap.mixes or bool(tap.softmaxes)
    if tap.pending is not None and left is tap.pending[0] and plan in ("plain", "values"):
        return _values(tap, func, args, kwargs, right)
    number = tap.number()
    k = right if plan == "scores" else right.transpose(-1, -2)
    if k.ndim != left.ndim:
        return func(*args, **kwargs)
    if tap.editing():
        fold = tap.fold(left)
        call = Call(fold.apart(left), fold.apart(k), fold.apart(k), scale=1.0)
        edits = _qk_edits(tap, number, call)
    else:
        edits = []
    if edits:
        for e in edits:
            e.before(call)
        q, k = fold.back(call.q), fold.back(call.k)
        swap = {id(left): q, id(right): k if plan == "scores" else k.transpose(-1, -2)}
        args = tuple(swap.get(id(a), a) for a in args)
        kwargs = {n: swap.get(id(a), a) for n, a in kwargs.items()}
        left = q
    result = func(*args, **kwargs)
    tap.products.append((left, k, result, number))
    return result


def _qk_edits(tap: Tap, number: int, call: Call) -> list[Edit]:
    """Edits of q and k for the product ``number`` of a hand-written site; the site must have been seen before."""
    edits = [e for e in tap.begin(call) if e.quantity in BEFORE_QK]
    if not edits:
        return []
    if any(e.quantity == "kv" for e in edits):
        raise ValueError(f"{tap.name} computes its attention by hand: edit k and v separately there, not together")
    known = tap.watches[0].known(tap.name)
    if known is None or not known.qk:
        raise ValueError(
            f"{tap.name} computes its attention by hand: run regard.sites(model, ...) once before editing q or k there"
        )
    return edits if number in known.qk else []


def _einsum_plan(equation: Any, operands: list[Tensor]) -> str | None:
    """``scores`` for b..id,b..jd->b..ij and ``values`` for b..ij,b..jd->b..id, whatever the letters."""
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, _, right = inputs.partition(",")
    if min(len(left), len(right), len(out)) < 3 or left[:-2] != right[:-2] or left[:-2] != out[:-2]:
        return None
    if left[-1] == right[-1] and out[-2:] == left[-2] + right[-2]:
        return "scores"
    if left[-1] == right[-2] and out[-2:] == left[-2] + right[-1]:
        return "values"
    return None


MIXTURE = "its weights are changed between the softmax and the product with the values: a mixture"
BOTH_WAYS = (
    "two softmaxes run over one product, along its rows and along its columns: attention in both directions at once"
)


def _softmax(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scores = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(scores, Tensor) or scores.ndim < 3 or dim is None:
        return func(*args, **kwargs)
    if dim not in (-1, scores.ndim - 1):
        tap.softmaxes.append(
            f"its softmax runs over axis {dim} of {scores.ndim}, not over the keys: a factorised (linear) form"
        )
        return func(*args, **kwargs)
    product = next((p for p in reversed(tap.products) if p[2].shape[-2:] == scores.shape[-2:]), None)
    if product is None or product[2].numel() != scores.numel():
        tap.softmaxes.append("its softmax is not over products of queries with keys")
        return func(*args, **kwargs)
    q, k, _, number = product
    fold = tap.fold(q)
    call = Call(fold.apart(q), fold.apart(k), fold.apart(k), scale=1.0, host_scores=fold.apart(scores))
    call.product = number
    tap.softmaxes.append(BOTH_WAYS if _turned(tap, call) else MIXTURE)
    edits = tap.begin(call)
    before = [e for e in edits if e.quantity in ("mask", "bias", "scores")]
    for e in before:
        if e.quantity != "scores":
            e.before(call)
    if before:
        edited = call.raw_scores() if call.bias is None else call.raw_scores() + call.bias
        for e in before:
            if e.quantity == "scores":
                edited = e.on_scores(edited, call)
        call.host_scores, call.bias = edited, None
        weights = fold.back(call.normalize(edited, call.allowed())).to(scores.dtype)
    else:
        weights = func(*args, **kwargs)
    for e in edits:
        if e.quantity == "weights":
            call.final_weights = e.on_weights(fold.apart(exact(weights)), call)
            weights = fold.back(call.final_weights).to(scores.dtype)
    tap.pending = (weights, call, fold)
    return weights


def _turned(tap: Tap, call: Call) -> bool:
    """Whether these scores are those of the softmax before, turned round."""
    before = None if tap.pending is None or torch.compiler.is_compiling() else tap.pending[1].host_scores
    return before is not None and call.host_scores is not None and torch.equal(call.host_scores, before.mT)


def _values(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], v: Tensor) -> Any:
    """weights v of a hand-written site, with the edits of v before and those of the output after."""
    assert tap.pending is not None
    _, call, fold = tap.pending
    tap.pending = None
    tap.softmaxes.clear()
    edits = tap.edits(call)
    k, call.v = call.k, fold.apart(v)
    given = call.v
    for e in edits:
        if e.quantity in ("v", "share", "scale_keys"):
            e.before(call)
    call.k = k
    if call.v is not given:
        back = fold.back(call.v)
        args = tuple(back if a is v else a for a in args)
        kwargs = {n: back if a is v else a for n, a in kwargs.items()}
    result = func(*args, **kwargs)
    out = fold.apart(result)
    done = tap.finish(call, out, edits, "function")
    return result if done is out else fold.back(done)


def _dropout(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dropout of the weights keeps them pending."""
    result = func(*args, **kwargs)
    if tap.pending is not None and args and args[0] is tap.pending[0]:
        call = tap.pending[1]
        if result is not args[0]:
            call.dropout = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        tap.pending = (result, *tap.pending[1:])
    return result


def _cast(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A cast or a copy of the weights keeps them pending."""
    result = func(*args, **kwargs)
    if tap.pending is not None and args and args[0] is tap.pending[0] and isinstance(result, Tensor):
        tap.pending = (result, *tap.pending[1:])
    return result


SEAMS[F.scaled_dot_product_attention] = _sdpa
for product in (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
):
    SEAMS[product] = _product
for normalizer in (F.softmax, torch.softmax, Tensor.softmax):
    SEAMS[normalizer] = _softmax
SEAMS[F.dropout] = _dropout
for cast in (Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.contiguous, Tensor.clone):
    SEAMS[cast] = _cast
