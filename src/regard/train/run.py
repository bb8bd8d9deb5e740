"""One run: a layer in the slot network, trained on one data set from one seed."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from regard.models import slot
from regard.train.classify import Classify
from regard.train.files import write_whole
from regard.train.loop import Recipe, fit
from regard.worlds.images import Images, load


class Keyed:
    """A run whose files are named after all that decides its outcome."""

    layer: str
    seed: int

    @cached_property
    def key(self) -> str:
        """Name of the run's files: layer, seed and a digest of all settings, with the version of torch."""
        settings = json.dumps([asdict(self), torch.__version__], sort_keys=True)  # type: ignore[call-overload]
        name = re.sub(r"[^\w-]+", "-", self.layer)
        return f"{name}-{self.seed}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Run(Keyed):
    """Everything that decides a run's outcome.

    ``data`` and ``source`` are digests of the data file and of the layer's code: when either changes, it is another run.
    """

    layer: str
    seed: int
    data: str
    source: str
    dim: int = 32
    num_heads: int = 2
    depth: tuple[int, ...] = (1, 2)
    patch: int = 4
    recipe: Recipe = field(default_factory=Recipe)

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Run:
        return cls(**{**facts, "depth": tuple(facts["depth"]), "recipe": Recipe(**facts["recipe"])})

    def network(self, images: Images) -> slot.SlotNetwork:
        """The untrained network for such images, its initial values drawn from the run's seed."""
        c, *size = images.shape
        torch.manual_seed(self.seed)
        return slot.SlotNetwork(
            slot.mixer(self.layer),
            len(images.classes),
            (size[0], size[1]),
            c,
            dim=self.dim,
            num_heads=self.num_heads,
            depth=self.depth,
            patch=self.patch,
        )


def source(layer: str) -> str:
    """Digest of the file that holds the code of ``layer``."""
    module = slot.__name__ if layer in slot.BASELINES else slot.find(layer).target.__module__
    return hashlib.sha256(Path(str(sys.modules[module].__file__)).read_bytes()).hexdigest()[:12]


def finished(run: Keyed, folder: str | Path) -> dict[str, Any] | None:
    """The stored result of exactly this run, or None."""
    file = Path(folder) / f"{run.key}.json"
    return json.loads(file.read_text()) if file.exists() and (file.with_suffix(".safetensors")).exists() else None


def trained(run: Run, images: Images, folder: str | Path) -> slot.SlotNetwork:
    """The network as the run left it."""
    network = run.network(images)
    network.load_state_dict(load_file(Path(folder) / f"{run.key}.safetensors"))
    return network.eval()


def train(report: Callable[[dict[str, Any]], None], *, run: dict[str, Any], data: str, folder: str) -> dict[str, Any]:
    """Train one run and write ``KEY.safetensors`` (weights), then ``KEY.json`` (result) into ``folder``; returns the result.

    A checkpoint ``KEY.part.safetensors`` lives there meanwhile, from which an interrupted run goes on.
    """
    this = Run.read(run)
    torch.set_num_threads(1)
    images, test = load(data)
    network = this.network(images)
    part = Path(folder) / f"{this.key}.part.safetensors"
    start = time.perf_counter()
    task = Classify(images, test, this.recipe, this.seed)
    curve = fit(network, task, this.recipe, seed=this.seed, checkpoint=part, report=report)
    result = {
        **asdict(this),
        **curve,
        "correct": "".join("01"[right] for right in task.correct(network.eval())),
        "seconds": time.perf_counter() - start,
    }
    weights = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    write_whole(part.with_name(f"{this.key}.safetensors"), save(weights))
    write_whole(part.with_name(f"{this.key}.json"), json.dumps(result))
    part.unlink()
    return result
