"""The judge follows every thing through a film, hears its tone, and sees what is removed, recoloured, moved or reshaped."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.worlds.audio import LOUDNESS, RATE, TONES, chorus
from regard.worlds.clips import HIDDEN, Clip, Clips
from regard.worlds.clips_judge import heard, judge_clip, named, shows
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import CLASSES, COLOURS, SHAPES, Thing

CLIPS = 6


@cache
def clip(i: int) -> Clip:
    return Clips(split="test", frames=6, seed=5)[i]


def noisy(frames: Tensor, seed: int) -> Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
    return (frames + 0.03 * noise).clamp(0, 1)


def painted(of: Clip, number: int, change: Callable[[Thing], Thing | None]) -> Tensor:
    """The frames with one thing changed or left out."""
    frames = []
    for sample in of.samples:
        things = [change(thing) if i == number else thing for i, thing in enumerate(sample.scene.things)]
        scene = replace(sample.scene, things=tuple(thing for thing in things if thing is not None))
        frames.append(ShapesSample.of(scene).image)
    return torch.stack(frames)


@pytest.mark.parametrize("spoil", [lambda frames, i: frames, noisy])
def test_things_are_named_and_placed_in_every_frame_that_shows_them(spoil) -> None:
    right, boxes, away, told = [], [], [], []
    for i in range(CLIPS):
        truth = clip(i)
        found = {(one.colour, one.shape): one for one in judge_clip(spoil(truth.frames, i))}
        for j, thing in enumerate(truth.things):
            share = truth.visible_share[:, j]
            one = found.get((thing.colour, thing.shape))
            for k in (share >= HIDDEN).nonzero()[:, 0].tolist():
                held = one is not None and bool(one.masks[k].any())
                right.append(held)
                if one is not None and held:
                    boxes.append(bool((one.boxes[k] - truth.boxes[k, j]).abs().max() <= 4))
                    away.append((one.centres[k] - truth.centres[k, j]).norm().item())
            if one is not None:
                clear = (share < HIDDEN / 2) | (share > 2 * HIDDEN)
                told += (one.hidden == (share < HIDDEN))[clear].tolist()
    assert len(right) > 80
    assert np.mean(right) >= 0.995
    assert np.mean(boxes) >= 0.97
    assert np.nanpercentile(away, 90) < 1.5
    assert np.mean(told) >= 0.98


def test_its_own_frames_show_a_clip_and_changed_ones_do_not() -> None:
    for i in range(2):
        truth = clip(i)
        assert shows(truth.frames, truth)
        shared = truth.visible_share.mean(0)
        number = int(shared[: len(truth.things)].argmax())
        thing = truth.things[number]
        unused = next(c for c in COLOURS if c not in [one.colour for one in truth.things])
        other = SHAPES[(SHAPES.index(thing.shape) + 4) % len(SHAPES)]
        wrong = {
            "removed": painted(truth, number, lambda one: None),
            "recoloured": painted(truth, number, lambda one, to=unused: replace(one, colour=to)),
            "reshaped": painted(truth, number, lambda one, to=other: replace(one, shape=to)),
            "moved": painted(truth, number, lambda one: replace(one, centre=(64 - one.centre[0], 64 - one.centre[1]))),
        }
        if (truth.centres[:, number] - 32).norm(dim=1).min() < 8:
            del wrong["moved"]
        for name, frames in wrong.items():
            facts = dict(shows(frames, truth).facts)
            mine = [holds for fact, holds in facts.items() if fact.startswith(f"a {thing.kind} in")]
            assert mine, name
            assert not any(mine), name


def test_a_frame_from_elsewhere_is_told() -> None:
    truth = clip(0)
    frames = truth.frames.clone()
    frames[2] = frames[2].flip(2)
    facts = shows(frames, truth).facts
    wrong = [fact for fact, holds in facts if not holds]
    assert wrong
    assert all(fact.endswith("in frame 2") for fact in wrong)


def test_tones_are_heard_in_their_frames() -> None:
    for i in range(CLIPS):
        truth = clip(i)
        shapes = [thing.shape for thing in truth.things]
        if len(set(shapes)) == len(shapes):
            generator = torch.Generator().manual_seed(i)
            sound = truth.audio + 0.03 * torch.randn(truth.audio.shape, generator=generator)
            for audio in (truth.audio, sound):
                assert torch.equal(heard(audio, 6), truth.tags)
    rng = np.random.default_rng(0)
    sounding = rng.random((20, len(CLASSES))) < 0.4
    audio = chorus(CLASSES, sounding, RATE, rng.uniform(0, 2 * np.pi, len(CLASSES)))
    assert torch.equal(heard(audio, 20), torch.from_numpy(sounding))


def test_a_tone_between_those_of_the_shapes_or_a_faint_one_is_not_heard() -> None:
    time = torch.arange(RATE) / RATE
    faint = 0.2 * LOUDNESS * torch.sin(2 * torch.pi * TONES["star"] * time)
    assert not heard(faint, 5).any()
    assert not heard(torch.zeros(RATE), 5).any()


def test_no_third_colour_is_named_at_a_seam() -> None:
    image = np.zeros((3, 20, 20), np.float32) + 0.06
    image[:, 4:16, 4:10] = np.array(COLOURS["red"])[:, None, None]
    image[:, 4:16, 10:16] = np.array(COLOURS["blue"])[:, None, None]
    image[:, 4:16, 9:11] = image[:, 4:16, 8:12].mean(2, keepdims=True)
    names = {list(COLOURS)[c] for c in np.unique(named(image)) if c >= 0}
    assert names == {"red", "blue"}


def test_nothing_is_found_in_garbage() -> None:
    rng = np.random.default_rng(0)
    for image in (rng.uniform(0, 1, (2, 3, 48, 48)), np.full((2, 3, 48, 48), 0.5), np.zeros((2, 3, 48, 48))):
        assert judge_clip(torch.from_numpy(image).float()) == []


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 3, 64, 64\) must be \(t, 3, h, w\)"):
        judge_clip(torch.zeros(0, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\) must be \(6, 3, 64, 64\)"):
        shows(torch.zeros(2, 3, 64, 64), clip(0))
    with pytest.raises(ValueError, match="that 3 frames share evenly"):
        heard(torch.zeros(1600), 3)
    with pytest.raises(ValueError, match="frames=100 of 160 samples each are too short"):
        heard(torch.zeros(16000), 100)
