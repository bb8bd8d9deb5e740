"""Triplet attention: three gates, each over two of the axes channel, height and width."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.cnn.cbam import SpatialGate, naive_gate


def naive(layer: TripletAttention, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """Rotate the whole map, gate it place by place, rotate it back, and average the three maps."""
    total = torch.zeros_like(x)
    for gate, order in ((layer.cw, (0, 2, 1, 3)), (layer.hc, (0, 3, 2, 1)), (layer.hw, (0, 1, 2, 3))):
        turned = x.permute(order)
        total = total + (turned * naive_gate(gate, turned)).permute(order) / 3
    return total


@method("triplet-attention", kind="layer", tags=Tags(input="image"), example={"kernel_size": 3}, naive=naive)
class TripletAttention(nn.Module):
    r"""Gate a feature map by channel and column, by row and channel, and by row and column; average the three.

    Each gate reads the maximum and the mean over the axis that it does not cover, and slides one convolution over the
    other two, so that the channel axis is treated as an ordered axis like height and width. It stands on the residual
    branch of a block, after the last normalisation.

    .. math::
        y_{chw} = \tfrac13 \big(s^{CW}_{cw} + s^{HC}_{hc} + s^{HW}_{hw}\big)\, x_{chw}, \qquad
        s = \sigma\big(\mathrm{BN}(\mathrm{conv}_{k \times k}[\max x;\, \mathrm{mean}\, x])\big)

    Args:
        kernel_size: side of the three convolutions, odd.

    Shape: x (b, c, H, W) -> (b, c, H, W), any c, H and W; ``gates`` gives (b, c, 1, W), (b, c, H, 1) and (b, 1, H, W).

    Raises:
        ValueError: an even kernel, x that is not 4-D, a single number to normalise in training.

    Cost: 6 k^2 + 6 parameters for every c; 4 k^2 b (c W + H c + H W) FLOPs besides pooling and scaling.

    Example:
        >>> import torch
        >>> layer = TripletAttention()
        >>> layer(torch.randn(2, 32, 7, 9)).shape
        torch.Size([2, 32, 7, 9])

    Differs: the three factors are averaged before the map is multiplied once, which gives the same numbers as
        averaging three rotated and gated maps, without copying the map. The variant without the third gate is left out.

    Reference: Diganta Misra, Trikay Nalamada, Ajay Uppili Arasanipalai, Qibin Hou, Rotate to Attend: Convolutional
        Triplet Attention Module, WACV 2021, arXiv:2010.03045
    """

    form = "gate"

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.cw, self.hc, self.hw = (SpatialGate(kernel_size) for _ in range(3))

    def gates(
        self, x: Float[Tensor, "b c H W"]
    ) -> tuple[Float[Tensor, "b c 1 W"], Float[Tensor, "b c H 1"], Float[Tensor, "b 1 H W"]]:
        if x.ndim != 4:
            raise ValueError(f"x must be (b, c, H, W); got {tuple(x.shape)}")
        by_height, by_width = x.transpose(1, 2), x.transpose(1, 3)
        return self.cw.gate(by_height).transpose(1, 2), self.hc.gate(by_width).transpose(1, 3), self.hw.gate(x)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        cw, hc, hw = self.gates(x)
        return x * (cw + hc + hw) / 3
