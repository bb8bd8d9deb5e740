"""What the small models are trained on: pictures with sentences and with questions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.hosts.small import llava
from regard.train.classify import Classify, ClassifyPatches
from regard.train.converse import IGNORE, Converse, grounding, interview, suspicions, taking_turns
from regard.train.loop import Recipe
from regard.train.match import KINDS, Match, patch_kinds, pixels, tagging
from regard.train.paint import Paint, captioned
from regard.train.recipes.shapes_vlm import BIAS
from regard.worlds.shapes.judge import judge, satisfies
from regard.worlds.shapes.labelled import located_shapes
from regard.worlds.shapes.language import Vocabulary, read_caption
from regard.worlds.shapes.scene import CLASSES, COLOURS, SHAPES
from regard.worlds.shapes.world import Shapes

WORLD = Shapes(size=48, things=(1, 3), count=400)
TEST = replace(WORLD, split="test")
RECIPE = Recipe(batch_size=3)


def test_captions_are_true() -> None:
    pairs = [captioned(WORLD, i) for i in range(20)]
    assert all(satisfies(image, said) for image, said in pairs)
    assert {said.tone is None for _, said in pairs} == {True, False}


def test_painting_leaves_some_captions_out() -> None:
    task = Paint(WORLD, RECIPE, steps=100, unsaid=0.3)
    images, _ = task.batch(1, 4)
    assert images.shape == (3, 3, 48, 48)
    assert torch.equal(images[1], WORLD[(100 + 4) * 3 + 1].image)
    words = Vocabulary()
    said = [words.decode(row) for step in range(30) for row in task.batch(0, step)[1]]
    assert 0.15 < said.count("") / len(said) < 0.45
    assert all(read_caption(text) for text in said if text)


def test_batches_of_an_epoch_differ_and_come_again() -> None:
    for task in (Paint(WORLD, RECIPE, 2), Match(WORLD, RECIPE, 2, patch=24), Converse(WORLD, RECIPE, 2, patch=24)):
        first, second, again = task.batch(0, 0), task.batch(0, 1), task.batch(0, 0)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first[0], second[0])


def test_matching_is_right_for_a_model_that_knows() -> None:
    class Knows(torch.nn.Module):
        """Says that the i-th text is about the i-th picture, or about the one before; and what is on each patch, or not."""

        def __init__(self, right: bool) -> None:
            super().__init__()
            self.shift = 0 if right else 1
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.visual_projection = torch.nn.Identity()
            self.vision_model = SimpleNamespace(post_layernorm=torch.nn.Identity())

        def forward(
            self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor, **more: bool
        ) -> SimpleNamespace:
            assert more == {"output_hidden_states": True}
            at = next(i for i in range(0, 8, 4) if torch.equal(task_images(i), pixel_values))
            kinds = torch.stack([patch_kinds(TEST[at + i], 6) for i in range(4)]).clamp_min(0)
            patches = torch.eye(len(KINDS))[(kinds + self.shift) % len(KINDS)]
            return SimpleNamespace(
                logits_per_text=torch.eye(len(input_ids), 4).roll(self.shift, 1),
                text_embeds=torch.cat([torch.zeros(4, len(KINDS)), torch.eye(len(KINDS)), torch.eye(8, len(KINDS))]),
                vision_model_output=SimpleNamespace(hidden_states=[torch.cat([patches[:, :1], patches], 1), None]),
            )

    def task_images(first: int) -> torch.Tensor:
        return pixels(torch.stack([TEST[first + i].image for i in range(4)]))

    task = Match(WORLD, RECIPE, 1, patch=6, tests=2, among=4)
    for right in (True, False):
        figures = task.measure(Knows(right))
        assert figures == dict.fromkeys(("image_of_text", "text_of_image", "kind_of_patch"), float(right))


def test_tagging_is_the_cross_entropy_against_what_is_not_there() -> None:
    scores, kinds = torch.randn(3, 9), torch.tensor([[-1, 2, 2, 7], [-1, -1, 0, -1], [-1, -1, -1, -1]])
    loss = []
    for row, present in zip(scores, ({2, 7}, {0}, set())):
        absent = [row[k].exp() for k in range(9) if k not in present]
        loss += [-(row[k].exp() / (row[k].exp() + sum(absent))).log() for k in present]
    torch.testing.assert_close(tagging(scores, kinds), sum(loss) / len(loss))
    assert tagging(scores, torch.full((3, 4), -1)) == 0


def test_patches_on_the_thing_learn_its_name_too() -> None:
    pytest.importorskip("timm")
    from regard.hosts.small import early_vit

    images, places = located_shapes("train", 32, 6)
    task = ClassifyPatches(images, images, Recipe(batch_size=3), seed=1, reach=3, places=places, patch=8)
    model: Any = early_vit(32, 8, 3, len(CLASSES), 16, 2, 1, registers=2).eval()
    x, y, on = task.batch(2, 1)
    plain = Classify(images, images, Recipe(batch_size=3), seed=1, reach=3).batch(2, 1)
    assert torch.equal(x, plain[0])
    assert torch.equal(y, plain[1])
    alone = places[task.chosen(2, 1)][:, None].float()
    covered = task.moved(alone, 2, 1).unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean((3, 5)).flatten(1)
    assert torch.equal(on, covered >= 0.5)
    assert on.any()
    assert not on.all()

    tokens = model.forward_features(x)
    expected = F.cross_entropy(model.head(tokens[:, 0]), y)
    of_patches = [F.cross_entropy(model.head(tokens[i, 3 + p]), y[i]) for i, p in on.nonzero().tolist()]
    expected = expected + torch.stack(of_patches).mean()
    torch.testing.assert_close(task.loss(model, (x, y, on)), expected)
    bare = F.cross_entropy(model(x), y)
    torch.testing.assert_close(task.loss(model, (x, y, torch.zeros_like(on))), bare)
    assert not model.norm._forward_hooks

    with pytest.raises(ValueError, match=r"patch=12 must be a power of two"):
        early_vit(48, 12, 3, 5, 16, 2, 1, 0)


def test_noisier_times_are_drawn_more_often() -> None:
    diffusers = pytest.importorskip("diffusers")
    times: list[torch.Tensor] = []

    class Watcher(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def forward(self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            times.append(t)
            return x

    watcher, images = Watcher(), torch.zeros(4000, 1, 1, 1)
    for noisy in (1.0, 2.0):
        torch.manual_seed(0)
        Paint(WORLD, RECIPE, 1, noisy=noisy).loss(watcher, (images, images))
    even, late = (t / 1000 for t in times)
    assert abs(even.mean() - 1 / 2) < 0.02
    assert abs(late.mean() - 2 / 3) < 0.02
    assert max(t.max() for t in times) < 1000
    with pytest.raises(ValueError, match=r"noisy=0\.0 must be positive"):
        Paint(WORLD, RECIPE, 1, noisy=0.0)


def test_patches_have_the_kind_of_what_covers_them() -> None:
    sample = WORLD[7]
    kinds = patch_kinds(sample, 4).view(12, 12)
    for row, column in itertools.product(range(12), repeat=2):
        inside = sample.index[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        counts = {i + 1: int((inside == i + 1).sum()) for i in range(len(sample.scene.things))}
        covering = [i for i, n in counts.items() if n >= 8]
        kind = int(kinds[row, column])
        assert (kind >= 0) == bool(covering)
        if kind >= 0:
            assert KINDS[kind] in [sample.scene.things[i - 1].kind for i in covering]
    assert (kinds >= 0).any()


def test_questions_have_true_answers() -> None:
    for i in range(20):
        image, asked = interview(WORLD, i)
        found = judge(image)
        kinds = [one.kind for one in asked]
        assert kinds.count("existence") == 2
        assert "pattern" not in kinds
        for one in asked:
            if one.kind == "existence":
                phrase = one.text.removeprefix("is there a ").removesuffix(" ?")
                assert one.answer == ("yes" if phrase in [f"{f.colour} {f.shape}" for f in found] else "no")
            if one.kind == "description":
                assert satisfies(image, one.answer)


def test_sequences_hold_questions_and_ask_for_answers() -> None:
    task, words = Converse(WORLD, RECIPE, 1, patch=24), Vocabulary()
    asked = [interview(WORLD, i) for i in range(4)]
    images, ids, targets, turns = task.sequences(asked)
    assert images.shape == (4, 3, 48, 48)
    assert (ids[:, 1 : 1 + task.places] == len(words)).all()
    for (_, several), row, target in zip(asked, ids, targets):
        text = " ".join(words.words[i] for i in row[1 + task.places :].tolist())
        expected = " ".join(f"{one.text} {one.answer} <end>" for one in several)
        assert text.startswith(expected)
        at = (target != IGNORE).nonzero().flatten()
        assert torch.equal(row[at + 1], target[at])
        answers = " ".join(words.words[i] for i in target[at].tolist())
        assert answers == " ".join(f"{one.answer} <end>" for one in several)
    assert (turns[:, : 1 + task.places] == 0).all()
    for (_, several), target, turn in zip(asked, targets, turns):
        at = (target != IGNORE).nonzero().flatten()
        assert turn[at].tolist() == [k for k, one in enumerate(several, 1) for _ in f"{one.answer} <end>".split()]


def test_questions_in_one_sequence_are_answered_as_if_asked_alone() -> None:
    task = Converse(WORLD, RECIPE, 1, patch=24)
    torch.manual_seed(0)
    model: Any = llava(len(Vocabulary()), 48, 24, (32, 1), 32, 2, 256).double().eval()
    image, several = interview(WORLD, 0)
    images, ids, targets, turns = task.sequences([(image, several)])
    mask, positions = taking_turns(turns)
    places = torch.arange(ids.shape[1])
    for i, j in itertools.product(range(0, ids.shape[1], 3), repeat=2):
        assert mask[0, 0, i, j] == (j <= i and turns[0, j].item() in (0, turns[0, i].item()))
    seen = pixels(images).double()
    together = model(input_ids=ids, pixel_values=seen, attention_mask=mask, position_ids=positions).logits[0]
    for turn, one in enumerate(several, 1):
        _, alone, expected, _ = task.sequences([(image, [one])])
        apart = model(input_ids=alone, pixel_values=seen).logits[0]
        here, there = places[(turns[0] == turn) & (targets[0] != IGNORE)], places[expected[0] != IGNORE]
        torch.testing.assert_close(together[here], apart[there])


def test_grounding_is_the_cross_entropy_of_the_words_for_what_is_there() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    table = nn.Embedding(len(Vocabulary()), 8)
    model.get_input_embeddings = lambda: table  # type: ignore[assignment]
    seen, kinds = torch.randn(2, 3, 8), torch.tensor([[5, -1, 63], [-1, -1, 0]])
    total = 0.0
    for x, kind in zip(seen.flatten(0, 1), kinds.flatten().tolist()):
        if kind >= 0:
            for word, words in zip(KINDS[kind].split(), (tuple(COLOURS), SHAPES)):
                scores = table.weight[Vocabulary().encode(" ".join(words))[1:-1]] @ (x / x.square().mean().sqrt())
                total -= scores.log_softmax(0)[words.index(word)].item() / 3
    assert grounding(seen, kinds, model).item() == pytest.approx(total, rel=1e-4)
    assert grounding(seen, torch.full_like(kinds, -1), model) == 0


def test_training_asks_more_than_measuring() -> None:
    task = Converse(WORLD, RECIPE, 1, patch=24)
    _, ids, _, turns, kinds = task.batch(0, 0)
    assert kinds.shape == (len(ids), task.places)
    for i, row in enumerate(turns):
        fewer = {one.text for one in interview(WORLD, i)[1]}
        assert len(fewer) < int(row.max()) <= 2 * len(fewer)


def test_prompts_end_where_the_answer_begins() -> None:
    task = Converse(WORLD, RECIPE, 1, patch=24)
    asked = [(image, [one]) for image, several in (interview(WORLD, i) for i in range(2)) for one in several]
    prompt, words = task.prompts(asked), Vocabulary()
    for (_, (one,)), ids, mask in zip(asked, prompt["input_ids"], prompt["attention_mask"]):
        kept = ids[mask.bool()]
        assert kept[0] == words.START
        assert (kept[1 : 1 + task.places] == len(words)).all()
        assert " ".join(words.words[i] for i in kept[1 + task.places :].tolist()) == one.text
        assert mask.diff().min() >= 0


def test_suspicions_are_of_what_the_bias_leads_to_expect() -> None:
    world = Shapes(size=48, things=(1, 4), bias=BIAS, split="test", count=400)
    expected = {second for _, second, _ in BIAS}
    asked = list(suspicions(world, "adversarial", 12))
    for number, (image, (one,)) in enumerate(asked):
        phrase = one.text.removeprefix("is there a ").removesuffix(" ?")
        assert one.answer == ("no" if number % 2 else "yes")
        kinds = [f"{f.colour} {f.shape}" for f in judge(image)]
        assert (phrase in kinds) is (one.answer == "yes")
        if one.answer == "no":
            assert phrase in expected
            assert any(first in kinds and second == phrase for first, second, _ in BIAS)
    with pytest.raises(ValueError, match="count=9 is more than the"):
        list(suspicions(replace(world, count=5), "adversarial", 9))
