"""Deep layers of a vision-language model hardly look at the image: half of its tokens can be dropped after two layers.

Set-up: the trained model ``shapes-vlm``, 256 image tokens, 8 decoder layers, on the questions of :class:`Converse` about 150
test pictures without the bias of its training. Compared: the whole model, FastV, and image tokens kept at random.

Bar: (a) from layer 3 on (counted from 0) the last prompt token gives the image a share of its attention at most a third of the
image's share of the sequence; (b) half of the image tokens, dropped after two layers, cost one point of accuracy at most,
and at a quarter FastV is two points or more better than chance; (c) a quarter kept after one layer is five points or more
worse than a quarter kept after two; (d) places of small things (below 0.2 of the picture's side) lose five points or more
beyond what existence loses, at a quarter.

Reported besides: how much more of the attention to the image the thing that is asked about gets than its share of the image,
in the second layer, by which FastV chooses, and as baseline in the layer where it gets most. In this small model that is the
seventh of eight layers, and in the second the thing gets about its share: what FastV keeps serves little better than tokens
kept at random with a quarter, and no better with half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.accelerators.fastv import FastV, attention_share
from regard.claims.claim import Budget, Row
from regard.core.apply import apply
from regard.core.call import Call
from regard.core.capture import capture
from regard.train.converse import Asked, Converse, interview
from regard.train.pretrained import card, pretrained
from regard.train.recipes import load

SEEDS = 1
SMALL = 0.2


class Chance(FastV):
    """Keeps as many image tokens, any."""

    def kept(self, call: Call, image: Tensor, valid: Tensor) -> Tensor:
        count = int(image.sum(1).min())
        dropped = count - max(1, round(count * self.keep))
        scores = torch.rand(image.shape, generator=torch.Generator().manual_seed(count)).to(image.device)
        order = scores.masked_fill(~image, float("inf")).sort(dim=1, descending=True, stable=True).indices
        return order[:, : image.shape[1] - dropped].sort(1).values


def asked_of(task: Converse, count: int, seed: int) -> tuple[list[Asked], list[str]]:
    """Questions in one or two words about ``count`` pictures, each alone, and what they are about.

    That is their kind, or ``"small place"`` for the places of small things.
    """
    world = replace(task.world, split="test", bias=(), seed=seed, count=count)
    asked: list[Asked] = []
    kinds: list[str] = []
    for index in range(count):
        things = world[index].scene.things
        image, several = interview(world, index)
        for one in several:
            if one.kind == "description":
                continue
            small = one.kind == "place" and things[one.about[0]].size < SMALL * world.size
            asked.append((image, [one]))
            kinds.append("small place" if small else one.kind)
    return asked, kinds


def image_share(model: Any, task: Converse, asked: Sequence[Asked], first: int) -> tuple[float, float]:
    """Attention of the last prompt token to the image, mean over layers from ``first`` on; the image's share of the sequence.

    Of the longest prompts among ``asked``.
    """
    prompt = task.prompts(asked)
    whole = {name: x[prompt["attention_mask"].all(1)] for name, x in prompt.items()}
    by_role = attention_share(model, whole, where="model.language_model.*")
    return float(by_role["image"][first:].mean()), task.places / whole["input_ids"].shape[1]


def sight(model: Any, task: Converse, kind: str, count: int, seed: int) -> list[float]:
    """By layer, the asked thing's share of the last prompt token's attention to the image over its share of the image.

    Mean over the questions of ``kind`` about ``count`` pictures, except after things that cover no place by half.
    """
    world = replace(task.world, split="test", bias=(), seed=seed, count=count)
    found = []
    for index in range(count):
        covered = F.avg_pool2d(world[index].visible.float(), task.patch).flatten(1) >= 0.5
        image, several = interview(world, index)
        for one in several:
            if one.kind == kind and (thing := covered[one.about[0]]).any():
                with torch.no_grad(), capture(model, "model.language_model.*") as cap:
                    model(**task.prompts([(image, [one])]))
                looks = torch.stack([call.weights()[0, :, -1, 1 : 1 + task.places].mean(0) for _, call in cap.items()])
                found.append(looks[:, thing].sum(1) / looks.sum(1) / thing.float().mean())
    return torch.stack(found).mean(0).tolist()


def run(budget: Budget, seeds: int) -> list[Row]:
    count = 2 if budget == "smoke" else 150
    model: Any = pretrained("shapes-vlm")
    task: Any = load("shapes-vlm", card("shapes-vlm")["settings"]).task()
    asked, kinds = zip(*(asked_of(task, count, 300 + seed) for seed in range(seeds)))
    questions, about = [one for part in asked for one in part], [kind for part in kinds for kind in part]

    def right(accelerator: FastV | None) -> list[bool]:
        with nullcontext() if accelerator is None else apply(model, accelerator):
            answers = task.answers(model, questions)
        return [answer == one.answer for answer, (_, (one,)) in zip(answers, questions)]

    arms: dict[str, Callable[[], FastV] | None] = {
        "whole": None,
        "half": lambda: FastV(keep=0.5, after=2),
        "quarter": lambda: FastV(keep=0.25, after=2),
        "early": lambda: FastV(keep=0.25, after=1),
        "half by chance": lambda: Chance(keep=0.5, after=2),
        "quarter by chance": lambda: Chance(keep=0.25, after=2),
    }
    found = {name: right(None if make is None else make()) for name, make in arms.items()}

    def accuracy(name: str, kind: str | None = None) -> float:
        chosen = [ok for ok, what in zip(found[name], about) if kind is None or what == kind]
        return 100 * fmean(chosen) if chosen else 0.0

    def lost(kind: str | None, name: str) -> float:
        return accuracy("whole", kind) - accuracy(name, kind)

    seen = {kind: sight(model, task, kind, 4 if budget == "smoke" else 40, 300) for kind in ("shape", "colour")}
    share, part = image_share(model, task, questions[:32], 3)
    return [
        Row("image's share of attention over its share of the sequence, layers 3 on", share / part, 1 / 3, "<="),
        Row("points lost with half of the image", lost(None, "half"), 1, "<=", lost(None, "half by chance")),
        Row("points more than chance with a quarter", accuracy("quarter") - accuracy("quarter by chance"), 2, ">="),
        Row("points a layer earlier costs with a quarter", accuracy("quarter") - accuracy("early"), 5, ">="),
        Row(
            "points that places of small things lose beyond existence, with a quarter",
            lost("small place", "quarter") - lost("existence", "quarter"),
            5,
            ">=",
        ),
        Row("accuracy, whole, %", accuracy("whole")),
        Row("accuracy with half, %", accuracy("half"), baseline=accuracy("half by chance")),
        Row("accuracy with a quarter, %", accuracy("quarter"), baseline=accuracy("quarter by chance")),
        *(
            Row(
                f"times its share that a thing gets when asked for its {kind}, second layer",
                by_layer[1],
                baseline=max(by_layer),
                values=tuple(by_layer),
            )
            for kind, by_layer in seen.items()
        ),
        *(
            Row(f"{kind}, with a quarter, %", accuracy("quarter", kind), baseline=accuracy("whole", kind))
            for kind in sorted(set(about))
        ),
    ]
