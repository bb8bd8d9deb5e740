"""Rotary positions of a layer that does not bring its own sense of place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.ops.positions import rotate_halves


class Rotary(nn.Module):
    """Turns queries and keys by their positions, channel i together with channel i + m.

    A score then depends on how far apart two tokens are, and not on where they are, so positions may be counted from
    anywhere.

    Args:
        rates: radians per position, one for every two channels, (m,); channels from 2m on stay.
        factor: queries and keys are multiplied by it, as some stretched forms want.
    """

    rates: Tensor

    def __init__(self, rates: Float[Tensor, "m"], factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("rates", rates.detach().clone(), persistent=False)
        self.factor = factor

    def forward(self, x: Float[Tensor, "b h n d"], start: int = 0) -> Float[Tensor, "b h n d"]:
        """``start``: the position of the first token."""
        kind = torch.promote_types(self.rates.dtype, torch.float32)
        positions = torch.arange(start, start + x.shape[2], device=x.device, dtype=kind)
        turned = rotate_halves(x, positions[:, None] * self.rates.to(kind))
        return turned if self.factor == 1.0 else turned * self.factor
