"""The measuring part of a comparison, run in one worker process while nothing else runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from regard.bench.cost import measure
from regard.bench.scaling import scaling
from regard.models.slot import mixer
from regard.train.run import Run
from regard.worlds.images import load


def costs(
    report: Callable[[dict[str, Any]], None],
    *,
    runs: list[dict[str, Any]],
    data: str,
    sides: Sequence[int],
    rounds: int,
    budget: float,
) -> dict[str, dict[str, Any]]:
    """Cost of the networks of ``runs`` (one a layer) on a training batch, and scaling of their layers alone, by layer."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # measuring memory collects garbage each time: not what was imported
    images, _ = load(data)
    these = [Run.read(run) for run in runs]
    first = these[0]
    x, y = images.batch(torch.arange(min(first.recipe.batch_size, len(images))))
    networks = {run.layer: run.network(images) for run in these}
    cost = measure(networks, x, y, rounds=rounds, budget=budget)
    report({"done": 1, "of": 1 + len(sides)})
    done = iter(range(2, 2 + len(sides)))
    growth = scaling(
        {run.layer: mixer(run.layer) for run in these},
        first.dim,
        first.num_heads,
        sides,
        rounds=min(rounds, 5),
        budget=budget / 4,
        report=lambda _: report({"done": next(done), "of": 1 + len(sides)}),
    )
    return {name: {"cost": asdict(cost[name]), "scaling": asdict(growth[name])} for name in networks}
