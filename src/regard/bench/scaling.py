"""How time and memory of a layer grow with the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from regard.bench.cost import Timing, interleave, peak_memory
from regard.models.slot import Mixer


@dataclass(frozen=True)
class Power:
    r"""Least squares fit :math:`\log y = a + p \log n`: exponent :math:`p`, its standard error, and :math:`a`."""

    exponent: float
    error: float
    offset: float


def fit_power(n: Sequence[float], y: Sequence[float]) -> Power:
    """The exponent with which ``y`` grows in ``n``.

    Raises:
        ValueError: fewer than three points, or points that are not positive.
    """
    if len(n) != len(y) or len(n) < 3:
        raise ValueError(f"an exponent and its error need three points or more; got {len(n)} and {len(y)}")
    if min(*n, *y) <= 0:
        raise ValueError("every point must be positive")
    u, v = ([math.log(value) for value in values] for values in (n, y))
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / spread
    offset = mean_v - slope * mean_u
    residual = sum((b - offset - slope * a) ** 2 for a, b in zip(u, v))
    return Power(slope, math.sqrt(residual / (len(u) - 2) / spread), offset)


@dataclass
class Scaling:
    """A layer alone, one image, forward: tokens, milliseconds, bytes; exponents over the larger sizes; sizes left out and why."""

    tokens: list[int] = field(default_factory=list)
    time: list[Timing] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    time_fit: Power | None = None
    memory_fit: Power | None = None
    left_out: list[tuple[int, str]] = field(default_factory=list)


def scaling(
    mixers: Mapping[str, Mixer],
    dim: int,
    num_heads: int,
    sides: Sequence[int] = (7, 14, 20, 28, 40, 56),
    *,
    fit_from: int = 196,
    limit: float = 2.0,
    rounds: int = 3,
    budget: float = 0.0,
    device: str = "cpu",
    report: Callable[[int], None] | None = None,
) -> dict[str, Scaling]:
    """Time and memory of each mixer on square grids of growing size.

    Args:
        mixers: name -> what builds the layer for (dim, num_heads, grid).
        dim: channels.
        num_heads: heads.
        sides: of the grids, ascending; a grid of side 28 has 784 tokens.
        fit_from: tokens from which on the exponents are fitted; below, fixed costs hide the growth.
        limit: a layer that took longer than this many seconds is not tried on larger grids.
        rounds: see :func:`regard.bench.cost.interleave`.
        budget: see there; for each size.
        device: where to compute.
        report: called with the number of tokens when a size is done.
    """
    found = {name: Scaling() for name in mixers}
    for side in sides:
        tokens = side * side
        x = torch.randn(1, tokens, dim, device=device)
        calls: dict[str, Callable[[], object]] = {}
        for name, mixer in mixers.items():
            rows = found[name]
            if rows.time and rows.time[-1].median > 1e3 * limit:
                rows.left_out.append((tokens, f"took over {limit:g} s at {rows.tokens[-1]} tokens"))
                continue
            try:
                layer = mixer(dim, num_heads, (side, side)).to(device).eval()
                call = torch.no_grad()(partial(layer, x))
                memory = peak_memory(call, device)
            except Exception as error:  # whatever a layer cannot do at this size belongs in the report
                rows.left_out.append((tokens, f"{type(error).__name__}: {error}"))
                continue
            calls[name] = call
            rows.tokens.append(tokens)
            rows.memory.append(memory)
        for name, timing in interleave(calls, rounds=rounds, budget=budget, warmup=1, device=device).items():
            found[name].time.append(timing)
        if report is not None:
            report(tokens)
    for rows in found.values():
        tail = [i for i, n in enumerate(rows.tokens) if n >= fit_from]
        if len(tail) >= 3 and all(rows.memory[i] > 0 for i in tail):
            n = [rows.tokens[i] for i in tail]
            rows.time_fit = fit_power(n, [rows.time[i].median for i in tail])
            rows.memory_fit = fit_power(n, [rows.memory[i] for i in tail])
    return found
