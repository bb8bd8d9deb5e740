"""One head of full rank finds the nearest point; many heads of low rank do not, and a second layer helps where points are few.

Set-up. Exact: hard heads of rank 1 with query and key alike, weighted best, two points, 4, 8 and 16 dimensions, 20 draws.
Trained: softmax heads with full output matrices, the nearest of 8 points to a query in 16 dimensions, 1,500 steps of Adam
at 0.01 with one cycle, batches of 256, tested on 20,000 sets. All low-rank models have at least the queries and keys of
the full-rank head, two have four times as many, and each further head brings an output matrix of its own. Depth, built:
votes of 256 heads of rank 1 in two layers against as many heads in one, weighted best, 4 points in 8 dimensions.
Depth, trained: every point's farthest among 4 and among 64 in 8 dimensions, pre-norm layers with an MLP of 64; one layer of 8
heads of rank 2 against two of 4, and the same with one head of rank 8; 1,500 steps, 1,024 points a batch.

Bar: full rank has an error of at most 1e-6; that of 16 d heads of rank 1 is above 0.25, rises with d, and is less than 0.02
below that of 4 d. Trained, with three seeds: full rank at most 0.25, and at most half of the error of every other
model. Depth: two layers have a lower error than one with four points, built and trained; the gap between low and full
rank becomes smaller with four points, and does not with 64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn

from regard.claims.claim import Budget, Row, mean_row
from regard.nn.attention import Attention
from regard.nn.blocks import MLP
from regard.studies import attention_rank as study
from regard.studies.attention_rank import HardHeads, RankHeads, nearest, uniform

SEEDS = 3
MODELS = ((16, 1), (8, 2), (4, 4), (1, 16), (4, 16), (1, 64))
Task = Callable[[torch.Generator], tuple[tuple[Tensor, ...], Tensor]]


def neighbours(batch: int, points: int, dim: int) -> Task:
    """Points and one query, and the point nearest to it."""

    def draw(world: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        x, y = (uniform(batch, n, dim, generator=world).float() for n in (points, 1))
        return (x, y), nearest(x, y)

    return draw


def opposites(batch: int, points: int, dim: int) -> Task:
    """Points, and the farthest from each of them."""

    def draw(world: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        x = uniform(batch, points, dim, generator=world).float()
        return (x,), study.farthest(x)

    return draw


class Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int, rank: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, num_heads, head_dim=rank), MLP(dim, 64)
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def encoder(dim: int, depth: int, num_heads: int, rank: int) -> nn.Module:
    layers = [Layer(dim, num_heads, rank) for _ in range(depth)]
    return nn.Sequential(*layers, nn.RMSNorm(dim), nn.Linear(dim, dim))


def trained(build: Callable[[], nn.Module], task: Task, test: Task, seed: int, steps: int) -> float:
    """The error on unseen points, after training on fresh ones."""
    torch.manual_seed(seed)
    model, world = build(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=steps)
    for _ in range(steps):
        given, label = task(world)
        optimiser.zero_grad()
        (model(*given) - label).square().sum(-1).mean().backward()
        optimiser.step()
        rate.step()
    with torch.no_grad():
        given, label = test(world)
        return study.error(model(*given), label)


def exact(seeds: int) -> list[Row]:
    """Heads of rank 1 with two points: no training, and no sampling but that of the heads."""
    full, errors = [], {}
    for dim in (4, 8, 16):
        world = torch.Generator().manual_seed(dim)
        (x, y), label = neighbours(2000, 2, dim)(world)
        eye = torch.eye(dim)[None]
        full.append(study.error(HardHeads.weighted(eye, eye, torch.ones(1))(x, y), label))
        for multiple in (4, 16):
            q = [study.directions(multiple * dim, dim, world) for _ in range(seeds)]
            found = [study.optimal_weights(study.head_products(w, w), study.target_products(w, w))[1] for w in q]
            errors[dim, multiple] = fmean(found)
    many = [errors[dim, 16] for dim in (4, 8, 16)]
    better = max(errors[dim, 4] - errors[dim, 16] for dim in (4, 8, 16))
    return [
        Row("exact: error of full rank", max(full), 1e-6, "<=", values=tuple(full)),
        Row("exact: error of 16 d heads of rank 1, smallest over d", min(many), 0.25, ">", values=tuple(many)),
        Row("exact: its rise with d, smallest", min(b - a for a, b in pairwise(many)), 0, ">"),
        Row("exact: its fall from 4 d to 16 d heads, largest", better, 0.02, "<"),
    ]


def built(points: int, heads: int, samples: int) -> tuple[float, float]:
    """Error of votes in two layers, and of the same heads in one, weighted best on other points."""
    world = torch.Generator().manual_seed(points)
    q = study.directions(heads, 8, world)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        x, y = (uniform(samples, n, 8, generator=world) for n in (points, 1))
        return x, y, nearest(x, y)

    x, y, label = draw()
    one = HardHeads.weighted(q[:, None], q[:, None], torch.ones(heads, dtype=q.dtype))
    one = HardHeads.weighted(one.q, one.k, study.measured_weights(one.heads(x, y), label)[0])
    x, y, label = draw()
    votes = torch.cat([study.vote(*part, q) for part in zip(x.split(20), y.split(20))])
    return study.error(votes, label), study.error(one(x, y), label)


def run(budget: Budget, seeds: int) -> list[Row]:
    steps, tested, draws, samples = (3, 100, 1, 2000) if budget == "smoke" else (1500, 20_000, 20, 6000)
    rows = exact(draws)
    task, test = neighbours(256, 8, 16), neighbours(tested, 8, 16)
    found = {
        (rank, heads): [
            trained(lambda r=rank, h=heads: RankHeads(16, h, r), task, test, seed, steps)  # type: ignore[misc]
            for seed in range(seeds)
        ]
        for rank, heads in MODELS
    }
    full, *low = found.values()
    (x, _), label = test(torch.Generator().manual_seed(0))
    trivial = study.error(x.mean(1, keepdim=True), label)
    best = [min(values) for values in zip(*low)]
    ratio = max(a / b for a, b in zip(full, best))
    rows += [
        mean_row("trained: error of full rank", full, 0.25, "<=", baseline=trivial, note="mean of the points"),
        Row("trained: its share of the best low-rank error, largest", ratio, 0.5, "<=", baseline=fmean(best)),
    ]
    for (rank, heads), values in list(found.items())[1:]:
        size = sum(p.numel() for p in RankHeads(16, heads, rank).parameters())
        note = f"{size:,} parameters"
        rows.append(Row(f"trained: error, rank {rank}, {heads} heads", fmean(values), values=tuple(values), note=note))
    votes, one = built(4, 256, samples)
    rows.append(Row("depth, built: error of two layers, 4 points", votes, one, "<", baseline=one, note="one layer"))
    gaps: dict[tuple[int, int], float] = {}
    for points in (4, 64):
        task, test = opposites(1024 // points, points, 8), opposites(tested // points, points, 8)
        errors = {
            (depth, rank): [
                trained(lambda a=(8, depth, heads, rank): encoder(*a), task, test, seed, steps)  # type: ignore[misc]
                for seed in range(seeds)
            ]
            for depth, heads, rank in ((1, 8, 2), (2, 4, 2), (1, 1, 8), (2, 1, 8))
        }
        mean = {key: fmean(values) for key, values in errors.items()}
        for depth in (1, 2):
            gaps[points, depth] = mean[depth, 2] - mean[depth, 8]
        metric = f"depth, trained: error of two layers, {points} points"
        one = mean[1, 2]
        if points == 4:
            rows.append(mean_row(metric, errors[2, 2], one, "<", baseline=one, note="one layer"))
        else:
            rows.append(Row(metric, mean[2, 2], baseline=one, values=tuple(errors[2, 2]), note="one layer"))
    for points, direction in ((4, "<"), (64, ">=")):
        name = f"depth, trained: gap to full rank in two layers, {points} points"
        one = gaps[points, 1]
        rows.append(Row(name, gaps[points, 2], one, direction, baseline=one, note="one layer"))  # type: ignore[arg-type]
    return rows
