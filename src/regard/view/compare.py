"""Which attention should I use, for my data, on my machine? Train each in the same network and measure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from regard.models import slot
from regard.train.files import write_whole
from regard.train.loop import Recipe
from regard.train.pool import Call
from regard.train.run import Run, source, trained
from regard.view.bars import Bars
from regard.view.comparison import Comparison, Row, read_cost, read_scaling
from regard.view.maps import received
from regard.view.runs import Runs, machine, measure, staff
from regard.view.runs import names as layer_names
from regard.worlds.digits import digits, small_digits
from regard.worlds.folders import Folder
from regard.worlds.images import Images, pack

LAYERS = (
    *slot.BASELINES,
    "flatten",
    "nat",
    "hilo",
    "biformer",
    "maxvit",
    "cbam",
    "triplet-attention",
    "multi-query-attention",
    "rela",
    "selective-self-attention",
)
SIDES = (7, 14, 20, 28, 40, 56)


def _open(data: str | Path, size: int) -> tuple[str, Images, Images, list[tuple[str, str]]]:
    if data in ("digits", "small-digits"):
        load = digits if data == "digits" else small_digits
        return str(data), load("train"), load("test"), []
    folder = Folder(data, size)
    return folder.root.resolve().name, *folder.split(), folder.skipped


def _family(name: str) -> str:
    if name in slot.BASELINES:
        return "baseline"
    parts = slot.find(name).target.__module__.split(".")
    return parts[2] if parts[:2] == ["regard", "layers"] else "own"


def _probe(run: Run, images: Images) -> str:
    """Why the layer cannot stand in the slot, or nothing."""
    try:
        x, _ = images.batch(torch.arange(2))
        run.network(images)(x).sum().backward()
    except Exception as error:  # anything a layer raises here is the reason that the table gives
        return f"{type(error).__name__}: {error}"
    return ""


def _costs(runs: list[Run], data: str, folder: Path, resume: bool, sides: Sequence[int], bars: Bars) -> dict[str, Any]:
    """Cost and scaling by layer; a layer whose measuring kills the process takes the others' figures with it."""
    arguments = {
        "runs": [asdict(run) for run in runs],
        "data": data,
        "sides": list(sides),
        "rounds": 7,
        "budget": 0.3 * len(runs),
    }
    digest = hashlib.sha256("".join([*(run.key for run in runs), *map(str, sides)]).encode()).hexdigest()[:12]
    file = folder / f"cost-{digest}.json"
    if resume and file.exists():
        return json.loads(file.read_text())
    result = measure(Call("cost", "regard.view.measure:costs", arguments), bars)
    if "failed" not in result:
        write_whole(file, json.dumps(result))
    return result


