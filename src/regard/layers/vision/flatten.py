"""Focused linear attention: linear attention with a sharpening feature map and a convolution that restores the rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.vision._grid import to_map
from regard.ops.linear import linear_attend

EPS = 1e-6


def focused_map(x: Float[Tensor, "*n c"], power: int | float) -> Float[Tensor, "*n c"]:
    r"""The focused map :math:`f_p(x) = \frac{\|x\|}{\|x^p\|} x^p` of non-negative vectors, elementwise power.

    The norm stays, the direction moves towards the largest coordinate. Vectors are divided by that coordinate first,
    which changes nothing in the formula and keeps every power in range. The zero vector stays zero.

    Raises:
        ValueError: ``power`` not positive.
    """
    if power <= 0:
        raise ValueError(f"power={power} must be positive")
    largest = x.detach().amax(-1, keepdim=True)
    sharp = (x / largest.masked_fill(largest == 0, 1.0)) ** power
    norm = sharp.norm(dim=-1, keepdim=True)
    return sharp * (x.norm(dim=-1, keepdim=True) / norm.masked_fill(norm == 0, 1.0))


def _naive(layer: FocusedLinearAttention, x: Tensor, *, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """The weights in the open, row sums and all, and the convolution offset by offset."""
    (height, width), (b, n, _) = grid, x.shape
    q, k, v = layer.qkv(x).chunk(3, -1)
    focus = []
    for y in (q, k + layer.positions(grid)):
        y = ((y.relu() + EPS) / F.softplus(layer.scale)).double()
        powered = y**layer.power
        focus.append((powered / powered.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)).to(x))
    q, k, v = (y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for y in (*focus, v))
    real = torch.ones(b, n, dtype=torch.bool) if mask is None else mask
    products = (q @ k.transpose(-1, -2)) * real[:, None, None]
    count = real.sum(-1).clamp(min=1).to(x)[:, None, None, None]
    out = products @ v / (products.sum(-1, keepdim=True) + EPS * count)
    image = v.masked_fill(~real[:, None, :, None], 0.0).unflatten(2, grid)
    r = layer.dwc.kernel_size[0] // 2
    image = F.pad(image, (0, 0, r, r, r, r))
    assert layer.dwc.bias is not None
    local = layer.dwc.bias.expand(b, layer.num_heads, height, width, -1)
    for i in range(2 * r + 1):
        for j in range(2 * r + 1):
            local = local + image[:, :, i : i + height, j : j + width] * layer.dwc.weight[:, 0, i, j]
    return layer.proj((out + local.flatten(2, 3)).transpose(1, 2).flatten(2))


@method(
    "flatten",
    kind="layer",
    tags=Tags(input="grid", mask=True),
    example={"dim": 32, "num_heads": 4, "size": (3, 5)},
    naive=_naive,
)
class FocusedLinearAttention(nn.Module):
    r"""Linear attention made sharp by a power map and full-rank by a depthwise convolution of the values.

    Linear attention weighs by :math:`\phi(q) \cdot \phi(k)` in linear time, but its rows are flat and its matrix has the
    rank of a head's width. The focused map pulls queries and keys towards their largest channels, and a small convolution
    of the values adds a sparse local term of full rank. It replaces softmax attention in pyramids, at any resolution.

    .. math:: o_i = \frac{\sum_j \phi(q_i) \cdot \phi(k_j)\, v_j}{\sum_j \phi(q_i) \cdot \phi(k_j)} + \mathrm{DWConv}(v)_i,
        \qquad \phi(x) = f_p\Big(\frac{\mathrm{ReLU}(x) + \epsilon}{\mathrm{softplus}(s)}\Big), \quad
        f_p(x) = \frac{\|x\|}{\|x^p\|} x^p

    Norms are over all ``dim`` channels, before the heads are split; the convolution has one kernel per channel of a head,
    shared by the heads; a learned position is added to the keys.

    Args:
        dim: channels in and out.
        num_heads: heads.
        size: (H, W) of the table of positions; for another grid it is interpolated (bicubic).
        power: p, the focusing factor.
        kernel_size: of the convolution, odd.
        bias: of the projections to q, k and v; the output projection always has one.

    Shape: x (b, n, dim) with grid (H, W), n = H W -> (b, n, dim). ``mask`` (b, n) is boolean, True on tokens that may be
    looked at.

    Raises:
        ValueError: ``dim`` not a multiple of ``num_heads``, a ``size`` that is not two positive sides, ``power`` not
            positive, an even ``kernel_size``; x, grid or mask of another shape.

    Cost: 4 n c^2 + 2 n c^2 / h + 25 n c multiplications at the default kernel; state c^2 / h numbers.

    Example:
        >>> layer = FocusedLinearAttention(dim=32, num_heads=4, size=(7, 7))
        >>> layer(torch.randn(2, 63, 32), grid=(7, 9)).shape
        torch.Size([2, 63, 32])

    Differs: the map is computed in float32 or wider from vectors scaled to a largest coordinate of 1, so that no power
    underflows (the official code divides zero by zero in half precision). Positions are interpolated where the official
    code refuses another size. A mask is honoured; the official code ignores it. The reduced-keys form (``sr_ratio`` above
    1), which no published model uses, is left out. Parameters carry the official names and shapes.

    Reference: Dongchen Han, Xuran Pan, Yizeng Han, Shiji Song, Gao Huang, FLatten Transformer: Vision Transformer using
    Focused Linear Attention, ICCV 2023, arXiv:2308.00442
    """

    form = "linear"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        size: tuple[int, int] = (14, 14),
        *,
        power: int | float = 3,
        kernel_size: int = 5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size={size} must be (H, W), both positive")
        if power <= 0:
            raise ValueError(f"power={power} must be positive")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd")
        self.dim, self.num_heads, self.size, self.power = dim, num_heads, tuple(size), power
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        width = dim // num_heads
        self.dwc = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, size[0] * size[1], dim))
        self.proj = nn.Linear(dim, dim)

    def positions(self, grid: tuple[int, ...]) -> Float[Tensor, "1 n c"]:
        """The table of positions, at the size of ``grid``."""
        if tuple(grid) == self.size:
            return self.positional_encoding
        table = self.positional_encoding.transpose(1, 2).unflatten(2, self.size)
        return F.interpolate(table, size=grid, mode="bicubic").flatten(2).transpose(1, 2)

    def feature(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        r"""The feature map :math:`\phi` of queries or keys, per head."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        focused = focused_map((x.relu() + EPS) / F.softplus(self.scale), self.power)
        return focused.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        image, _ = to_map(x, grid, mask, self.dim)
        sides = image.shape[1:3]
        q, k, v = self.qkv(x).chunk(3, -1)
        if mask is not None:
            v = v.masked_fill(~mask[..., None], 0.0)
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = linear_attend(self.feature(q), self.feature(k + self.positions(sides)), v, mask, EPS).to(v.dtype)
        local = self.dwc(v.transpose(2, 3).unflatten(3, sides).flatten(0, 1))
        out = out + local.flatten(2).transpose(1, 2).unflatten(0, out.shape[:2])
        return self.proj(out.transpose(1, 2).flatten(2))
