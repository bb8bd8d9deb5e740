"""What a model costs: parameters, operations, time and memory.

Counted and measured, never taken from a table. Times are wall-clock medians over rounds in which every subject runs once, so
that a machine that slows down slows all of them.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _sdpa(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Products of queries with keys, and of weights with values; heads of keys may be fewer than those of queries."""
    b, h, l, d = q
    return 2 * b * h * l * k[-2] * (d + v[-1])


# torch's counter has formulas for the fused attention of GPUs, not for the one of CPUs.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa}


class _Missed(TorchDispatchMode):
    """Counts the numbers written by operators that have no formula; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in _FORMULAS and not func.is_view:
            outputs = out if isinstance(out, tuple | list) else (out,)
            self.written[packet.__name__] += sum(o.numel() for o in outputs if isinstance(o, Tensor))
        return out


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass: matrix products, convolutions and fused attention, a multiply-add counting as two.

    ``missed`` are the operators that have no formula (softmax, norms, activations, gathers, ...) with the number of values
    each wrote: they cost time and are not in ``total``.
    """

    total: int
    missed: dict[str, int]


def flops(model: nn.Module, *inputs: Tensor) -> Flops:
    """Count the operations of ``model(*inputs)``."""
    with torch.no_grad():
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            model(*inputs)
        with _Missed() as missed:
            model(*inputs)
    return Flops(counter.get_total_flops(), dict(missed.written.most_common()))


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that ``call`` holds at its worst moment on top of what was held before.

    On a CPU this replays the allocations that torch's profiler saw: exact for tensors, temporaries inside operators
    included, blind to scratch memory that libraries take from the system themselves. On an accelerator it is the caching
    allocator's own peak.
    """
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        call()
        torch.accelerator.synchronize()
        return torch.accelerator.max_memory_allocated() - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, and the quartiles around it."""

    median: float
    low: float
    high: float


def _seconds(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    budget: float = 0.0,
    warmup: int = 2,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time every subject once a round, each round starting with another one.

    Args:
        subjects: name -> what to time.
        rounds: at least so many.
        budget: and more until this many seconds have passed.
        warmup: untimed calls of each before.
        device: where the subjects compute.

    Raises:
        ValueError: fewer than three rounds, which have no quartiles worth the name.
    """
    if rounds < 3:
        raise ValueError(f"rounds={rounds} must be 3 or more")
    for call in subjects.values():
        for _ in range(warmup):
            call()
    names = list(subjects)
    taken: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while names and (done < rounds or time.perf_counter() - start < budget):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(1e3 * _seconds(subjects[name], device))
            done += 1
    finally:
        if collecting:
            gc.enable()
    marks = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return {n: Timing(*torch.tensor(ms, dtype=torch.float64).quantile(marks).tolist()) for n, ms in taken.items()}


@dataclass(frozen=True)
class Cost:
    """One model on one batch: time in milliseconds, memory in bytes beyond the model itself."""

    parameters: int
    flops: Flops
    forward: Timing
    step: Timing
    forward_memory: int
    step_memory: int


def measure(
    models: Mapping[str, nn.Module], x: Tensor, y: Tensor, *, rounds: int = 7, budget: float = 0.0, device: str = "cpu"
) -> dict[str, Cost]:
    """Cost of each model for images ``x`` and labels ``y``: a forward pass in evaluation, and a step of AdamW.

    Args:
        models: name -> classifier on ``device``; a step is taken with each, so their parameters change.
        x: a batch, whose size is the unit of every figure but ``flops``, which is for one image.
        y: labels of the batch.
        rounds: see :func:`interleave`.
        budget: see :func:`interleave`; for forward and step each.
        device: where models and batch are.
    """

    def forward(model: nn.Module) -> Callable[[], object]:
        def call() -> Tensor:
            model.eval()
            with torch.no_grad():
                return model(x)

        return call

    def step(model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if parameters(model) else None

        def call() -> None:
            model.train()
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if optimizer is not None:
                optimizer.step()

        return call

    forwards = {name: forward(model) for name, model in models.items()}
    steps = {name: step(model) for name, model in models.items()}
    forward_times = interleave(forwards, rounds=rounds, budget=budget, device=device)
    step_times = interleave(steps, rounds=rounds, budget=budget, device=device)
    costs = {}
    for name, model in models.items():
        model.zero_grad()
        memory = peak_memory(forwards[name], device), peak_memory(steps[name], device)
        costs[name] = Cost(
            parameters(model), flops(model.eval(), x[:1]), forward_times[name], step_times[name], *memory
        )
    return costs