def compare(
    layers: Sequence[str | type] | None = None,
    data: str | Path = "digits",
    *,
    seeds: int = 2,
    epochs: int | None = None,
    out: str | Path = "compare",
    resume: bool = False,
    size: int = 64,
    dim: int = 32,
    num_heads: int = 2,
    depth: tuple[int, ...] = (1, 2),
    patch: int | None = None,
    batch_size: int = 50,
    lr: float = 3e-3,
    sides: Sequence[int] = SIDES,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Train each layer in one identical network on one data set, from several seeds, and measure what it costs.

    Runs are spread over worker processes of one thread each; every finished run is kept in ``out``/runs, every epoch of an
    unfinished one too. Afterwards costs are measured, alone and interleaved. The table, ``compare.json`` and the
    self-contained ``report.html`` end up in ``out``. Images of the test split are only measured on, never chosen by: the
    figure of a run is that of its last epoch.

    Args:
        layers: names of layers, ``module:Class``, or classes of your own that can be imported; default: about a dozen.
        data: ``digits``, ``small-digits``, or a folder of images whose sub-folders are the classes.
        seeds: how many; they decide initial values and order, alike for all layers.
        epochs: default: such that about 16,000 images are seen, at least 3 and at most 40.
        out: the folder to write into.
        resume: go on in ``out``: runs with the same settings, data and code are not repeated.
        size: pixels of the side to which images of a folder are brought.
        dim: channels at the first resolution of the network, see :class:`regard.models.slot.SlotNetwork`.
        num_heads: heads there.
        depth: blocks at each resolution.
        patch: pixels between tokens; default: such that the first grid is about eight tokens wide.
        batch_size: images a step.
        lr: peak learning rate.
        sides: of the grids on which growth with the number of tokens is measured.
        workers: processes; default: one a core.
        ray: run on the Ray cluster ``auto``, ``local`` or ``host:port``, see :func:`regard.train.ray.run_on_ray`; costs are
            measured here all the same.
        progress: show bars on standard error.

    Returns:
        The comparison, already saved.

    Raises:
        ValueError: unknown layers, data that cannot be used, settings that do not fit, a cluster that does not answer.
        OSError: results could not be written; nothing is half written.
        KeyboardInterrupt: says how many runs are kept.
    """
    started = time.time()
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be positive")
    names = layer_names(LAYERS if layers is None else tuple(layers), slot.mixer)
    title, train, test, skipped = _open(data, size)
    c, *shape = train.shape
    if patch is None:
        patch = max(1, round(min(shape) / 8))
    if epochs is None:
        epochs = min(40, max(3, round(16_000 / len(train))))
    recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr)
    slot.SlotNetwork(
        slot.BASELINES["identity"], 2, (shape[0], shape[1]), dim=dim, num_heads=num_heads, depth=depth, patch=patch
    )

    folder = Path(out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    packed = pack(train, test)
    digest, file = hashlib.sha256(packed).hexdigest()[:12], str((Path(out) / "data.safetensors").resolve())
    write_whole(file, packed)

    rows = {name: Row(name, _family(name)) for name in names}
    runs: dict[str, Run] = {}
    for name in names:
        for seed in range(seeds):
            run = Run(name, seed, digest, source(name), dim, num_heads, tuple(depth), patch, recipe)
            if seed == 0 and (reason := _probe(run, train)):
                rows[name].status, rows[name].reason = "not applicable", reason
                break
            runs[run.key] = run
    made = Runs(runs, folder, resume)
    try:
        with Bars(progress, len(runs) * epochs) as bars:
            made.make(
                "regard.train.run:train",
                {"data": file},
                workers,
                bars,
                epochs,
                lambda facts: f"{100 * facts['accuracy']:.1f} %",
                ray,
            )
            for key, run in runs.items():
                if key in made.results:
                    rows[run.layer].runs.append(made.results[key])
            for failure in made.failures:
                row = rows[failure["layer"]]
                if not row.runs:
                    row.status, row.reason = "failed", failure["reason"]
            firsts = list({run.layer: run for key, run in reversed(runs.items()) if key in made.results}.values())[::-1]
            measured = _costs(firsts, file, folder, resume, sides, bars) if firsts else {}
    except KeyboardInterrupt:
        raise made.interrupted() from None
    failures = made.failures
    if "failed" in measured:
        failures.append({"layer": "measuring", "seed": "", "reason": measured["failed"], "traceback": ""})
    for name, found in measured.items():
        if name in rows:
            rows[name].cost, rows[name].scaling = read_cost(found["cost"]), read_scaling(found["scaling"])

    shown = torch.stack([(test.labels == label).nonzero()[0, 0] for label in test.labels.unique()[:6]])
    maps = [received(run.layer, trained(run, train, folder), test.batch(shown)[0]) for run in firsts]
    counts = test.labels.bincount(minlength=len(test.classes))
    info = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": time.time() - started,
        "reused": made.reused,
        "out": str(out),
        "machine": machine(),
        "data": {
            "name": title,
            "classes": list(train.classes),
            "train": len(train),
            "test": len(test),
            "image": [c, *shape],
            "largest": counts.max().item() / len(test),
            "skipped": skipped,
        },
        "settings": {
            "seeds": seeds,
            "dim": dim,
            "num_heads": num_heads,
            "depth": list(depth),
            "patch": patch,
            **asdict(recipe),
            "workers": staff(workers, ray),
        },
    }
    comparison = Comparison(info, list(rows.values()), test.pixels[shown].tolist(), [m for m in maps if m], failures)
    comparison.save()
    return comparison
