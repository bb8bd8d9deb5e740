"""Answering questions about pictures, as something to train for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe
from regard.train.match import pixels
from regard.worlds.shapes.facts import Found, Phrase, truth
from regard.worlds.shapes.language import Vocabulary, listing
from regard.worlds.shapes.questions import Question, absent, existence, questions
from regard.worlds.shapes.scene import SHAPES
from regard.worlds.shapes.world import Shapes

IGNORE = -100
Asked = tuple[Float[Tensor, "3 h w"], list[Question]]


def lacking(rng: np.random.Generator, found: Sequence[Found]) -> Phrase | None:
    """A kind that no thing has, of the shapes that there are."""
    while (phrase := absent(rng, found, "random")) is not None and phrase.shape not in SHAPES:
        pass
    return phrase


def interview(world: Shapes, index: int) -> Asked:
    """A picture, and in random order: a question of each kind, whether there is one thing and another, and what there is."""
    sample, rng = world[index], np.random.default_rng([world.seed, index])
    found = truth(sample)
    asked = [one for one in questions(rng, found) if one.kind not in ("existence", "pattern")]
    asked.append(Question("what is there ?", str(listing(found)) or "nothing", "description"))
    phrases = [lacking(rng, found), *(Phrase.of(one, "shape", "colour") for one in found[:1])]
    asked += [existence(phrase, found) for phrase in phrases if phrase is not None]
    return sample.image, [asked[i] for i in rng.permutation(len(asked))]


def suspicions(world: Shapes, how: Literal["random", "popular", "adversarial"], count: int) -> Iterator[Asked]:
    """The first pictures of ``world`` in which something that its bias leads to expect is missing, and whether it is there.

    Half of the questions, one a picture, are of things that are there.
    """
    blind, number = replace(world, bias=()), 0
    for index in range(len(world)):
        sample, rng = blind[index], np.random.default_rng([world.seed, index, 1])
        found = truth(sample)
        phrase = absent(rng, found, how, world.bias)
        if phrase is None or phrase.shape not in SHAPES:
            continue
        present = Phrase.of(found[rng.integers(len(found))], "shape", "colour")
        yield sample.image, [existence(phrase if number % 2 else present, found)]
        number += 1
        if number == count:
            return
    raise ValueError(
        f"count={count} is more than the {number} of {len(world)} pictures that such questions can be asked of"
    )


@dataclass(frozen=True)
class Converse:
    """The answers to questions about pictures of ``world``, one after the other, by transformers' Llava.

    A sequence is the start token, the picture's places, and for each question its words, the answer's and the end token; the
    loss is the cross-entropy of answers and end tokens. Measured on questions about ``tests`` pictures without the world's
    bias, each asked alone, an answer right if it is so to the last word; and by asking after things that the bias leads to
    expect where they are missing: precision, recall and share of yes, half of the true answers being yes.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    patch: int
    length: int = 112
    tests: int = 100
    suspects: int = 200

    def __len__(self) -> int:
        return self.steps

    @property
    def places(self) -> int:
        """Image tokens."""
        return (self.world.size // self.patch) ** 2

    def batch(self, epoch: int, step: int) -> Batch:
        first, size = (epoch * self.steps + step) * self.recipe.batch_size, self.recipe.batch_size
        return self.sequences([interview(self.world, i) for i in range(first, first + size)])

    def sequences(self, asked: Sequence[Asked]) -> tuple[Tensor, Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        """Pictures, token numbers, and the numbers to be predicted at each place; questions that do not fit are left out."""
        words = Vocabulary()
        ids = torch.full((len(asked), 1 + self.places + self.length), words.PADDING)
        targets = torch.full_like(ids, IGNORE)
        ids[:, 0], ids[:, 1 : 1 + self.places] = words.START, len(words)
        for row, (_, several) in enumerate(asked):
            at = 1 + self.places
            for one in several:
                question, answer = words.encode(one.text)[1:-1], words.encode(one.answer)[1:]
                middle, end = at + len(question), at + len(question) + len(answer)
                if end > ids.shape[1]:
                    continue
                ids[row, at:middle], ids[row, middle:end] = question, answer
                targets[row, middle - 1 : end - 1] = answer
                at = end
        return torch.stack([image for image, _ in asked]), ids, targets

    def logits(self, model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
        out: Any = model(input_ids=ids, pixel_values=pixels(images), use_cache=False)
        return out.logits.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, ids, targets = batch
        asked = targets != IGNORE
        each = F.cross_entropy(self.logits(model, images, ids)[asked], targets[asked], reduction="none")
        return each.sum() / asked.sum()

    def measure(self, model: nn.Module) -> dict[str, float]:
        plain = replace(self.world, split="test", bias=(), count=self.tests)
        asked = [
            (image, [one]) for image, several in (interview(plain, i) for i in range(self.tests)) for one in several
        ]
        kinds: dict[str, list[bool]] = defaultdict(list)
        for (_, (one,)), answer in zip(asked, self.answers(model, asked)):
            kinds[one.kind].append(answer == one.answer)
        figures = {kind: sum(right) / len(right) for kind, right in sorted(kinds.items())}
        short = [right for kind, rights in kinds.items() if kind != "description" for right in rights]
        return {"accuracy": sum(short) / len(short), **figures, **self.suspected(model)}

    def suspected(
        self, model: nn.Module, how: Literal["random", "popular", "adversarial"] = "adversarial"
    ) -> dict[str, float]:
        """Precision and recall of yes, and how often it is said, where half of the questions are of what is missing."""
        world = replace(self.world, split="test", count=100 * self.suspects)
        asked = list(suspicions(world, how, self.suspects))
        there = torch.tensor([several[0].answer == "yes" for _, several in asked])
        said = torch.tensor([answer == "yes" for answer in self.answers(model, asked)])
        true = float((there & said).sum())
        return {
            "precision": true / max(1, int(said.sum())),
            "recall": true / max(1, int(there.sum())),
            "yes": said.float().mean().item(),
        }

    def prompts(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """What Llava takes to answer the only question about each picture: padded on the left."""
        words = Vocabulary()
        texts = [words.encode(one.text)[1:-1] for _, (one,) in asked]
        longest = max(map(len, texts))
        ids = torch.full((len(asked), longest + 1 + self.places), words.PADDING)
        for row, text in zip(ids, texts):
            at = longest - len(text)
            row[at] = words.START
            row[at + 1 : at + 1 + self.places] = len(words)
            row[at + 1 + self.places :] = text
        mask = (ids != words.PADDING).long()
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(torch.stack([x for x, _ in asked]))}

    @torch.no_grad()
    def answers(self, model: Any, asked: Sequence[Asked], batch: int = 32) -> list[str]:
        """For each picture the answer to its only question, written greedily; cut where it grows longer than the true one."""
        device, words = next(model.parameters()).device, Vocabulary()
        by_length = sorted(range(len(asked)), key=lambda i: len(asked[i][1][0].answer.split()))
        found = [""] * len(asked)
        for at in range(0, len(asked), batch):
            some = [asked[i] for i in by_length[at : at + batch]]
            prompt = {name: x.to(device) for name, x in self.prompts(some).items()}
            longest = len(some[-1][1][0].answer.split()) + 1
            out = model.generate(**prompt, max_new_tokens=longest, do_sample=False, suppress_tokens=[len(words)])
            for i, row in zip(by_length[at : at + batch], out[:, prompt["input_ids"].shape[1] :].cpu()):
                found[i] = words.decode(row) if words.END in row else words.decode(row) + " ..."
        return found
