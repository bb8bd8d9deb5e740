"""What the small models are trained on: pictures with sentences and with questions."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regard.hosts.small import llava, painter
from regard.train.classify import Classify, ClassifyPatches
from regard.train.converse import IGNORE, Converse, interview, pointing, suspicions, taking_turns
from regard.train.loop import Recipe
from regard.train.match import Match, pixels
from regard.train.naming import naming, what_is_where
from regard.train.paint import Paint, captioned
from regard.train.recipes.shapes_vlm import BIAS
from regard.worlds.shapes.judge import judge, satisfies
from regard.worlds.shapes.labelled import located_shapes
from regard.worlds.shapes.language import Vocabulary, read_caption
from regard.worlds.shapes.scene import CLASSES
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
    images, _, times, there, counts = task.batch(1, 4)
    assert images.shape == (3, 3, 48, 48)
    assert torch.equal(images[1], WORLD[(100 + 4) * 3 + 1].image)
    words = Vocabulary()
    assert sorted((3 * times).int().tolist()) == [0, 1, 2]
    assert torch.equal(there[1], what_is_where(WORLD[(100 + 4) * 3 + 1], 2)[:2])
    assert counts.tolist() == [0.0] * 3
    said = [words.decode(row) for step in range(30) for row in task.batch(0, step)[1]]
    assert 0.15 < said.count("") / len(said) < 0.45
    assert all(read_caption(text) for text in said if text)


def test_pictures_fill_up_within_the_first_third() -> None:
    task = Paint(WORLD, replace(RECIPE, epochs=3), steps=40, crowded=1.0)
    full = replace(WORLD, things=(3, 3))
    first, late = task.batch(0, 0)[0], task.batch(1, 0)[0]
    assert torch.equal(first, torch.stack([WORLD[i].image for i in range(3)]))
    assert torch.equal(late, torch.stack([full[120 + i].image for i in range(3)]))
    filled = []
    for i in (i for i in range(120) if len(WORLD[i].scene.things) < 3):
        image = task.batch(0, i // 3)[0][i % 3]
        filled.append(torch.equal(image, full[i].image))
        assert filled[-1] or torch.equal(image, WORLD[i].image)
    half = len(filled) // 2
    assert 0.1 < sum(filled[:half]) / half < 0.4
    assert 0.6 < sum(filled[half:]) / (len(filled) - half) < 0.9


def test_batches_of_an_epoch_differ_and_come_again() -> None:
    for task in (Paint(WORLD, RECIPE, 2), Match(WORLD, RECIPE, 2, patch=16), Converse(WORLD, RECIPE, 2, patch=16)):
        first, second, again = task.batch(0, 0), task.batch(0, 1), task.batch(0, 0)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first[0], second[0])


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


def test_noisier_times_are_drawn_more_often_and_evenly() -> None:
    for noisy in (1.0, 2.0):
        times = Paint(WORLD, replace(RECIPE, batch_size=50), 1, noisy=noisy).batch(0, 0)[2].sort().values
        shares = torch.arange(50) / 50
        assert (shares.pow(1 / noisy) <= times).all()
        assert (times < (shares + 1 / 50).pow(1 / noisy)).all()
    for wrong in (
        "noisy=0.0 must be positive",
        "named=-1.0 must not be negative",
        "crowded=1.5 must lie between 0 and 1",
    ):
        name, value = wrong.split()[0].split("=")
        with pytest.raises(ValueError, match=re.escape(wrong)):
            Paint(WORLD, RECIPE, 1, **{name: float(value)})


def test_painting_is_denoising_and_naming_that_fades() -> None:
    torch.manual_seed(0)
    model = painter(Vocabulary().words, 32, (8, 16), 8, 24)
    world = replace(WORLD, size=32)
    task = Paint(world, replace(RECIPE, epochs=2), steps=3, named=0.5, noisy=2.0)
    assert [task.batch(epoch, step)[-1][0].item() for epoch in (0, 1) for step in range(3)] == [0.5, 0.25, 0, 0, 0, 0]
    images, ids, times, there, counts = task.batch(0, 1)
    torch.manual_seed(1)
    loss = task.loss(model, (images, ids, times, there, counts))
    torch.manual_seed(1)
    noise, t = torch.randn(3, 12, 16, 16), (1000 * times).long()
    alpha = model.scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
    x = model.encode(images)
    painted, seen = model(alpha * x + (1 - alpha**2).sqrt() * noise, t, ids)
    error = (painted - (alpha * noise - (1 - alpha**2).sqrt() * x)).square().mean()
    named = naming(seen, there, model.words).mean()
    assert named > 0
    torch.testing.assert_close(loss, error + 0.25 * named)


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
    task, words = Converse(WORLD, RECIPE, 1, patch=16), Vocabulary()
    asked = [interview(WORLD, i) for i in range(4)]
    images, ids, targets, turns, _ = task.sequences(asked)
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
    task = Converse(WORLD, RECIPE, 1, patch=16)
    torch.manual_seed(0)
    model: Any = llava(len(Vocabulary()), 48, 16, (32, 1), 32, 2, 256).double().eval()
    image, several = interview(WORLD, 0)
    images, ids, targets, turns, _ = task.sequences([(image, several)])
    mask, positions = taking_turns(turns)
    places = torch.arange(ids.shape[1])
    for i, j in itertools.product(range(0, ids.shape[1], 3), repeat=2):
        assert mask[0, 0, i, j] == (j <= i and turns[0, j].item() in (0, turns[0, i].item()))
    seen = pixels(images).double()
    together = model(input_ids=ids, pixel_values=seen, attention_mask=mask, position_ids=positions).logits[0]
    for turn, one in enumerate(several, 1):
        _, alone, expected, _, _ = task.sequences([(image, [one])])
        apart = model(input_ids=alone, pixel_values=seen).logits[0]
        here, there = places[(turns[0] == turn) & (targets[0] != IGNORE)], places[expected[0] != IGNORE]
        torch.testing.assert_close(together[here], apart[there])


def test_the_end_of_a_question_says_what_it_is_about() -> None:
    task, words = Converse(WORLD, RECIPE, 1, patch=16), Vocabulary()
    asked = [interview(WORLD, i) for i in range(4)]
    _, ids, _, _, about = task.sequences(asked)
    for (_, several), row, marks in zip(asked, ids, about):
        short = [one for one in several if one.kind != "description"]
        assert all(words.words[i] == "?" for i in row[marks > 0].tolist())
        assert [
            tuple(i for i in range(8) if mark >> (i + 1) & 1) if mark != 1 else () for mark in marks[marks > 0].tolist()
        ] == [tuple(sorted(one.about)) for one in short]


def test_pointing_is_the_share_of_attention_to_what_is_asked_about() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 8, 6)
    things = torch.tensor([[0, -1, 2, 0], [-1, -1, 1, -1]])
    about = torch.zeros(2, 8, dtype=torch.long)
    # Thing 0; nothing; things 1 and 2, of which 1 is in sight; thing 3, which covers no place.
    about[0, 5], about[0, 7], about[1, 6], about[1, 7] = 0b10, 0b1, 0b1100, 0b10000
    x = states / states.square().mean(-1, keepdim=True).sqrt()
    lost = []
    for row, end, places in ((0, 5, [1, 4]), (0, 7, [0]), (1, 6, [3])):
        share = (x[row, :5] @ x[row, end] / 6**0.5).softmax(0)
        lost.append(-share[places].sum().log())
    torch.testing.assert_close(pointing(states, about, things), torch.stack(lost).mean())
    assert pointing(states, torch.zeros_like(about), things) == 0


def test_training_asks_more_than_measuring() -> None:
    task = Converse(WORLD, RECIPE, 1, patch=16)
    _, ids, _, turns, _, there, things = task.batch(0, 0)
    assert there.shape == (len(ids), 4, task.places)
    assert things.shape == (len(ids), task.places)
    for i, row in enumerate(turns):
        fewer = {one.text for one in interview(WORLD, i)[1]}
        assert len(fewer) < int(row.max()) <= 2 * len(fewer)


def test_prompts_end_where_the_answer_begins() -> None:
    task = Converse(WORLD, RECIPE, 1, patch=16)
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
