"""Forgetting: which keys and values a site's cache keeps after a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from regard.core.call import Call

if TYPE_CHECKING:
    from regard.core.edit import Edit


class Held(Protocol):
    """The keys and values that a cache holds for one site."""

    @property
    def position(self) -> int:
        """Tokens seen so far, those that are no longer held among them."""
        ...

    def keep(self, index: Tensor) -> None:
        """Hold only those that ``index`` (b, g, k) names, in its order; later tokens keep the positions they would have had."""
        ...


def kept(edit: Edit, call: Call, held: Held | None) -> Tensor | None:
    """What ``edit`` keeps, as (b, g, k); None for everything.

    Raises ValueError where the call has no cache, or the index is none of the call's keys in rising order.
    """
    if torch.compiler.is_compiling():
        raise ValueError(f"{call.site}: a cache is edited between calls of an eager model, not inside a compiled graph")
    if held is None:
        raise ValueError(f"{call.site}: this call has no cache to edit; call the model with use_cache=True or cache=")
    index = edit.change(call)
    if index is None:
        return None
    (b, g, s), shape = call.k.shape[:3], tuple(index.shape)
    if index.dtype != torch.long or index.ndim not in (2, 3) or shape[0] != b or shape[1:-1] not in ((), (g,)):
        raise ValueError(
            f"{call.site}: the keys to keep must be numbers (b, k) or (b, g, k) with b={b}, g={g}; got {index.dtype} {shape}"
        )
    if index.ndim == 2:
        index = index[:, None].expand(b, g, -1)
    if not index.shape[-1] or int(index.min()) < 0 or int(index.max()) >= s or not bool((index.diff() > 0).all()):
        raise ValueError(
            f"{call.site}: the keys to keep must rise and be at least one of 0..{s - 1}; got {index.tolist()}"
        )
    return None if index.shape[-1] == s else index
