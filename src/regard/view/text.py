"""Which sequence layer should I use? Train each in the same decoder, on English and on recall, and measure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from regard.models.language import slot
from regard.models.slot import find
from regard.train.files import write_whole
from regard.train.loop import Recipe
from regard.train.pool import Call
from regard.train.run import source
from regard.train.text_run import TaskName, TextRun, split_text
from regard.view.bars import Bars
from regard.view.runs import Runs, machine, measure, staff
from regard.view.runs import names as layer_names
from regard.view.text_comparison import TextComparison, TextRow
from regard.worlds.text import sha256

LAYERS = (
    "attention",
    "multi-query-attention",
    "head-embeddings",
    "low-rank-bottleneck",
    "super-attention-efficient",
    "selective-self-attention",
    "relative-position",
    "coca",
    "rela",
    "normalized-attention",
    "neural-attention",
    "dual-attention-transformer",
    "dynamic-convolution",
    "moh",
    "moba",
)


def _family(name: str) -> str:
    if name == "attention":
        return "baseline"
    parts = find(name).target.__module__.split(".")
    return parts[2] if parts[:2] == ["regard", "layers"] else "own"


def _probe(run: TextRun) -> str:
    """Why the layer cannot stand in the slot, or nothing."""
    try:
        tokens = torch.zeros(2, 2 * run.pairs, dtype=torch.long)
        run.network()(tokens).sum().backward()
    except Exception as error:  # anything a layer raises here is the reason that the table gives
        return f"{type(error).__name__}: {error}"
    return ""


def compare_text(
    layers: Sequence[str | type] | None = None,
    data: str | Path = "english",
    *,
    seeds: int = 2,
    epochs: int = 8,
    out: str | Path = "compare-text",
    resume: bool = False,
    dim: int = 64,
    num_heads: int = 4,
    depth: int = 2,
    context: int = 128,
    steps: int = 75,
    batch_size: int = 32,
    lr: float = 4e-3,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> TextComparison:
    """Train each sequence layer in one identical decoder, on text and on associative recall, from several seeds.

    Reported are the perplexity of a byte of text held out, the share of values recalled among pairs said before (whose world is
    endless: none is seen twice), parameters, tokens a second in training and in cached decoding, and what one more token
    adds to the cache. Runs are spread over worker processes of one thread each and kept in ``out``/runs; cost is measured
    afterwards, alone and interleaved. The table, ``compare.json`` and the self-contained ``report.html`` end up in ``out``.

    Args:
        layers: ``attention``, names of layers that can be causal, ``module:Class``, or classes that can be imported.
        data: ``english``, or a text file, of which the last tenth is held out.
        seeds: how many; they decide initial values and batches, alike for all layers.
        epochs: how often a run is measured, every ``steps`` steps.
        out: the folder to write into.
        resume: go on in ``out``: runs with the same settings, data and code are not repeated.
        dim: channels of the decoder.
        num_heads: heads of every layer.
        depth: blocks.
        context: tokens of a window of text.
        steps: training steps in an epoch; recall has twice as many.
        batch_size: windows a step.
        lr: peak learning rate.
        workers: processes; default: one a core.
        ray: run on the Ray cluster ``auto``, ``local`` or ``host:port``, see :func:`regard.train.ray.run_on_ray`; costs are
            measured here all the same.
        progress: show bars on standard error.

    Raises:
        ValueError: unknown layers, layers that cannot be causal, a text too short, settings that do not fit, a cluster
            that does not answer.
        OSError: the text cannot be read, or results cannot be written; nothing is half written.
        KeyboardInterrupt: says how many runs are kept.
    """
    started = time.time()
    for name, value in (("seeds", seeds), ("epochs", epochs), ("steps", steps), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")
    chosen = layer_names(LAYERS if layers is None else tuple(layers), slot.mixer)
    text = None if str(data) == "english" else str(Path(data).resolve())
    train, test = split_text(None if text is None else Path(text).read_text(encoding="utf8", errors="replace"))
    if len(test) <= context:
        raise ValueError(
            f"data={str(data)!r} has {len(train) + len(test)} bytes; {10 * context + 10} or more are needed"
        )
    recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr)
    folder = Path(out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256(torch.cat((train, test)))[:12]

    rows = {name: TextRow(name, _family(name)) for name in chosen}
    runs: dict[str, TextRun] = {}
    sizes: dict[str, Any] = {"dim": dim, "num_heads": num_heads, "depth": depth, "context": context, "steps": steps}
    for name in chosen:
        code = source(name)
        if reason := _probe(TextRun(name, "english", 0, digest, code, recipe=recipe, **sizes)):
            rows[name].status, rows[name].reason = "not applicable", reason
            continue
        for seed in range(seeds):
            for task in get_args(TaskName):
                run = TextRun(name, task, seed, digest, code, recipe=recipe, **sizes)
                runs[run.key] = run
    made = Runs(runs, folder, resume)
    try:
        with Bars(progress, len(runs) * epochs) as bars:
            made.make("regard.train.text_run:train_text", {"text": text}, workers, bars, epochs, _said, ray)
            for key, run in runs.items():
                if key in made.results:
                    rows[run.layer].runs.append(made.results[key])
            for failure in made.failures:
                row = rows[failure["layer"]]
                if not row.runs:
                    row.status, row.reason = "failed", failure["reason"]
            firsts = list(
                {run.layer: run for key, run in runs.items() if key in made.results and run.task == "english"}.values()
            )
            measured = _costs(firsts, folder, resume, bars) if firsts else {}
    except KeyboardInterrupt:
        raise made.interrupted() from None
    if "failed" in measured:
        made.failures.append({"layer": "measuring", "seed": "", "reason": measured["failed"], "traceback": ""})
    for name, found in measured.items():
        if name in rows:
            rows[name].cost = found
    info = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": time.time() - started,
        "reused": made.reused,
        "out": str(out),
        "machine": machine(),
        "data": {
            "name": "English text" if text is None else Path(text).name,
            "train": len(train),
            "test": len(test),
            "sha256": digest,
        },
        "settings": {"seeds": seeds, **sizes, **asdict(recipe), "workers": staff(workers, ray)},
    }
    comparison = TextComparison(info, list(rows.values()), made.failures)
    comparison.save()
    return comparison


def _said(facts: dict[str, Any]) -> str:
    return f"{facts['perplexity']:.2f} a byte" if "perplexity" in facts else f"recalls {100 * facts['recall']:.0f} %"


def _costs(runs: list[TextRun], folder: Path, resume: bool, bars: Bars) -> dict[str, Any]:
    digest = hashlib.sha256("".join(run.key for run in runs).encode()).hexdigest()[:12]
    file = folder / f"cost-{digest}.json"
    if resume and file.exists():
        return json.loads(file.read_text())
    arguments = {"runs": [asdict(run) for run in runs], "rounds": 7, "budget": 0.5 * len(runs)}
    result = measure(Call("cost", "regard.view.text_measure:text_costs", arguments), bars)
    if "failed" not in result:
        write_whole(file, json.dumps(result))
    return result
