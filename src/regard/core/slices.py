"""Rows and heads of a call's tensors, and of what broadcasts to (b, h, l, s), in single precision or better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.tokens import pick


def exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding alone can explain; some hosts take a float64 softmax in float32."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 5e-2)


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows ``index`` of (b, h, l, ...); None: all."""
    return x if index is None else x[:, :, index]


def rows_of(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., index, :]


def heads_of(x: Tensor, heads: Any) -> Tensor:
    if heads is None or x.ndim < 3 or x.shape[-3] == 1:
        return x
    return x[..., pick(torch.arange(x.shape[-3], device=x.device), heads), :, :]


def as_met(x: Tensor, heads: Any, num_heads: int) -> Tensor:
    """What is (b, g, n, d), g key heads or all, as the query heads ``heads`` meet it; None: as stored."""
    if heads is None:
        return x
    return x[:, pick(torch.arange(num_heads, device=x.device), heads) // (num_heads // x.shape[1])]
