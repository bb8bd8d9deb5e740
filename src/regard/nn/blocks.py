"""Parts that transformer networks share."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops whole samples of a residual branch in training, and scales up the others (stochastic depth).

    Args:
        rate: share of the samples that are dropped, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate={rate} must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.rate or not self.training:
            return x
        return x * F.dropout(x.new_ones(len(x), *(1,) * (x.ndim - 1)), self.rate)


class MLP(nn.Module):
    """Linear, GELU, linear, on the last axis.

    Args:
        dim: channels in and out.
        hidden: channels in between.
        approximate: of the GELU, ``"none"`` or ``"tanh"``.
    """

    def __init__(self, dim: int, hidden: int, *, approximate: str = "none") -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.approximate = approximate

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
