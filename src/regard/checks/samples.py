"""Small instances, random inputs for them, and comparisons that say what differs and where."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method

Size = int | tuple[int, int]
LENGTHS = (1, 2, 17, 63)
GRIDS = ((1, 1), (1, 2), (3, 5), (7, 9))


@cache
def arguments_of(target: Callable[..., Any]) -> frozenset[str]:
    """Names of the keyword arguments that a class or factory takes, followed through ``**kwargs`` to its bases."""
    names: set[str] = set()
    steps: list[Any] = [target]
    if isinstance(target, type):
        steps = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
    for step in steps:
        found = inspect.signature(step).parameters
        names |= set(found)
        if all(p.kind is not p.VAR_KEYWORD for p in found.values()):
            break
    return frozenset(names - {"self", "args", "kwargs"})


def takes(layer: nn.Module, name: str) -> bool:
    """Whether ``forward`` has an argument called ``name``."""
    return name in inspect.signature(layer.forward).parameters


def arguments(method: Method, **wishes: Any) -> dict[str, Any]:
    """The method's example with those ``wishes`` that its target has an argument for."""
    known = arguments_of(method.target)
    return {**method.example, **{name: value for name, value in wishes.items() if name in known}}


def off(method: Method) -> dict[str, Any]:
    """The arguments with which an accelerator or a controller changes nothing."""
    default = {"keep": 1.0} if method.kind == "accelerator" else {"strength": 0.0}
    known = default.keys() <= arguments_of(method.target)
    assert method.tags.off or known, f"has no argument {next(iter(default))!r}: tags.off must say what turns it off"
    return method.tags.off or default


def stir(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter a little, keeping signs, so that nothing hides behind a zero at initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            if p.is_floating_point():
                noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).clamp(-3, 3)
                p.add_(noise.to(p.dtype) * torch.where(p == 0, 1.0, p.abs()))
    return layer


def build(method: Method, dtype: torch.dtype = torch.float64, *, seed: int = 0, **wishes: Any) -> Any:
    """A stirred instance in ``eval`` mode."""
    torch.manual_seed(seed)
    layer = method.create(**arguments(method, **wishes))
    return stir(layer.to(dtype), seed).eval()


def width(method: Method) -> int:
    """Channels of x: the example's ``dim``; a layer without such an argument must take any."""
    if "dim" in method.example:
        return method.example["dim"]
    if "dim" in arguments_of(method.target):
        raise ValueError(f"example={method.example!r} must have 'dim', the channels of x")
    return 8


def whole(method: Method, n: int) -> int:
    """``n`` rounded up to a legal length or side."""
    m = method.tags.multiple
    return -(-n // m) * m


def sizes(method: Method) -> list[Size]:
    """Token counts, or grids, of every awkward kind that the method allows."""
    if method.tags.input == "tokens":
        return sorted({whole(method, n) for n in LENGTHS})
    return sorted({(whole(method, h), whole(method, w)) for h, w in GRIDS})


def usual(method: Method) -> Size:
    """A size that is small, odd and not square where that is allowed."""
    return whole(method, 9) if method.tags.input == "tokens" else (whole(method, 3), whole(method, 5))


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample(
    method: Method,
    layer: nn.Module,
    size: Size | None = None,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> tuple[Tensor, dict[str, Any]]:
    """x and the keyword arguments that ``forward`` cannot do without."""
    size = usual(method) if size is None else size
    c = width(method)
    options: dict[str, Any] = {}
    if isinstance(size, int):
        shape: tuple[int, ...] = (batch, size, c)
    elif method.tags.input == "image":
        shape = (batch, c, *size)
    else:
        shape = (batch, size[0] * size[1], c)
        options["grid"] = size
    context = inspect.signature(layer.forward).parameters.get("context")
    if context is not None and context.default is context.empty:
        options["context"] = random((batch, whole(method, 11), method.example.get("context_dim", c)), dtype, seed + 1)
    return random(shape, dtype, seed), options


def run(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """``layer(x, ...)`` under a fixed seed."""
    torch.manual_seed(0)
    out = layer(x, **options)
    assert isinstance(out, Tensor), f"forward returned {type(out).__name__}, expected a Tensor"
    return out


def gradients(
    layer: nn.Module, x: Tensor, options: dict[str, Any], forward: Callable[..., Tensor] = run
) -> dict[str, Tensor]:
    """Output, and the gradients of a random weighting of it with respect to x and every parameter (zeros for None)."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out = forward(layer, x, **options)
    (out * random(tuple(out.shape), out.dtype, seed=7)).sum().backward()
    found = {"output": out.detach(), "gradient of x": _or_zeros(x)}
    found |= {f"gradient of {name}": _or_zeros(p) for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad(set_to_none=True)
    return found


def _or_zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach().clone()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, and the parameters of modules in them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


def descends(value: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Raise AssertionError unless some small step of ``leaves`` against the gradient lowers ``value``."""
    before = value()
    grads = torch.autograd.grad(before, leaves, allow_unused=True)
    moved = [(leaf, g) for leaf, g in zip(leaves, grads) if g is not None]
    assert moved, "no gradient reaches anything"
    norm = torch.stack([g.square().sum() for _, g in moved]).sum().sqrt().clamp_min(1e-12)
    tried, done = [], 0.0
    with torch.no_grad():
        for step in (1e-1, 1e-2, 1e-3):
            for leaf, g in moved:
                leaf -= (step - done) * g / norm
            done = step
            tried.append(value().item())
    assert min(tried) < before.item(), f"{before.item():.6g} before, {tried} after steps of 0.1, 0.01, 0.001"


def same(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Raise AssertionError unless equal up to ``tolerance`` times the largest expected number (at least 1)."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not got.numel():
        return
    gap = (got - expected).abs().nan_to_num(nan=float("inf"))
    limit = tolerance * max(1.0, expected.abs().max().item())
    worst = int(gap.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape))
    assert gap.max() <= limit, (
        f"{what}: at {at} got {got.flatten()[worst]:.6g}, expected {expected.flatten()[worst]:.6g}, "
        f"a gap of {gap.max():.1e} where {limit:.1e} is allowed"
    )


def all_same(got: dict[str, Tensor], expected: dict[str, Tensor], what: str, tolerance: float = 1e-9) -> None:
    """:func:`same` for outputs and gradients by name."""
    for name, value in expected.items():
        same(got[name], value, f"{what}, {name}", tolerance)


def finite(x: Tensor, what: str) -> None:
    bad = int((~x.isfinite()).sum())
    assert not bad, f"{what}: {bad} of {x.numel()} numbers are not finite"
