"""A byte language model with layerwise shortcuts has a lower loss than without, and uses more than one depth.

Set-up: the modules of Python's standard library as bytes, every tenth file held out. Six blocks, no dropout, Adam at 3e-3 with
one cycle, fresh random crops; on a CPU 64 channels, crops of 64, 300 batches of 16, on a GPU 128 channels, crops of 256,
3,000 batches of 32. Compared, trained alike on the same crops: the decoder without shortcuts, the same with MLPs so
wide that it has at least the parameters of ours, and so wide that it has at least the FLOPs of ours. The loss is that of
held-out crops, in nats per byte.

Bar, means of three seeds: at least 0.01 below the decoder without shortcuts, at most 0.005 above the one of equal
parameters. In every seed: two depths or more have a tenth of the shortcut's weight each, averaged over heads, and the
entropy over depths, averaged over heads, differs between tokens with a standard deviation above 0.05. Reported without
a bar: the decoder of equal FLOPs. The probe of look-ups that need one and three steps is not run here.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.cost import flops, parameters
from regard.claims.claim import Budget, Row, mean_row
from regard.core.capture import capture
from regard.models.language._decoder import DecoderLM
from regard.models.language.layerwise_shortcuts import LayerwiseShortcutLM, by_depth, depth_entropy, depth_usage

SEEDS = 3
VOCABULARY, DEPTH, HEADS = 256, 6, 4
Build = Callable[[], DecoderLM]


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and to test on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 0) == held) for held in (False, True)]
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, test


def crops(data: Tensor, count: int, length: int, world: torch.Generator) -> Tensor:
    start = torch.randint(len(data) - length, (count, 1), generator=world)
    return data[start + torch.arange(length + 1)].long()


def loss(model: DecoderLM, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def widened(build: Callable[[int], DecoderLM], least: float, measure: Callable[[DecoderLM], float], start: int) -> int:
    """The smallest width of the MLPs, in steps of 8, that measures at least as much."""
    width = start
    while measure(build(width)) < least:
        width += 8
    return width


def fit(build: Build, data: Tensor, steps: int, count: int, length: int, seed: int, device: str) -> DecoderLM:
    torch.manual_seed(seed)
    model, world = build().to(device), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model, crops(data, count, length, world).to(device)).backward()
        optimiser.step()
        rate.step()
    return model.eval()


def run(budget: Budget, seeds: int) -> list[Row]:
    dim, length, steps, count, tested = {
        "smoke": (16, 16, 3, 2, 2),
        "cpu": (64, 64, 300, 16, 512),
        "gpu": (128, 256, 3000, 32, 512),
    }[budget]
    device = "cuda" if budget == "gpu" else "cpu"

    def plain(mlp_dim: int | None = None) -> DecoderLM:
        return DecoderLM(VOCABULARY, dim, HEADS, depth=DEPTH, context=length, mlp_dim=mlp_dim, dropout=0.0)

    def ours() -> LayerwiseShortcutLM:
        return LayerwiseShortcutLM(VOCABULARY, dim, HEADS, depth=DEPTH, context=length, dropout=0.0)

    def work(model: DecoderLM) -> float:
        return flops(model, torch.zeros(1, length, dtype=torch.long)).total

    wide = widened(plain, parameters(ours()), parameters, 4 * dim)
    busy = widened(plain, work(ours()), work, 4 * dim)
    builds: dict[str, Build] = {
        "shortcuts": ours,
        "plain": plain,
        "equal parameters": lambda: plain(wide),
        "equal FLOPs": lambda: plain(busy),
    }
    train, test = text()
    found: dict[str, list[float]] = {name: [] for name in builds}
    depths, spread = [], []
    for seed in range(seeds):
        unseen = crops(test, tested, length, torch.Generator().manual_seed(1000 + seed)).to(device)
        for name, build in builds.items():
            model = fit(build, train, steps, count, length, seed, device)
            with torch.no_grad():
                found[name].append(fmean(loss(model, part).item() for part in unseen.split(max(tested // 8, 1))))
                if name == "shortcuts":
                    with capture(model, "last.shortcut.attn") as seen:
                        model(unseen[:32, :-1])
                    weights = by_depth(seen["last.shortcut.attn"].weights(), DEPTH - 1)
                    depths.append(float((depth_usage(weights).mean(0) >= 0.1).sum()))
                    spread.append(depth_entropy(weights).mean(1).std().item())
    mean = {name: fmean(values) for name, values in found.items()}
    values = tuple(found["shortcuts"])
    size = f"{parameters(ours()):,} parameters, {work(ours()) / work(plain()):.2f} times the FLOPs of the plain decoder"
    return [
        mean_row("nats per byte", found["shortcuts"], mean["plain"] - 0.01, "<=", baseline=mean["plain"], note=size),
        Row(
            "nats per byte, beside equal parameters",
            mean["shortcuts"],
            mean["equal parameters"] + 0.005,
            "<=",
            mean["equal parameters"],
            values,
            f"MLPs of {wide}",
        ),
        Row("depths with a tenth of the weight, fewest", min(depths), 2, ">=", values=tuple(depths)),
        Row("deviation of the depth entropy over tokens, least", min(spread), 0.05, ">", values=tuple(spread)),
        Row(
            "nats per byte, beside equal FLOPs",
            mean["shortcuts"],
            baseline=mean["equal FLOPs"],
            values=values,
            note=f"MLPs of {busy}",
        ),
    ]
