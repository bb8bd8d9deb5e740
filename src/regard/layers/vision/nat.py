"""Neighborhood attention: every token looks at exactly the k x k tokens nearest to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.vision._grid import to_map
from regard.ops.attend import attend, check_heads, reference
from regard.ops.masks import dense, neighborhood
from regard.ops.windows import Size, per_axis

TILE = 8  # queries per axis that share one read of their keys


class _Axis(NamedTuple):
    """One axis cut into tiles of t queries, and the m consecutive keys that a tile's queries see between them.

    Positions are sorted by their class modulo the dilation first, so that the neighbours of a query follow each other.
    """

    place: Int[Tensor, "l"]
    queries: Int[Tensor, "tiles t"]
    keys: Int[Tensor, "tiles m"]
    allowed: Bool[Tensor, "tiles t m"]
    offset: Int[Tensor, "tiles t m"]


def _axis(length: int, kernel: int, dilation: int, device: torch.device) -> _Axis:
    order: list[int] = []
    start: list[int] = []
    for residue in range(dilation):
        base, members = len(order), range(residue, length, dilation)
        order += members
        start += [base + min(max(i - kernel // 2, 0), len(members) - kernel) for i in range(len(members))]
    width = min(length, max(TILE, kernel))
    tiles = [[min(i, length - 1) for i in range(at, at + width)] for at in range(0, length, width)]
    reach = max(start[tile[-1]] + kernel - start[tile[0]] for tile in tiles)
    first = [min(start[tile[0]], length - reach) for tile in tiles]
    queries, starts = torch.tensor(tiles, device=device), torch.tensor(start, device=device)
    keys = torch.tensor(first, device=device)[:, None] + torch.arange(reach, device=device)
    step = keys[:, None] - starts[queries][..., None]
    offset = (keys[:, None] - queries[..., None]).clamp(1 - kernel, kernel - 1) + kernel - 1
    positions = torch.tensor(order, device=device)
    return _Axis(positions.argsort(), positions[queries], positions[keys], (step >= 0) & (step < kernel), offset)


def _tiles(x: Tensor, rows: Int[Tensor, "i t"], columns: Int[Tensor, "j u"]) -> Tensor:
    """(b, h, H, W, d) -> (b, i j h, t u, d), the tokens of every pair of a row tile and a column tile."""
    x = x.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    x = x.unflatten(3, columns.shape).unflatten(2, rows.shape).permute(0, 2, 4, 1, 3, 5, 6)
    return x.flatten(4, 5).flatten(1, 3)


def _pairs(x: Tensor) -> Tensor:
    """(h, i, t, m, j, u, p) -> (i j h, t u, m p): what is known of rows and columns, as one matrix per tile and head."""
    return x.permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(0, 2)


def neighborhood_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    grid: tuple[int, int],
    kernel_size: Size,
    dilation: Size = 1,
    *,
    bias: Float[Tensor, "h y x"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n e"]:
    """Attention of every token of a grid over its own neighbourhood, in time and memory linear in n.

    Tiles of queries are attended together with the union of their neighbourhoods, under a mask. An even kernel looks one
    further back than forward; a kernel of (1, k) on a grid of (1, n) is neighbourhood attention of a sequence.

    Args:
        grid: (H, W) with H W = n, row-major.
        kernel_size: keys along each axis; the neighbourhood is shifted inward at the borders.
        dilation: steps between neighbouring keys along each axis.
        bias: one for every offset, key minus query in steps: (h, 2 k - 1, 2 k - 1).
        mask: True on the keys that may be looked at.
        dropout: of the weights; 0 outside training.

    Raises:
        ValueError: a grid of another size, a dilated kernel longer than its side, a bias of another shape.
    """
    check_heads(q, k, v)
    kernels, dilations = per_axis(kernel_size, 2, "kernel_size"), per_axis(dilation, 2, "dilation")
    if len(grid) != 2 or grid[0] * grid[1] != q.shape[2] or k.shape[2] != q.shape[2]:
        raise ValueError(f"grid={grid} must be (H, W) with H * W = n; got {q.shape[2]} queries and {k.shape[2]} keys")
    if any(size * step > side for side, size, step in zip(grid, kernels, dilations)):
        raise ValueError(f"kernel_size={kernel_size} times dilation={dilation} must be within grid={grid}")
    if bias is not None and bias.shape != (q.shape[1], *(2 * size - 1 for size in kernels)):
        raise ValueError(f"bias must be (h, 2 k - 1, 2 k - 1) for kernel_size={kernel_size}; got {tuple(bias.shape)}")
    y, x = (_axis(*axis, device=q.device) for axis in zip(grid, kernels, dilations))
    allowed = y.allowed[None, :, :, :, None, None, None] & x.allowed
    keep = _pairs(allowed.expand(q.shape[1], *allowed.shape[1:]))[None]
    if mask is not None:
        seen = _tiles(mask.unflatten(1, grid)[:, None, ..., None], y.keys, x.keys)[..., 0]
        keep = keep & seen.repeat_interleave(q.shape[1], 1)[:, :, None]
    if bias is not None:
        bias = bias.index_select(1, y.offset.flatten()).index_select(2, x.offset.flatten())
        bias = _pairs(bias.unflatten(2, x.offset.shape).unflatten(1, y.offset.shape))[None]
    q, k, v = (z.unflatten(2, grid) for z in (q, k, v))
    queries, keys, values = _tiles(q, y.queries, x.queries), _tiles(k, y.keys, x.keys), _tiles(v, y.keys, x.keys)
    out = attend(queries, keys, values, mask=keep, bias=bias, dropout=dropout)
    (i, t), (j, u) = y.queries.shape, x.queries.shape
    out = (
        out.view(q.shape[0], i, j, q.shape[1], t, u, out.shape[-1])
        .permute(0, 3, 1, 4, 2, 5, 6)
        .flatten(4, 5)
        .flatten(2, 3)
    )
    return out.index_select(2, y.place).index_select(3, x.place).flatten(2, 3)


def _naive(layer: NeighborhoodAttention, x: Tensor, *, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Dense attention under the mask of the neighbourhood, the bias looked up pair by pair."""
    kernels, dilations = layer.clamped(grid)
    n, (q, k, v) = x.shape[1], layer.project(x)
    allowed = dense(neighborhood(grid, kernels, dilations), 1, 1, n, n)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    at = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(n, 2)
    reach = layer.kernel_size - 1
    offset = ((at - at[:, None]) // torch.tensor(dilations)).clamp(-reach, reach) + reach
    bias = layer.rpb[:, offset[..., 0], offset[..., 1]]
    return layer.proj(reference(q, k, v, mask=allowed, bias=bias[None]).transpose(1, 2).flatten(2))


@method(
    "nat",
    kind="layer",
    tags=Tags(input="grid", mask=True),
    example={"dim": 32, "num_heads": 4, "kernel_size": 3},
    naive=_naive,
)
class NeighborhoodAttention(nn.Module):
    r"""Attention of every token over the k x k tokens nearest to it, with a bias for every offset.

    A window slides with its query and is shifted inward at the borders, so every query has exactly :math:`k^2` keys, cost
    is linear in tokens, and away from the borders a shifted image gives shifted outputs. A kernel as large as the map is
    plain attention. It replaces attention in fixed, shifted windows. With :math:`\rho(i)` the neighbourhood of i

    .. math:: y_i = O \sum_{j \in \rho(i)} \mathrm{softmax}_j\big(q_i \cdot k_j / \sqrt d + B_{j - i}\big)\, v_j,
        \qquad \rho(i) = \{a, \dots, a + k - 1\}, \; a = \mathrm{clamp}(i - k // 2,\; 0,\; L - k) \text{ on every axis}

    With a ``dilation`` D the rule holds inside each class of positions modulo D (the dilated form, DiNA).

    Args:
        dim: channels in and out.
        num_heads: heads.
        kernel_size: k, odd.
        dilation: D, steps between neighbouring keys.
        bias: of the projections to q, k and v; the output projection always has one.
        dropout: of the weights, in training.

    Shape: x (b, n, dim) with grid (H, W), n = H W -> (b, n, dim). ``mask`` (b, n) is boolean, True on tokens that may be
    looked at. H and W may be anything: on a side shorter than k D the kernel covers the side.

    Raises:
        ValueError: ``dim`` not a multiple of ``num_heads``, ``kernel_size`` even or below 3, ``dilation`` below 1,
            ``dropout`` outside [0, 1); x, grid or mask of another shape.

    Cost: 4 n c^2 + 2 n k^2 c multiplications; tiles of 8 x 8 queries compute 2 n (k + 7)^2 c in place of the second term.

    Example:
        >>> layer = NeighborhoodAttention(dim=32, num_heads=4, kernel_size=5)
        >>> layer(torch.randn(2, 63, 32), grid=(7, 9)).shape
        torch.Size([2, 63, 32])

    Differs: on a side shorter than k D the kernel, then the dilation, is reduced to fit and the bias table is sliced; the
    official code pads such maps with zeros and attends them. There is no dropout after the output projection. Parameters
    carry the official names and shapes.

    Reference: Ali Hassani, Steven Walton, Jiachen Li, Shen Li, Humphrey Shi, Neighborhood Attention Transformer, CVPR 2023,
    arXiv:2204.07143
    """

    form = "softmax"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and at least 3")
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        self.dim, self.num_heads, self.kernel_size, self.dilation = dim, num_heads, kernel_size, dilation
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def clamped(self, grid: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel and dilation along each axis of a grid: the layer's own where they fit."""
        dilations = tuple(min(self.dilation, side) for side in grid)
        return tuple(min(self.kernel_size, side // step) for side, step in zip(grid, dilations)), dilations

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, ...]:
        """Queries, keys and values, (b, h, n, d) each."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        image, _ = to_map(x, grid, mask, self.dim)
        sides = (image.shape[1], image.shape[2])
        kernels, dilations = self.clamped(sides)
        rows, columns = (slice(self.kernel_size - k, self.kernel_size + k - 1) for k in kernels)
        q, k, v = self.project(x)
        out = neighborhood_attention(
            q,
            k,
            v,
            sides,
            kernels,
            dilations,
            bias=self.rpb[:, rows, columns],
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.proj(out.transpose(1, 2).flatten(2))
