"""Answering questions about pictures, as something to train for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe
from regard.train.match import pixels
from regard.train.naming import naming, patch_things, what_is_where
from regard.worlds.shapes.facts import Found, Phrase, truth
from regard.worlds.shapes.language import Vocabulary, listing
from regard.worlds.shapes.questions import Question, absent, existence, questions
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import SHAPES
from regard.worlds.shapes.world import Shapes

IGNORE, ROUNDS = -100, 2
Numbers = Int[Tensor, "b n"]
Asked = tuple[Float[Tensor, "3 h w"], list[Question]]


def lacking(rng: np.random.Generator, found: Sequence[Found]) -> Phrase | None:
    """A kind that no thing has, of the shapes that there are."""
    while (phrase := absent(rng, found, "random")) is not None and phrase.shape not in SHAPES:
        pass
    return phrase


def asked_about(sample: ShapesSample, rng: np.random.Generator, rounds: int = 1) -> list[Question]:
    """What there is, and in each round a question of each kind, and whether there is one thing and another; each once."""
    found = truth(sample)
    asked = [Question("what is there ?", str(listing(found)) or "nothing", "description")]
    for _ in range(rounds):
        asked += [one for one in questions(rng, found) if one.kind not in ("existence", "pattern")]
        here = [Phrase.of(found[rng.integers(len(found))], "shape", "colour")] if found else []
        phrases = [lacking(rng, found), *here]
        asked += [existence(phrase, found) for phrase in phrases if phrase is not None]
    return list({one.text: one for one in asked}.values())


def interview(world: Shapes, index: int) -> Asked:
    """A picture and a round of questions about it."""
    sample = world[index]
    return sample.image, asked_about(sample, np.random.default_rng([world.seed, index]))


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


def taking_turns(turns: Numbers) -> tuple[Bool[Tensor, "b 1 n n"], Numbers]:
    """Who sees whom, (query, key), and positions: a turn sees turn 0 and itself, what came before, and follows on turn 0."""
    places = torch.arange(turns.shape[1], device=turns.device)
    own, first = turns[:, :, None] == turns[:, None], turns == 0
    mask = (own | first[:, None]) & (places <= places[:, None])
    starts = torch.where(own, places, len(places)).amin(2)
    return mask[:, None], torch.where(first, places, places - starts + first.sum(1, keepdim=True))


def pointing(
    states: Float[Tensor, "b n d"], about: Int[Tensor, "b n"], things: Int[Tensor, "b m"]
) -> Float[Tensor, ""]:
    r"""How little what is asked about stands out where a question ends, as a mean over questions.

    .. math:: -\log \frac{\sum_{p \in T} e^{x_q \cdot x_p / \sqrt{d}}}{\sum_p e^{x_q \cdot x_p / \sqrt{d}}}

    with x the ``states`` divided by their root mean squares, q the end of the question, p the start token, which stands for
    nothing, and the m places of the picture after it, and T those of the things asked about. Questions after things that
    cover no place are left out.

    Args:
        states: of a decoder.
        about: at the end of a question, bit i + 1 for thing i and bit 0 for nothing; 0 elsewhere.
        things: which thing is at each place, or -1.
    """
    rows, ends = about.nonzero(as_tuple=True)
    x = F.rms_norm(states.float(), states.shape[-1:])
    scores = (x[rows, : 1 + things.shape[1]] @ x[rows, ends, :, None])[..., 0] / x.shape[-1] ** 0.5
    bit = F.pad(things + 1, (1, 0))[rows]
    there = (about[rows, ends, None] >> bit) & 1 > 0
    there[:, 1:] &= things[rows] >= 0
    asked = there.any(1)
    lost = scores.logsumexp(1) - scores.masked_fill(~there, float("-inf")).logsumexp(1)
    return lost[asked].sum() / asked.sum().clamp_min(1)


@dataclass(frozen=True)
class Converse:
    r"""The answers to questions about pictures of ``world`` by transformers' Llava, and what is where.

    A sequence is the start token, the picture's places, and for each question its words, the answer's and the end token. A
    question sees the picture and itself, from the position after the picture on, as if it were the only one: what was asked
    before would often give its answer away. The loss is the cross-entropy of answers and end tokens, the
    :func:`~regard.train.naming.naming` of what the decoder is given at each place, so that a place can be found by the words
    that are asked for, and the :func:`pointing` halfway through the decoder. Measured on questions about ``tests`` pictures
    without the world's bias, each asked alone, an answer right if it is so to the last word; and by asking after things that
    the bias leads to expect where they are missing: precision, recall and share of yes, half of the true answers being yes.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    patch: int
    length: int = 136
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
        samples = [self.world[i] for i in range(first, first + size)]
        asked = []
        for i, sample in enumerate(samples, first):
            rng = np.random.default_rng([self.world.seed, i])
            several = asked_about(sample, rng, ROUNDS)
            asked.append((sample.image, [several[k] for k in rng.permutation(len(several))]))
        there = torch.stack([what_is_where(sample, self.patch) for sample in samples])
        things = torch.stack([patch_things(sample, self.patch) for sample in samples])
        return *self.sequences(asked), there, things

    def sequences(self, asked: Sequence[Asked]) -> tuple[Tensor, Numbers, Numbers, Numbers, Numbers]:
        """Pictures, token numbers, the numbers to be predicted at each place, whose turn it is there, 0 the picture's, and
        what a question is about at its end, as :func:`pointing` takes it.

        Questions that do not fit are left out.
        """
        words = Vocabulary()
        ids = torch.full((len(asked), 1 + self.places + self.length), words.PADDING)
        targets, turns, about = torch.full_like(ids, IGNORE), torch.zeros_like(ids), torch.zeros_like(ids)
        ids[:, 0], ids[:, 1 : 1 + self.places] = words.START, len(words)
        for row, (_, several) in enumerate(asked):
            at = 1 + self.places
            for turn, one in enumerate(several, 1):
                question, answer = words.encode(one.text)[1:-1], words.encode(one.answer)[1:]
                middle, end = at + len(question), at + len(question) + len(answer)
                if end > ids.shape[1]:
                    continue
                ids[row, at:middle], ids[row, middle:end] = question, answer
                targets[row, middle - 1 : end - 1], turns[row, at:end] = answer, turn
                if one.kind != "description":
                    about[row, middle - 1] = sum(2 << i for i in one.about) or 1
                at = end
            turns[row, at:] = len(several) + 1
        return torch.stack([image for image, _ in asked]), ids, targets, turns, about

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, ids, targets, turns, about, there, things = batch
        mask, positions = taking_turns(turns)
        out: Any = model(
            input_ids=ids,
            pixel_values=pixels(images),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        asked = targets != IGNORE
        answers = F.cross_entropy(out.logits[asked].float(), targets[asked])
        llava: Any = getattr(model, "module", model)
        words, states = llava.get_input_embeddings().weight, out.hidden_states
        named = naming(states[0][:, 1 : 1 + self.places], there, words).mean()
        return answers + named + pointing(states[len(states) // 2], about, things)

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
