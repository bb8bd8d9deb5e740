"""Pooling and multiplying for gates on feature maps (b, c, H, W)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "lp": lambda x: torch.linalg.vector_norm(x, 2, (2, 3)),
    "lse": lambda x: x.logsumexp((2, 3)),
}


def channel_pool(x: Float[Tensor, "b c H W"], kind: str) -> Float[Tensor, "b c"]:
    """One number a channel.

    ``avg``, ``max``, ``lp`` (root of the sum of squares) or ``lse`` (log of the sum of exponentials, without overflow).
    The gradient of a maximum is shared evenly by its ties, that of a norm of zero is zero.
    """
    if kind not in POOLS:
        raise ValueError(f"kind={kind!r} is not one of {sorted(POOLS)}")
    return POOLS[kind](x)


def zpool(x: Float[Tensor, "b c H W"], dim: int = 1) -> Float[Tensor, "..."]:
    """Maximum, then mean, over one axis: that axis becomes 2 long."""
    return torch.cat([x.amax(dim, keepdim=True), x.mean(dim, keepdim=True)], dim)


def strip_pool(x: Float[Tensor, "b c H W"], axis: int) -> Float[Tensor, "b c n"]:
    """The mean over rows (``axis=2``) or columns (``axis=3``): what is left is one strip along the other axis."""
    if axis not in (2, 3, -1, -2):
        raise ValueError(f"axis={axis} must be 2 (over rows) or 3 (over columns)")
    return x.mean(axis)


def apply_gate(x: Float[Tensor, "b c H W"], *gates: Float[Tensor, "..."]) -> Float[Tensor, "b c H W"]:
    """The map times every gate; a gate is (b, c), or 4-D and broadcastable to the map."""
    for gate in gates:
        factor = gate[..., None, None] if gate.ndim == 2 else gate
        if factor.ndim != 4 or any(n not in (1, side) for n, side in zip(factor.shape, x.shape)):
            raise ValueError(f"a gate must be (b, c) or broadcast to {tuple(x.shape)}; got {tuple(gate.shape)}")
        x = x * factor
    return x
