"""One image classifier with a slot for the token mixer, everything else held fixed."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog import registry
from regard.catalog.registry import Tags
from regard.nn.attention import Attention

Grid = tuple[int, int]
Mixer = Callable[[int, int, Grid], nn.Module]


def _to_image(x: Tensor, grid: Grid) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class Convolution(nn.Module):
    """A depthwise 3x3 convolution, ``gate`` where one is given, then a pointwise convolution, on tokens (b, n, dim) of a grid.

    With no gate it is the baseline that looks only at neighbours; with a channel or spatial gate it is that gate's place
    in the network, so that the two differ by the gate alone.
    """

    def __init__(self, dim: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.gate = nn.Identity() if gate is None else gate

    def forward(self, x: Float[Tensor, "b n c"], *, grid: Grid) -> Float[Tensor, "b n c"]:
        return _to_tokens(self.pointwise(self.gate(self.depthwise(_to_image(x, grid)))))


class Slot(nn.Module):
    """A layer at its place in the network: called as its record says, on the grid of that place.

    Raises:
        ValueError: when called, if the layer does not return one token of the same width for each of its own.
    """

    def __init__(self, layer: nn.Module, grid: Grid, needs_grid: bool) -> None:
        super().__init__()
        self.layer, self.grid, self.needs_grid = layer, grid, needs_grid

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        out = self.layer(x, grid=self.grid) if self.needs_grid else self.layer(x)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{type(self.layer).__name__} does not mix tokens: {tuple(x.shape)} became {got}")
        return out


def _attention(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    return Slot(Attention(dim, num_heads), grid, needs_grid=False)


def _convolution(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    return Slot(Convolution(dim), grid, needs_grid=True)


def _identity(dim: int, num_heads: int, grid: Grid) -> nn.Module:
    return nn.Identity()


BASELINES: dict[str, Mixer] = {"attention": _attention, "convolution": _convolution, "identity": _identity}


def find(name: str) -> registry.Method:
    """The record of the layer called ``name``: a registry name, or ``module:Class`` for anybody's own.

    A class without a record is taken to be called with tokens (b, n, c). After the colon may also stand the name under
    which the module registers a layer.

    Raises:
        ValueError: no such name (with the nearest), not a layer, or nothing called so in the module.
    """
    module, colon, own = name.rpartition(":")
    if colon:
        try:
            target = getattr(importlib.import_module(module), own, None)
        except ImportError as error:
            raise ValueError(f"layer {name!r} cannot be imported: {error}") from error
        if target is not None:
            return registry.Method(name, "layer", name, target, Tags(), {})
    try:
        method = registry.get(own)
    except ValueError:
        layers = {slug for slug, faces in registry.modules().items() if faces[0].startswith("regard.layers.")}
        known = sorted({*BASELINES, *layers})
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        raise ValueError(f"layer {name!r} is not known; nearest: {', '.join(near or known)}") from None
    if method.kind != "layer":
        raise ValueError(f"{name!r} is of kind {method.kind}; only layers fit the slot")
    return method


def mixer(name: str) -> Mixer:
    """What builds the layer called ``name`` for :class:`SlotNetwork`: a baseline or a layer of :func:`find`.

    Image gates are put into :class:`Convolution`, because by themselves they hardly mix space. ``dim`` and ``num_heads`` are
    passed to the layers that take them.
    """
    if name in BASELINES:
        return BASELINES[name]
    method = find(name)
    takes = inspect.signature(method.target).parameters

    def build(dim: int, num_heads: int, grid: Grid) -> nn.Module:
        multiple = method.tags.multiple
        if grid[0] % multiple or grid[1] % multiple:
            raise ValueError(f"{name} needs a grid whose sides are multiples of {multiple}; got {grid[0]}x{grid[1]}")
        sizes = {"dim": dim, "num_heads": num_heads}
        layer = method.create(**{key: value for key, value in sizes.items() if key in takes})
        if method.tags.input == "image":
            return Slot(Convolution(dim, layer), grid, needs_grid=True)
        return Slot(layer, grid, needs_grid=method.tags.input == "grid")

    return build


class _Block(nn.Module):
    """``x + mixer(norm(x))`` and ``x + mlp(norm(x))``; the mixer is set by the network, after everything else."""

    mixer: nn.Module

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SlotNetwork(nn.Module):
    r"""An image classifier in which only the token mixer is free: stem, positions, MLPs, norms and head are the same for all.

    .. math:: x \leftarrow x + \mathrm{mixer}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))

    One overlapping convolution makes the tokens, a learned position is added, then come ``depth[i]`` blocks at each
    resolution; between two resolutions a strided convolution halves the grid and doubles channels and heads. Tokens are
    averaged and classified by one linear map. The mixers are built last, so that under one seed everything outside the
    slot starts from the same numbers whichever mixer is chosen.

    Args:
        mixer: builds a mixer from (dim, num_heads, grid); see :func:`mixer` for those with a name.
        num_classes: size of the output.
        image: height and width in pixels, of any parity and ratio.
        channels: of the image.
        dim: channels at the first resolution.
        num_heads: heads at the first resolution.
        depth: blocks at each resolution, one number a resolution.
        patch: pixels between neighbouring tokens.

    Shape: (b, channels, H, W) -> (b, num_classes).

    Raises:
        ValueError: a size that is not positive, ``dim`` not a multiple of ``num_heads``, an image of another shape.
    """

    def __init__(
        self,
        mixer: Mixer,
        num_classes: int,
        image: Grid,
        channels: int = 1,
        *,
        dim: int = 32,
        num_heads: int = 2,
        depth: Sequence[int] = (2, 2),
        patch: int = 2,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("channels", channels), ("dim", dim), ("patch", patch)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not depth or min(depth) < 1:
            raise ValueError(f"depth={depth} must hold a positive number of blocks for each resolution")
        if min(image) < 1:
            raise ValueError(f"image={image} must be a positive height and width")
        self.image, self.channels = tuple(image), channels
        grid = (-(-image[0] // patch), -(-image[1] // patch))
        self.grids = [grid]
        self.stem = nn.Conv2d(channels, dim, 2 * patch - 1, stride=patch, padding=patch - 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], dim))
        self.stages = nn.ModuleList()
        self.reduce = nn.ModuleList()
        places: list[tuple[_Block, int, int, Grid]] = []
        for i, count in enumerate(depth):
            if i:
                self.reduce.append(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1))
                dim, num_heads, grid = 2 * dim, 2 * num_heads, (-(-grid[0] // 2), -(-grid[1] // 2))
                self.grids.append(grid)
            blocks = [_Block(dim) for _ in range(count)]
            places += [(block, dim, num_heads, grid) for block in blocks]
            self.stages.append(nn.Sequential(*blocks))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        for block, width, heads, where in places:
            block.mixer = mixer(width, heads, where)

    def forward(self, image: Float[Tensor, "b k i j"]) -> Float[Tensor, "b classes"]:
        if tuple(image.shape[1:]) != (self.channels, *self.image):
            raise ValueError(f"image must be (b, {self.channels}, *{self.image}); got {tuple(image.shape)}")
        x = _to_tokens(self.stem(image)) + self.position
        for i, stage in enumerate(self.stages):
            if i:
                x = _to_tokens(self.reduce[i - 1](_to_image(x, self.grids[i - 1])))
            x = stage(x)
        return self.head(self.norm(x).mean(1))
