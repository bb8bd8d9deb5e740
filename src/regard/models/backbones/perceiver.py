"""Perceiver: a small latent array that queries a large input again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn.attention import Attention
from regard.nn.blocks import MLP
from regard.ops.positions import fourier_features, grid_coordinates


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a shortcut; to ``context`` if it has a width, else to itself.

    Args:
        dim: channels of the latents.
        num_heads: heads of the attention.
        head_dim: channels of a head.
        context_dim: channels of the context; None for self-attention.
        mlp_ratio: hidden units of the MLP, as a multiple of ``dim``.

    Shape: (b, n, dim), context (b, s, context_dim) -> (b, n, dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        mlp_ratio: int = 1,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.Identity() if context_dim is None else nn.LayerNorm(context_dim)
        self.attn = Attention(dim, num_heads, head_dim=head_dim, context_dim=context_dim)
        self.mlp = MLP(dim, mlp_ratio * dim)

    def forward(
        self,
        z: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        seen = None if context is None else self.norm_context(context)
        z = z + self.attn(self.norm1(z), seen, mask=mask)
        return z + self.mlp(self.norm2(z))


class ModalityConcat(nn.Module):
    """Inputs of several kinds as one array: each is padded to a common width with a learned vector of its own.

    Args:
        widths: channels of each input, position features included.
        extra: channels by which the common width exceeds the largest, so that each kind has at least that many of its own.

    Shape: (b, n_i, widths[i]) for every i -> (b, sum of n_i, max(widths) + extra).
    """

    def __init__(self, widths: Sequence[int], extra: int = 1) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or extra < 1:
            raise ValueError(f"widths={widths} and extra={extra} must be positive")
        self.widths, self.dim = tuple(widths), max(widths) + extra
        self.vectors = nn.ParameterList(0.02 * torch.randn(self.dim - width) for width in widths)

    def forward(self, *inputs: Float[Tensor, "b _ _"]) -> Float[Tensor, "b n c"]:
        got = tuple(x.shape[-1] for x in inputs)
        if got != self.widths:
            raise ValueError(f"inputs must have widths {self.widths}; got {got}")
        return torch.cat([torch.cat([x, v.expand(*x.shape[:2], -1)], -1) for x, v in zip(inputs, self.vectors)], 1)


@method(
    "perceiver",
    kind="model",
    tags=Tags(mask=True),
    example={
        "input_dim": 3,
        "num_classes": 5,
        "dim": 16,
        "num_heads": 2,
        "num_latents": 4,
        "bands": 2,
        "max_freq": 8.0,
    },
)
class Perceiver(nn.Module):
    r"""Classify any array of vectors: learned latents read it by cross-attention, and think in between.

    The input is flat; where its entries stand is told by Fourier features beside their channels. Its size enters the
    cost once per reading and linearly, the depth of the network does not depend on it, and the answer does not depend on
    the order of the entries.

    .. math::
        \big[z \leftarrow z + \mathrm{Attn}(\mathrm{LN}z, \mathrm{LN}x), \; z \leftarrow z + \mathrm{MLP}(\mathrm{LN}z),
        \; z \leftarrow \mathrm{Transformer}(z)\big]_{\times\,repeats}, \qquad
        y = W\,\mathrm{mean}(\mathrm{LN}z)

    Args:
        input_dim: channels of one entry, without its position.
        num_classes: size of the output.
        dim: channels of a latent.
        num_heads: heads of the self-attention.
        num_latents: latents.
        cross_heads: heads of the cross-attention.
        cross_head_dim: channels of such a head; default the channels of the input over ``cross_heads``.
        repeats: readings of the input, each followed by a latent transformer.
        depth: blocks of a latent transformer.
        mlp_ratio: hidden units of the MLPs, as a multiple of ``dim``.
        shared: one latent transformer for all repeats and one reading for all but the first; otherwise all are separate.
        axes: coordinates of a position; 0 if entries have no position, or bring it along.
        bands: frequencies per axis, evenly spaced from 1 to ``max_freq / 2``.
        max_freq: the resolution to tell apart, in entries per axis, such as 224.

    Shape: x (b, n, input_dim) -> (b, num_classes); :meth:`encode` gives the latents (b, num_latents, dim). ``grid`` says that the
        entries fill a grid row by row; or else ``positions`` (n, axes) or (b, n, axes) holds coordinates from -1 to 1.
        ``mask`` (b, n) is True where an entry may be read.

    Raises:
        ValueError: sizes that are not positive or do not divide, x, grid or positions that do not fit.

    Cost: with N latents and input width c, about 4 b n c (c + N) FLOPs a reading and, per block of a latent transformer,
        2 b N dim (4 dim + 2 mlp_ratio dim + 2 N).

    Example:
        >>> import torch
        >>> model = Perceiver(3, 10, dim=32, num_heads=4, num_latents=8, repeats=2, depth=1, bands=6, max_freq=16)
        >>> model(torch.randn(2, 16 * 12, 3), grid=(16, 12)).shape
        torch.Size([2, 10])

    Linear layers begin without bias, their weights normal with deviation 1 / sqrt(inputs), cut off at twice that.

    Differs: a row of the batch whose entries are all masked reads nothing, instead of an error. Sharing the first reading
        too is left out: the paper found it worse.

    Reference: Andrew Jaegle, Felix Gimeno, Andrew Brock, Andrew Zisserman, Oriol Vinyals, João Carreira, Perceiver:
        General Perception with Iterative Attention, ICML 2021, arXiv:2103.03206
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        dim: int = 1024,
        num_heads: int = 8,
        *,
        num_latents: int = 512,
        cross_heads: int = 1,
        cross_head_dim: int | None = None,
        repeats: int = 8,
        depth: int = 6,
        mlp_ratio: int = 1,
        shared: bool = True,
        axes: int = 2,
        bands: int = 64,
        max_freq: float | int = 224,
    ) -> None:
        super().__init__()
        sizes = {"input_dim": input_dim, "num_classes": num_classes, "num_latents": num_latents, "repeats": repeats}
        for name, value in (sizes | {"cross_heads": cross_heads, "mlp_ratio": mlp_ratio, "bands": bands}).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if axes < 0 or depth < 0:
            raise ValueError(f"axes={axes} and depth={depth} must not be negative")
        width = input_dim + axes * (2 * bands + 1)
        if cross_head_dim is None and width % cross_heads:
            raise ValueError(
                f"cross_heads={cross_heads} must divide the {width} input channels, or give cross_head_dim"
            )
        self.input_dim, self.axes, self.bands, self.max_freq, self.repeats = input_dim, axes, bands, max_freq, repeats
        head_dim = width // cross_heads if cross_head_dim is None else cross_head_dim
        self.latents = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_latents, dim), std=0.02))
        self.read = nn.ModuleList(
            Block(dim, cross_heads, head_dim, context_dim=width, mlp_ratio=mlp_ratio)
            for _ in range(min(2, repeats) if shared else repeats)
        )
        self.think = nn.ModuleList(
            nn.Sequential(*(Block(dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)))
            for _ in range(1 if shared else repeats)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def steps(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The reading and the latent transformer of every repeat; shared ones come again."""
        for i in range(self.repeats):
            yield self.read[min(i, len(self.read) - 1)], self.think[min(i, len(self.think) - 1)]

    def locate(
        self, x: Float[Tensor, "b n c"], grid: tuple[int, ...] | None = None, positions: Tensor | None = None
    ) -> Float[Tensor, "b n e"]:
        """The entries with the Fourier features of where they stand beside their channels."""
        if x.ndim != 3 or x.shape[2] != self.input_dim or x.shape[1] == 0:
            raise ValueError(f"x must be (b, n, {self.input_dim}) with n at least 1; got {tuple(x.shape)}")
        if not self.axes:
            if grid is not None or positions is not None:
                raise ValueError("grid and positions are for a Perceiver with axes; this one has axes=0")
            return x
        if (grid is None) == (positions is None):
            raise ValueError("give where the entries stand: either grid or positions")
        if grid is not None:
            positions = grid_coordinates(grid, x.device)
        assert positions is not None
        where = positions.expand(len(x), *positions.shape[-2:])
        if positions.ndim not in (2, 3) or where.shape != (*x.shape[:2], self.axes):
            got = tuple(positions.shape) if grid is None else grid
            raise ValueError(f"grid or positions must give {x.shape[1]} entries {self.axes} coordinates; got {got}")
        return torch.cat([x, fourier_features(where, self.bands, self.max_freq).to(x.dtype)], -1)

    def encode(
        self,
        x: Float[Tensor, "b n c"],
        *,
        grid: tuple[int, ...] | None = None,
        positions: Float[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b k e"]:
        """The latents after the last repeat."""
        x = self.locate(x, grid, positions)
        z = self.latents.expand(len(x), -1, -1)
        for read, think in self.steps():
            z = think(read(z, x, mask=mask))
        return z

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        grid: tuple[int, ...] | None = None,
        positions: Float[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b classes"]:
        return self.head(self.norm(self.encode(x, grid=grid, positions=positions, mask=mask)).mean(1))
