"""Bi-level routing attention: regions choose regions, tokens attend to the tokens of what was chosen."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.layers.vision._grid import pad_map, to_map
from regard.ops.attend import attend, reference
from regard.ops.select import to_dense, topk_blocks
from regard.ops.windows import crop, partition, unpartition


def _means(x: Float[Tensor, "b r p c"], valid: Bool[Tensor, "b r p"] | None) -> Float[Tensor, "b r c"]:
    """The mean of every region's real tokens, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid is None:
        return x.mean(2)
    return (x * valid[..., None]).sum(2) / valid.sum(2, keepdim=True).clamp(min=1)


def _gather(x: Shaped[Tensor, "b r p c"], index: Int[Tensor, "b q k"]) -> Shaped[Tensor, "b q s c"]:
    """The tokens of the k regions of every row, one region after the other."""
    b, r, p, c = x.shape
    flat = index + r * torch.arange(b, device=x.device)[:, None, None]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape[:2], index.shape[2] * p, c)


def _naive(layer: BiLevelRoutingAttention, x: Tensor, *, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Dense attention under the mask "the key's region was chosen by the query's region", token by token."""
    s, (height, width) = layer.regions, grid
    token = torch.arange(x.shape[1])
    region = token // width // -(-height // s) * s + token % width // -(-width // s)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    member = (region == torch.arange(s * s)[:, None]) & real[:, None]
    q, k, v = layer.qkv(x).split([layer.qk_dim, layer.qk_dim, layer.dim], -1)
    means = member.to(x) / member.sum(-1, keepdim=True).clamp(min=1)
    affinity = (means @ q.detach()) @ (means @ k.detach()).transpose(1, 2)
    index, used = topk_blocks(affinity, layer.topk, eligible=member.any(-1)[:, None])
    allowed = to_dense(index, used, s * s)[:, region][..., region] & real[:, None]
    heads = [y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for y in (q, k, v)]
    out = reference(*heads, mask=allowed[:, None], scale=layer.qk_dim**-0.5).transpose(1, 2).flatten(2)
    image = v.masked_fill(~real[..., None], 0.0).transpose(1, 2).unflatten(2, grid)
    return layer.wo(out + layer.lepe(image).flatten(2).transpose(1, 2))


@method(
    "biformer",
    kind="layer",
    tags=Tags(input="grid", mask=True),
    example={"dim": 32, "num_heads": 4, "regions": 3, "topk": 2},
    naive=_naive,
)
class BiLevelRoutingAttention(nn.Module):
    r"""Attention of every token over the tokens of the few regions that its own region finds most related.

    The map is cut into S x S regions. The mean query of a region is compared with the mean key of every region, and the
    ``topk`` best are kept; then tokens attend to all tokens of the kept regions at full resolution. A depthwise
    convolution of the values is added. Content decides what is seen, and all that runs is a gather and dense products.
    With :math:`\bar q, \bar k` the means of the regions, r(i) the region of token i, and C the width of q and k

    .. math:: I_r = \mathrm{topk}\big(\bar q_r \bar k^\top\big), \qquad
        o_i = \sum_{j:\, r(j) \in I_{r(i)}} \mathrm{softmax}_j\big(q_i \cdot k_j / \sqrt{C}\big)\, v_j, \qquad
        y = O\big(o + \mathrm{DWConv}(v)\big)

    Choosing has no gradient: queries and keys learn through the attention alone.

    Args:
        dim: channels in and out.
        num_heads: heads.
        regions: S, regions along each side (``n_win`` in the paper's code). A number, so that regions grow with the map.
        topk: regions that each region attends to; not necessarily its own.
        qk_dim: C, channels of queries and keys together; default ``dim``.
        kernel_size: of the convolution of the values, odd.

    Shape: x (b, n, dim) with grid (H, W), n = H W -> (b, n, dim). ``mask`` (b, n) is boolean, True on tokens that may be
    looked at. H and W need not be multiples of ``regions``.

    Raises:
        ValueError: ``dim`` or ``qk_dim`` not a multiple of ``num_heads``, ``regions`` below 1, ``topk`` below 1 or above
            ``regions ** 2``, an even ``kernel_size``; x, grid or mask of another shape.

    Cost: 4 n c^2 + S^4 c + 2 n^2 c topk / S^2 multiplications; with S growing as n^(1/3) that is O(n^(4/3)).

    Example:
        >>> layer = BiLevelRoutingAttention(dim=32, num_heads=4, regions=3, topk=2)
        >>> layer(torch.randn(2, 81, 32), grid=(9, 9)).shape
        torch.Size([2, 81, 32])

    Differs: regions of ceil(H / S) x ceil(W / S) tokens are padded at the end of the map where they overhang it; what was
    added is no key and counts in no mean (the official code attends padding, its bias included). Small maps have fewer
    than S x S regions instead of being refused. Ties go to the region of lowest number. The scale is C^-0.5 over
    all heads, as in the official code, not the head's width. Pooled keys and parametric or soft routing, which no
    published model uses, are left out.

    Reference: Lei Zhu, Xinjiang Wang, Zhanghan Ke, Wayne Zhang, Rynson Lau, BiFormer: Vision Transformer with Bi-Level
    Routing Attention, CVPR 2023, arXiv:2303.08810
    """

    form = "softmax"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        regions: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        qk_dim = dim if qk_dim is None else qk_dim
        if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
            raise ValueError(f"dim={dim} and qk_dim={qk_dim} must be multiples of num_heads={num_heads}")
        if regions < 1:
            raise ValueError(f"regions={regions} must be at least 1")
        if not 1 <= topk <= regions**2:
            raise ValueError(f"topk={topk} must be between 1 and the number of regions, {regions**2}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd")
        self.dim, self.num_heads, self.regions, self.topk, self.qk_dim = dim, num_heads, regions, topk, qk_dim
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)
        self.lepe = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.wo = nn.Linear(dim, dim)

    def route(
        self, q: Float[Tensor, "b r p c"], k: Float[Tensor, "b r p c"], valid: Bool[Tensor, "b r p"] | None = None
    ) -> tuple[Int[Tensor, "b r k"], Bool[Tensor, "b r k"]]:
        """The regions that each region attends to, best first, and which of the slots are in use."""
        affinity = _means(q.detach(), valid) @ _means(k.detach(), valid).transpose(1, 2)
        k_best = min(self.topk, affinity.shape[-1])
        return topk_blocks(affinity, k_best, eligible=None if valid is None else valid.any(-1)[:, None])

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        image, valid = to_map(x, grid, mask, self.dim)
        size = [-(-side // self.regions) for side in image.shape[1:3]]
        padded, valid = pad_map(image, valid, size)
        sides = padded.shape[1:3]

        def cut(z: Tensor) -> Tensor:  # (b, H, W, c) -> (b, regions, tokens of a region, c)
            return partition(z, size).view(len(x), -1, size[0] * size[1], z.shape[-1])

        q, k, v = self.qkv(padded).split([self.qk_dim, self.qk_dim, self.dim], -1)
        if valid is not None:
            v = v.masked_fill(~valid[..., None], 0.0)
        real = None if valid is None else cut(valid[..., None])[..., 0]
        index, used = self.route(cut(q), cut(k), real)
        seen = None
        if real is not None:
            seen = _gather(real[..., None], index)[..., 0] & used.repeat_interleave(real.shape[-1], -1)
            seen = seen.flatten(0, 1)[:, None, None]
        tokens = (cut(q), _gather(cut(k), index), _gather(cut(v), index))
        heads = [z.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in tokens]
        out = attend(*heads, mask=seen, scale=self.qk_dim**-0.5).transpose(1, 2).flatten(2)
        local = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return crop(self.wo(unpartition(out, size, sides) + local), image.shape[1:3]).flatten(1, 2)
