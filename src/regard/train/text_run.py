"""One run of a text comparison: a layer in the slot decoder, trained on one task from one seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from regard.models.language._decoder import DecoderLM
from regard.models.language.slot import slot_decoder
from regard.train.files import write_whole
from regard.train.language import Answer, Predict
from regard.train.loop import Recipe, Task, fit
from regard.train.run import Keyed
from regard.worlds.recall import Recall
from regard.worlds.text import english, to_bytes

BYTES = 128
TESTS = 256
TaskName = Literal["english", "recall"]


@dataclass(frozen=True)
class TextRun(Keyed):
    """Everything that decides a run's outcome; ``data`` is a digest of the text, ``source`` one of the layer's code.

    ``steps`` are those of an epoch, after each of which the run is measured; recall, which is learned late, has twice as many.
    """

    layer: str
    task: TaskName
    seed: int
    data: str
    source: str
    dim: int = 64
    num_heads: int = 4
    depth: int = 2
    context: int = 128
    pairs: int = 8
    symbols: int = 32
    steps: int = 75
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=8, batch_size=32))

    @classmethod
    def read(cls, facts: dict[str, Any]) -> TextRun:
        return cls(**{**facts, "recipe": Recipe(**facts["recipe"])})

    def network(self) -> DecoderLM:
        """The untrained decoder, its initial values drawn from the run's seed."""
        vocab, context = (BYTES, self.context) if self.task == "english" else (self.symbols, 4 * self.pairs)
        torch.manual_seed(self.seed)
        return slot_decoder(
            self.layer, vocab, dim=self.dim, num_heads=self.num_heads, depth=self.depth, context=context
        )

    def learned(self, text: str | None = None) -> Task:
        """What the run learns; ``text`` is the user's own to learn from and, its last tenth, to be measured on."""
        if self.task == "recall":
            steps = 2 * self.steps
            count = max(TESTS, steps * self.recipe.epochs * self.recipe.batch_size)
            world = Recall(
                vocab=self.symbols, length=4 * self.pairs, pairs=self.pairs, power=1.0, seed=self.seed, count=count
            )
            return Answer(world, self.recipe, steps, TESTS)
        train, test = split_text(text)
        return Predict(train, test, self.recipe, self.context, self.steps, self.seed)


def split_text(text: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to learn from and to be measured on: English prose, or nine tenths and one tenth of ``text``; ASCII only."""
    if text is None:
        return english("train"), english("test")
    data = to_bytes(text.encode("ascii", "replace").decode())
    train, test = data.tensor_split([len(data) * 9 // 10])
    return train, test


def train_text(
    report: Callable[[dict[str, Any]], None], *, run: dict[str, Any], folder: str, text: str | None
) -> dict[str, Any]:
    """Train one run and write ``KEY.safetensors`` (weights), then ``KEY.json`` (result) into ``folder``; returns the result.

    A checkpoint ``KEY.part.safetensors`` lives there meanwhile, from which an interrupted run goes on.
    """
    import json

    this = TextRun.read(run)
    torch.set_num_threads(1)
    network = this.network()
    part = Path(folder) / f"{this.key}.part.safetensors"
    start = time.perf_counter()
    content = None if text is None else Path(text).read_text(encoding="utf8", errors="replace")
    curve = fit(network, this.learned(content), this.recipe, seed=this.seed, checkpoint=part, report=report)
    result = {**asdict(this), **curve, "seconds": time.perf_counter() - start}
    weights = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    write_whole(part.with_name(f"{this.key}.safetensors"), save(weights))
    write_whole(part.with_name(f"{this.key}.json"), json.dumps(result))
    part.unlink()
    return result
