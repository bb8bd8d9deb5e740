"""What a layer does, measured: how its weights are normalised, what reaches what, what it costs, what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.cost import flops
from regard.bench.scaling import fit_power
from regard.checks.samples import random, run
from regard.checks.weights import NotMeasured, Weights, weights_of
from regard.nn.attention import Attention

Inputs = Callable[[int], tuple[Tensor, dict[str, Any]]]
LENGTHS = (32, 64, 128, 256)


def _first(x: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    return x[:1], {name: v[:1] if isinstance(v, Tensor) else v for name, v in options.items()}


def _tokens(x: Tensor) -> Tensor:
    """(b, n, c), an image's places one after the other."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def reach_of(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> Tensor:
    """(outputs, inputs), True where an output token has a gradient from an input token in any row of the batch."""
    x = x.detach().clone().requires_grad_()
    out = _tokens(run(layer, x, **options))
    pull = random(tuple(out.shape), out.dtype, seed=6)

    def reached() -> Iterator[Tensor]:
        for t in range(out.shape[1]):
            (grad,) = torch.autograd.grad((out[:, t] * pull[:, t]).sum(), x, retain_graph=True)
            yield _tokens(grad).ne(0).any(-1).any(0)

    return torch.stack(list(reached()))


def is_causal(reach: Tensor) -> bool:
    """Whether no output is reached by a later input; False where there is not one output to an input."""
    return reach.shape[0] == reach.shape[1] and not bool(reach.triu(1).any())


def flops_of(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> int:
    """Counted operations of one call, as :func:`regard.bench.cost.flops` counts them."""
    return flops(partial(run, layer, **options), x).total  # type: ignore[arg-type]


@torch.no_grad()
def state_of(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> int:
    """Bytes that a sequence, x of one row, leaves in the layer's cache.

    Raises:
        NotMeasured: the layer has no cache, or takes none in this form.
    """
    new_cache: Any = getattr(layer, "new_cache", None)
    if new_cache is None:
        raise NotMeasured("it has no cache")
    cache = new_cache(1, x.shape[1], dtype=x.dtype, device=x.device)
    try:
        run(layer, x, cache=cache, **options)
    except ValueError as error:
        raise NotMeasured(str(error)) from None
    return cache.nbytes


def _equivariance(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> float:
    order = torch.randperm(_tokens(x).shape[1], generator=torch.Generator().manual_seed(3))
    moved = x.flatten(2)[..., order].view_as(x) if x.ndim == 4 else x[:, order]
    out, got = (_tokens(run(layer, y, **options)) for y in (x, moved))
    return _gap(got, out[:, order] if out.shape[1] == len(order) else out)


def _rows(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> float:
    changed = torch.cat([3 * random(tuple(x[:1].shape), x.dtype, seed=8), x[1:]])
    return _gap(run(layer, changed, **options)[1:], run(layer, x, **options)[1:])


def _deterministic(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> bool:
    first = run(layer, x, **options)
    torch.manual_seed(1)
    return torch.equal(layer(x, **options), first)


def _linearity(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> float:
    if not isinstance(layer, Attention):
        raise NotMeasured("it has no stage that takes values apart from queries and keys")
    q, k, v = layer.project(x, options.get("context", x))
    other = random(tuple(v.shape), v.dtype, seed=9)
    apart = layer.attend(q, k, v, None) + layer.attend(q, k, other, None)
    return _gap(layer.attend(q, k, v + other, None), apart)


def _gap(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


@dataclass(frozen=True)
class ProbeReport:
    """What was measured of one layer; None, and a reason in ``missing``, where that was not possible.

    Attributes:
        tokens: how many, for all but ``flops``, ``exponent`` and ``state``.
        lengths: how many, for these three.
        weights: see :class:`Weights`.
        reach: share of (output, input) pairs with a gradient in any row of the batch.
        causal: whether no output has a gradient from a later input.
        equivariance: error, relative to the largest output, of permuting outputs instead of inputs.
        batch: error of a row, relative, when another row of the batch changes.
        deterministic: whether another seed gives the same to the bit.
        linearity: error, relative, of output(V1) + output(V2) for output(V1 + V2).
        flops: counted operations of one row at each length.
        exponent: slope of their logarithm over that of the length, by least squares.
        state: bytes in the cache, one row, after each length.
    """

    tokens: int
    lengths: tuple[int, ...]
    weights: Weights | None
    reach: float
    causal: bool
    equivariance: float
    batch: float
    deterministic: bool
    linearity: float | None
    flops: tuple[int, ...]
    exponent: float | None
    state: tuple[int, ...] | None
    missing: dict[str, str] = field(default_factory=dict)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table

        table = Table("measured", "")
        for name, value in vars(self).items():
            if name != "missing":
                table.add_row(name, f"not measured: {self.missing[name]}" if value is None else str(value))
        yield table


def probe(
    layer: nn.Module, lengths: Sequence[int] = LENGTHS, *, tokens: int = 32, inputs: Inputs | None = None
) -> ProbeReport:
    """Measure a copy of ``layer`` in ``eval`` mode.

    Args:
        layer: any module from (b, n, c) tokens, or what ``inputs`` gives, to tokens.
        lengths: three numbers of tokens or more, ascending, for what depends on them.
        tokens: how many, for all else.
        inputs: ``inputs(n)`` gives x with n tokens, a batch of two rows or more, and the keyword arguments that ``forward``
            needs besides; default normal numbers (2, n, ``layer.dim``).

    Raises:
        ValueError: too few lengths, or lengths that do not ascend; a layer without ``dim`` and without ``inputs``.

    Example:
        >>> report = probe(Attention(dim=16, num_heads=2))
        >>> report.weights.normalised_over, report.reach, report.causal
        (('keys',), 1.0, False)
        >>> report.exponent > 1.7
        True
    """
    if len(lengths) < 3 or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"lengths={tuple(lengths)} must be three positive numbers or more, ascending")
    layer = copy.deepcopy(layer).eval()
    if inputs is None:
        dim, like = getattr(layer, "dim", None), next(layer.parameters(), torch.zeros(()))
        if not isinstance(dim, int):
            raise ValueError(f"{type(layer).__name__} has no dim: give inputs")

        def inputs(n: int) -> tuple[Tensor, dict[str, Any]]:
            return random((2, n, dim), like.dtype, seed=1).to(like.device), {}

    missing: dict[str, str] = {}

    def tried(name: str, measure: Callable[[], Any]) -> Any:
        try:
            return measure()
        except NotMeasured as reason:
            missing[name] = str(reason)
            return None

    x, options = inputs(tokens)
    reach = reach_of(layer, x, options)
    with torch.no_grad():
        counts = tuple(flops_of(layer, *_first(*inputs(n))) for n in lengths)
        if min(counts) == 0:
            missing["exponent"] = "no matrix product and no convolution was counted"
        return ProbeReport(
            tokens,
            tuple(lengths),
            tried("weights", partial(weights_of, layer, x, options)),
            reach.double().mean().item(),
            is_causal(reach),
            _equivariance(layer, x, options),
            _rows(layer, x, options),
            _deterministic(layer, x, options),
            tried("linearity", partial(_linearity, layer, x, options)),
            counts,
            fit_power(lengths, counts).exponent if min(counts) else None,
            tried("state", lambda: tuple(state_of(layer, *_first(*inputs(n))) for n in lengths)),
            missing,
        )
