"""Small trained models that come with the package: made by a recipe, kept as safetensors, checked when they are loaded."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from regard.catalog.registry import ROOT
from regard.train.files import write_whole
from regard.train.loop import fit, measured
from regard.train.machine import machine
from regard.train.recipes import load as load_recipe
from regard.train.recipes import settings_of


def folder() -> Path:
    """Where the models lie: inside the installed package, or beside it in a checkout."""
    inside = ROOT / "weights"
    return inside if inside.exists() else ROOT.parent.parent / "weights"


def trained(where: str | Path | None = None) -> list[str]:
    """Names of the models that can be loaded."""
    place = folder() if where is None else Path(where)
    return sorted(p.stem for p in place.glob("*.safetensors") if p.with_suffix(".json").exists())


def card(name: str, where: str | Path | None = None) -> dict[str, Any]:
    """How a model was made and what it reached: recipe, settings, figures, seconds, versions, digest.

    Raises:
        ValueError: there is no such model (with those that there are).
    """
    place = folder() if where is None else Path(where)
    if name not in trained(place):
        raise ValueError(f"name={name!r} is no trained model; there are {', '.join(trained(place)) or 'none'}")
    return json.loads((place / f"{name}.json").read_text())


def pretrained(name: str, where: str | Path | None = None) -> nn.Module:
    """The trained model called ``name``, in ``eval`` mode.

    Args:
        name: one of :func:`trained`.
        where: a folder that ``regard train`` wrote; default the models that come with the package.

    Raises:
        ValueError: there is no such model, or its file is not the one that was trained.
    """
    facts = card(name, where)
    path = (folder() if where is None else Path(where)) / f"{name}.safetensors"
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != facts["sha256"]:
        raise ValueError(
            f"{path} has the digest {found[:12]}, expected {facts['sha256'][:12]}: it was cut off or altered"
        )
    model = load_recipe(facts["recipe"], facts["settings"]).network()
    wrong = model.load_state_dict(load(data), strict=False)
    state = model.state_dict()
    given = {value.data_ptr() for key, value in state.items() if key not in wrong.missing_keys}
    lost = [key for key in wrong.missing_keys if state[key].data_ptr() not in given]
    if lost or wrong.unexpected_keys:
        raise ValueError(f"{path} does not fit its recipe: without {lost}, besides {wrong.unexpected_keys}")
    return model.eval()


@contextmanager
def _together() -> Iterator[None]:
    """Processes that were brought together within end together.

    When one ends while another is still at work, or in an open group, torchrun may end them all.
    """
    alone = not torch.distributed.is_initialized()
    yield
    if alone and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@_together()
def train(
    recipe: str,
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | Path = "weights",
    name: str | None = None,
    resume: bool = False,
    device: str = "cpu",
    devices: int = 1,
    nodes: int = 1,
    logger: Any = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train a model by a recipe and write ``OUT/NAME.safetensors``, then ``OUT/NAME.json``, its card.

    Weights are kept in half precision, and the card's figures are those of what is kept.
    A checkpoint ``OUT/NAME.part.safetensors`` lives there meanwhile, from which an interrupted run goes on.

    Args:
        recipe: one of :func:`regard.train.recipes.names`.
        settings: in the place of the recipe's defaults.
        out: folder to write into.
        name: of the model; default the recipe's.
        resume: go on from the checkpoint, if there is one.
        device, devices, nodes, logger, report: as for :func:`regard.train.loop.fit`.

    Raises:
        ValueError: unknown recipe or setting.
        OSError: a file could not be written; what was there before is still whole.
    """
    trainable = load_recipe(recipe, settings)
    place, name = Path(out), recipe if name is None else name
    place.mkdir(parents=True, exist_ok=True)
    part = place / f"{name}.part.safetensors"
    if not resume:
        part.unlink(missing_ok=True)
    start = time.perf_counter()
    model, task = trainable.start(), trainable.task()
    curve = fit(
        model,
        task,
        trainable.recipe,
        seed=trainable.seed,
        checkpoint=part,
        device=device,
        devices=devices,
        nodes=nodes,
        logger=logger,
        report=report,
    )
    path = place / f"{name}.safetensors"
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return path
    data = save({key: _kept(value) for key, value in _own(model).items()})
    model.load_state_dict(load(data), strict=False)
    figures = {"loss": curve["loss"][-1], **measured(task, model, devices)}
    chosen = [f"--set {key}={value}" for key, value in (settings or {}).items()]
    named = [] if name == recipe else [f"--name {name}"]
    launch, spread = "", []
    if devices * nodes > 1:
        launch = f"torchrun --nnodes {nodes} --nproc-per-node {devices} -m "
        spread = [f"--nodes {nodes} --devices {devices}"]
    facts = {
        "recipe": recipe,
        "about": " ".join((type(trainable).__doc__ or "").partition("Raises:")[0].split()),
        "command": launch + " ".join(["regard train", recipe, *spread, *chosen, *named]),
        "settings": settings_of(trainable),
        "figures": figures,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_whole(path, data)
    write_whole(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    part.unlink(missing_ok=True)
    return path


def _kept(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).cpu().contiguous()


def _own(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that share memory once."""
    seen: set[int] = set()
    kept = {}
    for key, value in model.state_dict().items():
        if value.data_ptr() not in seen or not value.numel():
            kept[key] = value
            seen.add(value.data_ptr())
    return kept
