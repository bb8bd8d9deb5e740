"""What edits become: changed tensors, scaled values, or the matrix in the open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.slices import exact
from regard.core.tokens import Rows, pick
from regard.ops import attend as ops

if TYPE_CHECKING:
    from regard.core.edit import Edit


def scale_keys(call: Call, factors: Tensor) -> None:
    """The kernel gets scaled values; who reads the call finds the factors on the weights, and the values as they were."""
    plain = call.v
    if factors.shape[1] not in (1, plain.shape[1]):
        call.k, plain = (ops.widen(x, call.q.shape[1] // x.shape[1]) for x in (call.k, plain))
    call.unscaled = plain if call.unscaled is None else call.unscaled
    call.v = plain * factors.transpose(-1, -2)
    call.key_scale = factors if call.key_scale is None else call.key_scale * factors


def keys_of(call: Call, where: Rows) -> Tensor:
    if isinstance(where, str):
        if call.tokens_k is None:
            raise ValueError(
                f"{where!r}: the key tokens of {call.site} have no names; describe them with regard.tokens(model, k='text[77]')"
            )
        return call.tokens_k.index(where, call.q.device)
    return pick(torch.arange(call.k.shape[2], device=call.q.device), where)


def index_grid(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, h, l), s, device = call.q.shape[:3], call.k.shape[2], call.q.device
    axes = [torch.arange(n, device=device) for n in (b, h, l, s)]
    axes[2] = axes[2] + call.q_start
    return tuple(a.view([-1 if i == j else 1 for j in range(4)]) for i, a in enumerate(axes))  # type: ignore[return-value]


def run_eager(call: Call, edits: Sequence[Edit]) -> Tensor:
    """The output with the matrix in the open, edits of scores and weights applied."""
    scores = call.raw_scores()
    for e in edits:
        if e.quantity == "scores":
            scores = e.on_scores(scores, call)
    weights = call.normalize(scores, call.allowed())
    for e in edits:
        if e.quantity == "weights":
            weights = e.on_weights(weights, call)
    call.final_weights = weights
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    return ops.mix(weights, exact(call.v)).to(call.v.dtype)


def pairs_of(allow: Callable[..., Tensor] | Tensor) -> Callable[[Call], Tensor]:
    """What says for a call which queries may look at which keys.

    Raises:
        ValueError: a tensor that is not boolean.
    """
    if isinstance(allow, Tensor):
        if allow.dtype != torch.bool:
            raise ValueError(f"mask must be boolean, True where a query may look; got {allow.dtype}")
        return lambda call: allow.to(call.q.device)
    return lambda call: allow(*index_grid(call))


def fitting(pairs: Tensor, name: str, call: Call) -> Tensor:
    """``pairs``, if it broadcasts to the scores; ValueError otherwise."""
    full = (*call.q.shape[:3], call.k.shape[2])
    sizes = zip(reversed(pairs.shape), reversed(full), strict=False)
    if pairs.ndim > 4 or any(n not in (1, size) for n, size in sizes):
        raise ValueError(f"{call.site}: the {name} {tuple(pairs.shape)} does not fit scores of {tuple(full)}")
    return pairs


def same(new: Tensor, old: Tensor, name: str, call: Call) -> Tensor:
    """``new``, if it has the shape of ``old``; ValueError otherwise."""
    if new.shape != old.shape:
        raise ValueError(f"{call.site}: the edit of {name} returned {tuple(new.shape)}, expected {tuple(old.shape)}")
    return new
