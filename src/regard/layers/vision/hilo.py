"""HiLo attention: some heads look at their window, the others at the mean of every window."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.vision._grid import pad_map, to_map
from regard.ops.attend import attend, mix, scores, softmax
from regard.ops.windows import crop, partition, unpartition


def _heads(x: Float[Tensor, "w p c"], num_heads: int) -> Float[Tensor, "w h p d"]:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _joined(out: Float[Tensor, "w h p d"]) -> Float[Tensor, "w p c"]:
    return out.transpose(1, 2).flatten(2)


def _naive(layer: HiLoAttention, x: Tensor, *, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Both groups as dense attention: a mask says which token is in whose window, a matrix takes the means."""
    s, token = layer.window_size, torch.arange(x.shape[1])
    window = token // grid[1] // s * -(-grid[1] // s) + token % grid[1] // s
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    parts = []
    if layer.hi_heads:
        q, k, v = (_heads(y, layer.hi_heads) for y in layer.h_qkv(x).chunk(3, -1))
        same = (window[:, None] == window) & real[:, None, None]
        parts.append(layer.h_proj(_joined(mix(softmax(scores(q, k), same), v))))
    if layer.lo_heads:
        member = (window == torch.arange(int(window.max()) + 1)[:, None]) & real[:, None]
        means = member.to(x) @ x / member.sum(-1, keepdim=True).clamp(min=1)
        q = _heads(layer.l_q(x), layer.lo_heads)
        k, v = (_heads(y, layer.lo_heads) for y in layer.l_kv(means).chunk(2, -1))
        parts.append(layer.l_proj(_joined(mix(softmax(scores(q, k), member.any(-1)[:, None, None]), v))))
    return torch.cat(parts, -1)


@method(
    "hilo",
    kind="layer",
    tags=Tags(input="grid", mask=True),
    example={"dim": 32, "num_heads": 4},
    naive=_naive,
)
class HiLoAttention(nn.Module):
    r"""Attention whose heads share the work by frequency: detail inside windows, layout from the windows' means.

    A part of the heads (Hi-Fi) attends inside small windows, where high frequencies live. The others (Lo-Fi) attend from
    every token to the average-pooled map, where low frequencies live. With windows :math:`W(i)` of s x s tokens and
    :math:`\bar x_w` the mean of window w

    .. math:: y_i = \big[\, O_h \sum_{j \in W(i)} A^h_{ij} V_h x_j \;;\; O_l \sum_w A^l_{iw} V_l \bar x_w \,\big],
        \qquad A = \mathrm{softmax}(q k^\top / \sqrt d)

    Args:
        dim: channels in and out.
        num_heads: heads of both groups together.
        window_size: s, side of a window; 1 makes every head Lo-Fi, which is plain attention.
        alpha: share of the heads that are Lo-Fi, in [0, 1]; rounded down to whole heads.
        bias: of the projections to q, k and v; the output projections always have one.

    Shape: x (b, n, dim) with grid (H, W), n = H W -> (b, n, dim). ``mask`` (b, n) is boolean, True on tokens that may be
    looked at. H and W need not be multiples of ``window_size``.

    Raises:
        ValueError: ``dim`` not a multiple of ``num_heads``, ``window_size`` below 1, ``alpha`` outside [0, 1]; x, grid or
            mask of another shape.

    Cost: 7/4 n c^2 + s^2 n c (Hi-Fi) and (3/4 + 1/s^2) n c^2 + n^2 c / s^2 (Lo-Fi) multiplications at ``alpha`` 1/2;
    :meth:`macs` counts any case.

    Example:
        >>> layer = HiLoAttention(dim=32, num_heads=4, alpha=0.75)
        >>> layer.hi_heads, layer.lo_heads
        (1, 3)
        >>> layer(torch.randn(2, 35, 32), grid=(5, 7)).shape
        torch.Size([2, 35, 32])

    Differs: sides that the window does not divide are padded, and what was added is neither a key nor part of a mean (the
    official classification code needs multiples, its detection code lets padding be attended). A product alpha *
    num_heads that is whole up to rounding error counts as whole. Parameters carry the official names.

    Reference: Zizheng Pan, Jianfei Cai, Bohan Zhuang, Fast Vision Transformers with HiLo Attention, NeurIPS 2022,
    arXiv:2205.13213
    """

    form = "softmax"

    def __init__(
        self, dim: int, num_heads: int = 8, window_size: int = 2, *, alpha: int | float = 0.5, bias: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be at least 1")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha={alpha} must be in [0, 1]")
        self.dim, self.window_size, self.head_dim = dim, window_size, dim // num_heads
        self.lo_heads = num_heads if window_size == 1 else int(num_heads * alpha + 1e-6)
        self.hi_heads = num_heads - self.lo_heads
        hi, lo = self.hi_heads * self.head_dim, self.lo_heads * self.head_dim
        if self.hi_heads:
            self.h_qkv = nn.Linear(dim, 3 * hi, bias=bias)
            self.h_proj = nn.Linear(hi, hi)
        if self.lo_heads:
            self.l_q = nn.Linear(dim, lo, bias=bias)
            self.l_kv = nn.Linear(dim, 2 * lo, bias=bias)
            self.l_proj = nn.Linear(lo, lo)

    def hi(self, x: Float[Tensor, "b H W c"], valid: Bool[Tensor, "b H W"] | None) -> Float[Tensor, "b H W e"]:
        """The Hi-Fi group: attention inside every window."""
        q, k, v = (_heads(y, self.hi_heads) for y in partition(self.h_qkv(x), self.window_size).chunk(3, -1))
        mask = None if valid is None else partition(valid[..., None], self.window_size)[:, None, None, :, 0]
        out = unpartition(_joined(attend(q, k, v, mask=mask)), self.window_size, x.shape[1:3])
        return self.h_proj(out)

    def lo(self, x: Float[Tensor, "b H W c"], valid: Bool[Tensor, "b H W"] | None) -> Float[Tensor, "b H W e"]:
        """The Lo-Fi group: attention from every token to the mean of every window."""
        b, height, width, c = x.shape
        windows, mask = partition(x, self.window_size).view(b, -1, self.window_size**2, c), None
        if valid is None:
            means = windows.mean(2)
        else:
            real = partition(valid[..., None], self.window_size).view(b, -1, self.window_size**2, 1)
            means = (windows * real).sum(2) / real.sum(2).clamp(min=1)
            mask = real.any(2)[:, None, None, :, 0]
        q = _heads(self.l_q(x).flatten(1, 2), self.lo_heads)
        k, v = (_heads(y, self.lo_heads) for y in self.l_kv(means).chunk(2, -1))
        return self.l_proj(_joined(attend(q, k, v, mask=mask)).unflatten(1, (height, width)))

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        image, valid = to_map(x, grid, mask, self.dim)
        padded, valid = pad_map(image, valid, self.window_size)
        parts = ([self.hi(padded, valid)] if self.hi_heads else []) + (
            [self.lo(padded, valid)] if self.lo_heads else []
        )
        return crop(torch.cat(parts, -1), image.shape[1:3]).flatten(1, 2)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiplications of one sample, padding included."""
        s2 = self.window_size**2
        windows = -(-grid[0] // self.window_size) * -(-grid[1] // self.window_size)
        n, hi, lo = windows * s2, self.hi_heads * self.head_dim, self.lo_heads * self.head_dim
        high = 3 * n * self.dim * hi + 2 * n * s2 * hi + n * hi**2
        low = n * self.dim * lo + 2 * windows * self.dim * lo + 2 * n * windows * lo + n * lo**2
        return high + low
