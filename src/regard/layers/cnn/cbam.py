"""CBAM: a feature map gated first by channel, then by place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.ops.gates import POOLS, apply_gate, channel_pool, zpool


class ChannelGate(nn.Module):
    r"""One factor a channel, from pooled descriptors that pass one MLP and are summed.

    .. math:: M_c = \sigma\Big(\sum_p \mathrm{MLP}(\mathrm{pool}_p\, x)\Big), \qquad y = M_c \cdot x

    Args:
        dim: channels.
        reduction: the MLP has ``max(1, dim // reduction)`` hidden units.
        pools: kinds of :func:`regard.ops.gates.channel_pool`.

    Shape: (b, dim, H, W) -> (b, dim, H, W); ``gate`` gives (b, dim).

    Raises:
        ValueError: ``dim`` or ``reduction`` below 1, no or unknown pools, a map of another shape.
    """

    def __init__(self, dim: int, reduction: int = 16, pools: Sequence[str] = ("avg", "max")) -> None:
        super().__init__()
        if dim < 1 or reduction < 1:
            raise ValueError(f"dim={dim} and reduction={reduction} must be at least 1")
        if not pools or not set(pools) <= POOLS.keys():
            raise ValueError(f"pools={pools!r} must be some of {sorted(POOLS)}")
        self.dim, self.pools = dim, tuple(pools)
        hidden = max(1, dim // reduction)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def gate(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c"]:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (b, {self.dim}, H, W); got {tuple(x.shape)}")
        return sum(self.mlp(channel_pool(x, kind)) for kind in self.pools).sigmoid()  # type: ignore[union-attr]

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return apply_gate(x, self.gate(x))


class SpatialGate(nn.Module):
    r"""One factor a place, from the maximum and the mean over the channels.

    .. math::
        M_s = \sigma\big(\mathrm{BN}(\mathrm{conv}_{k \times k}[\max_c x;\, \mathrm{mean}_c x])\big), \quad
        y = M_s \cdot x

    Args:
        kernel_size: side of the convolution, odd.

    Shape: (b, c, H, W) -> (b, c, H, W) for any number of channels; ``gate`` gives (b, 1, H, W).

    Raises:
        ValueError: an even kernel, x that is not 4-D, a single number to normalise in training.
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and positive")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=0.01)

    def gate(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1 H W"]:
        if x.ndim != 4:
            raise ValueError(f"x must be (b, c, H, W); got {tuple(x.shape)}")
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise ValueError("x has one row and one place: batch norm needs more than one number in training")
        return self.norm(self.conv(zpool(x))).sigmoid()

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return apply_gate(x, self.gate(x))


def naive_pool(channel: Float[Tensor, "H W"], kind: str) -> Float[Tensor, ""]:
    match kind:
        case "avg":
            return channel.sum() / channel.numel()
        case "max":
            return channel.max()
        case "lp":
            return channel.square().sum().sqrt()
    return channel.exp().sum().log()


def naive_gate(gate: SpatialGate, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1 H W"]:
    """The spatial gate place by place."""
    k = gate.conv.kernel_size[0]
    pooled = F.pad(torch.stack([x.max(1).values, x.sum(1) / x.shape[1]], 1), (k // 2,) * 4)
    z = torch.empty_like(x[:, :1])
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            z[:, 0, i, j] = (gate.conv.weight[0] * pooled[:, :, i : i + k, j : j + k]).sum((1, 2, 3))
    norm = gate.norm
    return 1 / (1 + (-F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)).exp())


def naive(layer: CBAM, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """Channel by channel, then place by place; with the stored statistics."""
    gated = []
    for image in x:
        total = torch.zeros_like(image[:, 0, 0])
        for kind in layer.channel.pools:
            total = total + layer.channel.mlp(torch.stack([naive_pool(channel, kind) for channel in image]))
        gated.append(torch.stack([channel / (1 + (-z).exp()) for channel, z in zip(image, total)]))
    stacked = torch.stack(gated)
    return stacked * naive_gate(layer.spatial, stacked)


@method(
    "cbam", kind="layer", tags=Tags(input="image"), example={"dim": 16, "reduction": 4, "kernel_size": 3}, naive=naive
)
class CBAM(nn.Module):
    r"""Gate a feature map by channel, then by place.

    It stands on the residual branch of every block, after the last normalisation and before the addition (in timm's
    ResNets: ``block_args={"attn_layer": lambda dim, **_: CBAM(dim)}``). The channel gate alone is :class:`ChannelGate`.

    .. math::
        M_c = \sigma\big(\mathrm{MLP}(\mathrm{avg}\,x) + \mathrm{MLP}(\max x)\big), \quad x' = M_c \cdot x, \qquad
        M_s = \sigma\big(\mathrm{BN}(\mathrm{conv}[\max_c x';\, \mathrm{mean}_c x'])\big), \quad y = M_s \cdot x'

    Args:
        dim: channels.
        reduction: the MLP has ``max(1, dim // reduction)`` hidden units.
        kernel_size: side of the spatial convolution, odd.
        pools: descriptors of a channel, kinds of :func:`regard.ops.gates.channel_pool`.

    Shape: x (b, dim, H, W) -> (b, dim, H, W), any H and W.

    Raises:
        ValueError: see :class:`ChannelGate` and :class:`SpatialGate`.

    Cost: with hidden width r and kernel k, (2 r + 1) dim + r + 2 k^2 + 2 parameters; about 4 b dim r + 4 k^2 b H W
        FLOPs besides pooling and scaling, which read the map a few times.

    Example:
        >>> import torch
        >>> layer = CBAM(32)
        >>> layer(torch.randn(2, 32, 7, 9)).shape
        torch.Size([2, 32, 7, 9])

    Differs: the paper's equation has no batch norm in the spatial gate, the official code has; it is here, and its
        weight starts at zero as in the official networks, so that the spatial gate begins at one half everywhere. The
        hidden width is at least 1. The gradient of a maximum is shared by ties.

    Reference: Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon, CBAM: Convolutional Block Attention Module,
        ECCV 2018, arXiv:1807.06521
    """

    form = "gate"

    def __init__(
        self, dim: int, reduction: int = 16, kernel_size: int = 7, pools: Sequence[str] = ("avg", "max")
    ) -> None:
        super().__init__()
        self.channel = ChannelGate(dim, reduction, pools)
        self.spatial = SpatialGate(kernel_size)
        nn.init.zeros_(self.spatial.norm.weight)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return self.spatial(self.channel(x))
