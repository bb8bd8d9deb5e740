"""Speed against the peers a user would pick instead: interleaved in one run, as ratios, and only while every check is green."""

from __future__ import annotations

import copy
import csv
import importlib.util
import inspect
import io
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.cost import interleave, peak_memory
from regard.bench.peers import Grid, Peer, parameters_like, peers_of, tokens
from regard.catalog import registry
from regard.catalog.registry import Method
from regard.checks.run import check
from regard.train.files import write_whole

Shape = tuple[int, Grid, int, int]
IMAGES: tuple[Shape, ...] = ((4, (14, 14), 192, 6), (1, (28, 28), 192, 6), (1, (56, 56), 96, 3))
SEQUENCES: tuple[Shape, ...] = ((4, (1, 256), 256, 8), (1, (1, 1024), 256, 8))


@dataclass(frozen=True)
class Measured:
    """One subject beside one peer on one shape; ``ratio`` is the peer's time over the subject's, above 1 where it is faster."""

    subject: str
    peer: str
    mode: str
    shape: str
    milliseconds: float
    spread: float
    peer_milliseconds: float
    peer_spread: float
    ratio: float
    mebibytes: float
    peer_mebibytes: float
    peer_parameters: float
    device: str
    torch: str
    date: str


class Bench(list[Measured]):
    """Measurements of one run, with the peers that could not be measured and why."""

    def __init__(self, rows: Iterable[Measured] = (), missing: Sequence[str] = ()) -> None:
        super().__init__(rows)
        self.missing = list(missing)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table

        table = Table("shape", "mode", "subject", "ms", "peer", "peer's ms", "peer / subject", "MiB", "peer's MiB")
        for r in self:
            times = (f"{r.milliseconds:.2f} ± {r.spread:.2f}", f"{r.peer_milliseconds:.2f} ± {r.peer_spread:.2f}")
            memory = (f"{r.mebibytes:.1f}", f"{r.peer_mebibytes:.1f}")
            table.add_row(r.shape, r.mode, r.subject, times[0], r.peer, times[1], f"{r.ratio:.2f}x", *memory)
        yield table
        yield from (f"not measured: {m}" for m in self.missing)

    def save(self, folder: str | Path = "results/bench") -> Path:
        """Write the rows into FOLDER/DEVICE-TORCH.csv in place of earlier ones of the same subject, peer, shape and mode."""
        if not self:
            raise ValueError("nothing was measured, so there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self[0].device.replace(' ', '_')}-{self[0].torch}.csv"
        names = [f.name for f in fields(Measured)]
        kept: list[dict[str, Any]] = []
        if path.exists():
            new = {(row.subject, row.peer, row.shape, row.mode) for row in self}
            earlier = csv.DictReader(io.StringIO(path.read_text()))
            kept = [row for row in earlier if (row["subject"], row["peer"], row["shape"], row["mode"]) not in new]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *(_rounded(r) for r in self)], key=lambda row: row["subject"]))
        write_whole(path, text.getvalue())
        return path


def shape_of(text: str) -> Shape:
    """The shape that ``BATCH,TOKENS,DIM,HEADS`` says; tokens of an image are ROWSxCOLUMNS.

    Raises:
        ValueError: text of another form.
    """
    number = r"([1-9]\d*)"
    match = re.fullmatch(f"{number},(?:{number}x)?{number},{number},{number}", text)
    if match is None:
        raise ValueError(f"shape={text!r} is not BATCH,TOKENS,DIM,HEADS, such as 1,1024,768,12 or 4,14x14,192,6")
    batch, rows, columns, dim, heads = (int(group or 1) for group in match.groups())
    return batch, (rows, columns), dim, heads


def _rounded(row: Measured) -> dict[str, Any]:
    return {n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in asdict(row).items()}


def bench(
    subject: str,
    against: str | None = None,
    *,
    shapes: Sequence[Shape] | None = None,
    rounds: int = 9,
    budget: float = 1.0,
    device: str = "cpu",
    compiled: bool = False,
) -> Bench:
    """Time a layer beside its peers: forward, forward with backward, and one cached step where both have a cache.

    A layer that can be causal is measured as one on sequences, others on grids of tokens.

    Args:
        subject: registry name of a layer, or ``"capture"``: what reading costs on a twelve-layer ViT.
        against: part of the name of one peer; default all of them.
        shapes: (batch, grid, dim, num_heads); a grid of one row is a sequence.
        rounds: interleaved rounds at least, and more until ``budget`` seconds have passed.
        device: where to measure.
        compiled: the layer and its peers under ``torch.compile``, which fuses passes over memory; without a cached step.

    Raises:
        ValueError: no such layer or peer; ``shapes``, ``against`` or ``compiled`` of "capture"; ``compiled`` without a C++
            compiler; a layer with a failing check, for which no number is given.
    """
    if subject == "capture":
        if shapes is not None or against is not None or compiled:
            raise ValueError(
                "subject='capture' is measured on one model, as it is and without peers; "
                f"got shapes={shapes}, against={against!r}, compiled={compiled}"
            )
        from regard.bench.capture import reading

        return Bench(reading(rounds=rounds, budget=budget))
    record = registry.get(subject)
    if record.kind != "layer":
        raise ValueError(f"subject={subject!r} is a {record.kind}; bench() times layers, and 'capture'")
    chosen = [p for p in peers_of(record) if against is None or against.lower() in p.name.lower()]
    if not chosen:
        raise ValueError(
            f"against={against!r} is no peer of {subject}; there are {', '.join(p.name for p in peers_of(record))}"
        )
    if compiled:
        _needs_compiler()
    shapes = (SEQUENCES if record.tags.causal else IMAGES) if shapes is None else shapes
    report = check(record)
    if not report.ok:
        raise ValueError(f"no number for {subject} while checks fail: {', '.join(r.check for r in report.failures)}")
    found = Bench()
    for peer in chosen:
        if importlib.util.find_spec(peer.requires) is None:
            found.missing.append(f"{peer.name}: {peer.requires} is not installed")
            continue
        for shape in shapes:
            found.extend(_pair(record, peer, shape, rounds, budget, device, compiled))
    return found


