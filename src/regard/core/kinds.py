"""Self, cross, joint, pooled and channel attention told apart by what a module was called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from regard.core.call import Call


def streams_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of the streams of tokens among a module's arguments, one where queries and keys come from the same."""
    found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point() and a.ndim >= 3]
    # Queries, keys, values: what the values come from does not matter, and a position may have been added twice.
    if len(found) > 1 and (found[0] is found[1] or _equal(*found[:2])):
        found = found[:1]
    return [tuple(x.shape) for x in found[:3] if x.ndim == 3 or len(found) == 1]


def _equal(a: Tensor, b: Tensor) -> bool:
    return not torch.compiler.is_compiling() and a.dtype == b.dtype and torch.equal(a, b)


def kind_of(streams: list[tuple[int, ...]], call: Call) -> str:
    """Keys that a layer adds of its own (a zero, a bias, a cache) change no kind; ``pool`` leaves out queries or keys."""
    l, s, h, d = call.q.shape[2], call.k.shape[2], call.q.shape[1], call.q.shape[-1]
    # A mask or a position bias is no stream of tokens.
    streams = streams[:1] + [x for x in streams[1:] if x[-2:] != (l, s)]
    if len(streams) >= 2:
        if l == s and l == streams[0][1] + streams[1][1]:
            return "joint"
        return "cross" if any(n <= s <= n + 2 for n in streams[1][:2]) else "self"
    if streams and len(streams[0]) == 3 and l == s:
        _, tokens, channels = streams[0]
        if channels == h * l and tokens in (d, call.v.shape[-1]) and tokens != l:
            return "channel"
    whole = l < s and bool(streams) and len(streams[0]) == 3 and l in streams[0][:2]
    return "self" if l == s or whole else "pool"
