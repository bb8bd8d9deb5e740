"""Multi-axis attention: attention inside windows, then attention over grids spread across the whole map."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.vision._grid import pad_map, to_map
from regard.nn.blocks import MLP, DropPath
from regard.ops.attend import attend, reference
from regard.ops.positions import grid_positions, relative_index
from regard.ops.windows import crop, grid_partition, grid_unpartition, partition, unpartition


class RelativeAttention(nn.Module):
    r"""Multi-head attention in windows of P x P tokens, with a learned bias for every offset of key and query.

    .. math:: y = O\, \mathrm{softmax}\big(q k^\top / \sqrt d + B\big)\, v

    Args:
        dim: channels in and out.
        num_heads: heads.
        window_size: P.
        dropout: of the weights, in training.

    Shape: (w, P^2, dim) -> (w, P^2, dim). ``mask`` (w, P^2 or 1, P^2) is True where a query may look at a key. ``window``
    gives the sides of windows that are smaller than P x P.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        self.num_heads, self.window_size, self.dropout = num_heads, window_size, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1))
        nn.init.normal_(self.table, std=0.02)

    def bias(self, window: tuple[int, int] | None = None) -> Float[Tensor, "h p p"]:
        """The bias of every pair of tokens of a window (default P x P): an entry of the table at key minus query."""
        at = grid_positions(window or (self.window_size, self.window_size), self.table.device)
        return self.table.flatten(1)[:, relative_index(at, at, self.window_size)]

    def resize(self, window_size: int) -> None:
        """Interpolate the table (bicubic) for another window, for images of another size than those of training."""
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be at least 1")
        side = 2 * window_size - 1
        with torch.no_grad():
            table = F.interpolate(self.table[None], size=(side, side), mode="bicubic", align_corners=True)[0]
        self.window_size, self.table = window_size, nn.Parameter(table, self.table.requires_grad)

    def project(self, x: Float[Tensor, "w p c"]) -> tuple[Tensor, ...]:
        """Queries, keys and values, (w, h, p, d) each."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        x: Float[Tensor, "w p c"],
        mask: Bool[Tensor, "w q p"] | None = None,
        window: tuple[int, int] | None = None,
    ) -> Float[Tensor, "w p c"]:
        allowed = None if mask is None else mask[:, None]
        dropout = self.dropout if self.training else 0.0
        out = attend(*self.project(x), mask=allowed, bias=self.bias(window)[None], dropout=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))


class PartitionAttention(nn.Module):
    """A transformer block whose attention stays inside the parts of a map; how the map is cut is the subclass's.

    ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, on maps (b, H, W, dim).
    """

    cut: ClassVar[Callable[..., Tensor]]
    join: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: int | float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        approximate: str = "none",
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = RelativeAttention(dim, num_heads, window_size, dropout)
        self.mlp = MLP(dim, int(dim * mlp_ratio), approximate=approximate)
        self.drop_path = DropPath(drop_path)

    def mix(self, x: Float[Tensor, "b H W c"], valid: Bool[Tensor, "b H W"] | None = None) -> Float[Tensor, "b H W c"]:
        """Attention inside every part; sides that the window does not divide are padded, the padding masked."""
        size = min(self.attn.window_size, x.shape[1]), min(self.attn.window_size, x.shape[2])
        padded, valid = pad_map(x, valid, size)
        mask = None if valid is None else self.cut(valid[..., None], size)[:, None, :, 0]
        out = self.join(self.attn(self.cut(padded, size), mask, size), size, padded.shape[1:3])
        return crop(out, x.shape[1:3])

    def forward(
        self, x: Float[Tensor, "b H W c"], valid: Bool[Tensor, "b H W"] | None = None
    ) -> Float[Tensor, "b H W c"]:
        x = x + self.drop_path(self.mix(self.norm1(x), valid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BlockAttention(PartitionAttention):
    """Parts of P x P neighbouring tokens."""

    cut, join = staticmethod(partition), staticmethod(unpartition)


class GridAttention(PartitionAttention):
    """Parts of G x G tokens spread over the whole map, at strides of H / G and W / G."""

    cut, join = staticmethod(grid_partition), staticmethod(grid_unpartition)


def _dense(block: PartitionAttention, x: Tensor, grid: tuple[int, int], valid: Tensor, *, spread: bool) -> Tensor:
    """One block as dense attention over all tokens: who shares a part with whom, and the bias pair by pair."""
    size = block.attn.window_size
    at, stride = grid_positions(grid), torch.tensor([-(-side // size) for side in grid])
    part, place = (at % stride, at // stride) if spread else (at // size, at % size)
    offset = place - place[:, None] + size - 1
    same = (part[:, None] == part).all(-1) & valid[:, None, None]
    bias = block.attn.table[:, offset[..., 0], offset[..., 1]]
    q, k, v = block.attn.project(block.norm1(x))
    out = reference(q, k, v, mask=same, bias=bias[None]).transpose(1, 2).flatten(2)
    x = x + block.attn.proj(out)
    return x + block.mlp(block.norm2(x))


def _naive(layer: MaxAttention, x: Tensor, *, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return _dense(layer.grid, _dense(layer.block, x, grid, valid, spread=False), grid, valid, spread=True)


@method(
    "maxvit",
    kind="layer",
    tags=Tags(input="grid", mask=True),
    example={"dim": 32, "num_heads": 4, "window_size": 2},
    naive=_naive,
)
class MaxAttention(nn.Module):
    r"""Attention in windows of neighbours followed by attention over dilated grids: every token reaches every other.

    Full attention is split into two sparse forms of linear cost, each a transformer block with its own norm, MLP and
    residuals. Block attention mixes P x P neighbours; grid attention mixes G x G tokens at strides of H / G and W / G, so
    that one of each has the whole map in view. With w(i) the window of token i and g(i) its grid

    .. math:: z_i = \mathrm{T}_b\big(\{x_j : w(j) = w(i)\}\big)_i, \qquad y_i = \mathrm{T}_g\big(\{z_j : g(j) = g(i)\}\big)_i

    where in both the attention is :math:`\mathrm{softmax}(q k^\top / \sqrt d + B)\, v` with a learned bias B of offsets.

    Args:
        dim: channels in and out.
        num_heads: heads; the paper's have 32 channels.
        window_size: P, side of a window.
        grid_size: G, side of a grid; default ``window_size``.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        dropout: of the weights, in training.

    Shape: x (b, n, dim) with grid (H, W), n = H W -> (b, n, dim). ``mask`` (b, n) is boolean, True on tokens that may be
    looked at. H and W need not be multiples of P and G.

    Raises:
        ValueError: ``dim`` not a multiple of ``num_heads``, ``window_size`` or ``grid_size`` below 1, ``dropout`` outside
            [0, 1); x, grid or mask of another shape.

    Cost: (8 + 4 mlp_ratio) n c^2 + 2 n (P^2 + G^2) c multiplications.

    Example:
        >>> layer = MaxAttention(dim=32, num_heads=4, window_size=4)
        >>> layer(torch.randn(2, 63, 32), grid=(7, 9)).shape
        torch.Size([2, 63, 32])

    Differs: sides that P or G does not divide are padded and the padding is masked; the paper needs multiples. A side that
    is shorter than a window has windows of its own length. Every token keeps its residuals, so a token that may look at
    nothing passes through the MLPs alone.

    Reference: Zhengzhong Tu, Hossein Talebi, Han Zhang, Feng Yang, Peyman Milanfar, Alan Bovik, Yinxiao Li, MaxViT:
    Multi-Axis Vision Transformer, ECCV 2022, arXiv:2204.01697
    """

    form = "softmax"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int = 7,
        grid_size: int | None = None,
        *,
        mlp_ratio: int | float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        grid_size = window_size if grid_size is None else grid_size
        self.block = BlockAttention(dim, num_heads, window_size, mlp_ratio, dropout)
        self.grid = GridAttention(dim, num_heads, grid_size, mlp_ratio, dropout)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        image, valid = to_map(x, grid, mask, self.dim)
        return self.grid(self.block(image, valid), valid).flatten(1, 2)