def _needs_compiler() -> None:
    from torch._inductor import config

    command = next(filter(None, config.cpp.cxx))
    if shutil.which(command) is None:
        raise ValueError(f"compiled=True: torch.compile needs a C++ compiler, and there is no {command}")


def _pair(
    record: Method, peer: Peer, shape: Shape, rounds: int, budget: float, device: str, compiled: bool
) -> Iterator[Measured]:
    batch, grid, dim, heads = shape
    x = tokens(batch, grid, dim).to(device)
    torch.manual_seed(0)
    layers = {
        record.name: subject_layer(record, dim, heads, grid[0] * grid[1]),
        peer.name: peer.build(dim, heads, grid),
    }
    layers = {name: layer.to(device).eval() for name, layer in layers.items()}
    inputs = {record.name: arguments(record, x, grid), peer.name: ((x,), {})}
    parameters = parameters_like(layers[record.name], layers[peer.name])
    size = f"tokens={grid[1]}" if grid[0] == 1 else f"grid={grid[0]}x{grid[1]}"
    modes: dict[str, Callable[[str], Callable[[], object]]] = {
        "forward": lambda name: forward(layers[name], *inputs[name]),
        "forward+backward": lambda name: backward(layers[name], *inputs[name]),
    }
    if compiled:
        torch.compiler.reset()
        for layer in layers.values():
            layer.compile()
    elif record.tags.cache and all(hasattr(layer, "new_cache") for layer in layers.values()):
        modes["cached step"] = lambda name: cached_step(layers[name], x)
    for mode, make in modes.items():
        calls = {name: make(name) for name in layers}
        times = interleave(calls, rounds=rounds, budget=budget, device=device)
        memory = {name: peak_memory(call, device) / 2**20 for name, call in calls.items()}
        mine, theirs = times[record.name], times[peer.name]
        yield Measured(
            subject=record.name,
            peer=peer.name,
            mode=f"{mode}, compiled" if compiled else mode,
            shape=f"b={batch} {size} dim={dim} heads={heads}",
            milliseconds=mine.median,
            spread=(mine.high - mine.low) / 2,
            peer_milliseconds=theirs.median,
            peer_spread=(theirs.high - theirs.low) / 2,
            ratio=theirs.median / mine.median,
            mebibytes=memory[record.name],
            peer_mebibytes=memory[peer.name],
            peer_parameters=parameters,
            device=device_name(device),
            torch=torch.__version__.partition("+")[0],
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )


def device_name(device: str) -> str:
    """The accelerator's name, or the processor and how many threads torch uses."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}-{torch.get_num_threads()}threads"


def subject_layer(record: Method, dim: int, num_heads: int, tokens: int) -> nn.Module:
    """The layer at the width measured, causal if it can be; an image gate has channels at most, and no heads."""
    wishes: dict[str, Any] = {"dim": dim}
    if record.tags.input != "image":
        wishes |= {"num_heads": num_heads, "causal": True, "context_length": tokens + 1}
    takes = inspect.signature(record.target).parameters
    return record.create(**{key: wishes[key] for key in wishes if key in takes})


def arguments(record: Method, x: Tensor, grid: Grid) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    match record.tags.input:
        case "image":
            return (x.unflatten(1, grid).permute(0, 3, 1, 2).contiguous(),), {}
        case "grid":
            return (x,), {"grid": grid}
        case _:
            return (x,), {}


def forward(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(*args, **kwargs)

    return call


def backward(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    x = args[0].detach().clone().requires_grad_()

    def call() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x, **kwargs).sum().backward()

    return call


def cached_step(layer: Any, x: Tensor) -> Callable[[], object]:
    """One more token after all of ``x``; the cache is as full before every call."""
    with torch.no_grad():
        held = layer.new_cache(x.shape[0], x.shape[1] + 1, dtype=x.dtype, device=x.device)
        layer(x, cache=held)

    def call() -> object:
        with torch.no_grad():
            return layer(x[:, -1:], cache=copy.copy(held))

    return call
