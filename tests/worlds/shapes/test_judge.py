"""The judge reads rendered scenes right, corrupted ones too, and says nothing about garbage."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import ndimage
from torch import Tensor

from regard.worlds.shapes.facts import Found, truth
from regard.worlds.shapes.fit import fit
from regard.worlds.shapes.judge import hue_and_chroma, judge, judge_tone, satisfies
from regard.worlds.shapes.language import caption, listing
from regard.worlds.shapes.outlines import whole
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, SHAPES, Scene, Thing
from regard.worlds.shapes.world import Shapes


def noisy(image: Tensor, seed: int) -> Tensor:
    noise = np.random.default_rng(seed).normal(0, 0.05, tuple(image.shape)).astype(np.float32)
    return (image + torch.from_numpy(noise)).clamp(0, 1)


def blurred(image: Tensor, seed: int) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, 0.5, 0.5)))


def clean(image: Tensor, seed: int) -> Tensor:
    return image


def kinds(found: list[Found]) -> list[tuple[str, str]]:
    return sorted((f.colour, f.shape) for f in found)


@pytest.mark.parametrize("change", [clean, noisy, blurred])
def test_things_are_read_right(change: Callable[[Tensor, int], Tensor]) -> None:
    world = Shapes(overlap=0.2, split="test", seed=3)
    right, sizes, sides, areas = [], [], [], []
    for i in range(200):
        expected, found = truth(world[i]), judge(change(world[i].image, i))
        right.append(kinds(expected) == kinds(found))
        if not right[-1] or len(set(kinds(found))) < len(found):
            continue
        for thing in expected:
            other = next(f for f in found if (f.colour, f.shape) == (thing.colour, thing.shape))
            sizes.append(other.size == thing.size)
            sides.append({expected[j].colour for j in thing.over} == {found[j].colour for j in other.over})
            areas.append(float((thing.mask & other.mask).sum() / (thing.mask | other.mask).sum()))
            assert np.abs(np.array(thing.box) - other.box).max() <= 4
            assert np.abs(np.array(thing.centre) - other.centre).max() <= 3
    assert np.mean(right) >= 0.995
    assert np.mean(sizes) >= 0.995
    assert np.mean(sides) >= 0.95
    assert np.mean(areas) >= 0.92


def test_patterns_and_textured_backgrounds() -> None:
    world = Shapes(things=(1, 2), patterns=PATTERNS, backgrounds=BACKGROUNDS)
    right, patterns = [], []
    for i in range(100):
        expected, found = truth(world[i]), judge(noisy(world[i].image, i))
        right.append(kinds(expected) == kinds(found))
        if right[-1]:
            patterns += [
                (f.shape, f.colour, f.pattern) in [(e.shape, e.colour, e.pattern) for e in expected] for f in found
            ]
    assert np.mean(right) >= 0.97
    assert np.mean(patterns) >= 0.95


@pytest.mark.parametrize(("size", "share"), [(32, 0.9), (128, 0.98), (200, 0.98)])
def test_other_sizes(size: int, share: float) -> None:
    world = Shapes(size=size, overlap=0.1)
    right = []
    for i in range(50):
        found = judge(world[i].image)
        right.append(kinds(found) == kinds(truth(world[i])))
        assert all(f.mask.shape == (size, size) for f in found)
    assert np.mean(right) >= share


def test_composites_are_read_where_they_are_looked_for() -> None:
    world = Shapes(composites=True, things=(1, 2), sizes=(0.3, 0.46))
    right = [kinds(judge(world[i].image, CLASSES)) == kinds(truth(world[i])) for i in range(60)]
    assert np.mean(right) >= 0.93
    house = ShapesSample.of(
        Scene((64, 64), things=(Thing("house", "red", (32, 32), 26, parts=("blue", "green")),))
    ).image
    assert satisfies(house, "a red house")
    assert not satisfies(house, "a blue house")
    assert "house" not in [f.shape for f in judge(house)]


@pytest.mark.parametrize("seed", range(12))
def test_its_own_captions_are_satisfied_and_changed_ones_are_not(seed: int) -> None:
    sample = Shapes(things=(2, 3), seed=seed)[0]
    found, tone = truth(sample), sample.scene.background.tone
    said = caption(np.random.default_rng(seed), found, ("colour", "size"), tone)
    assert judge_tone(sample.image) == tone
    assert satisfies(sample.image, said)
    assert satisfies(sample.image, str(listing(found)))
    verdict = satisfies(sample.image.roll(1, 0), str(listing(found)))
    assert not verdict
    assert verdict.score < 1


def test_a_spot_and_a_line_change_nothing() -> None:
    sample = Shapes(things=(2, 2))[4]
    image = sample.image.clone()
    corner = torch.tensor([[0.9], [0.1], [0.1]])
    image[:, 0, 0:3] = corner
    image[:, 63, :] = 0.3
    assert kinds(judge(image)) == kinds(truth(sample))


def garbage() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    ramp = np.stack([np.broadcast_to(np.linspace(0, 1, 64), (64, 64)), np.broadcast_to(np.linspace(1, 0, 64)[:, None], (64, 64)),
                     np.full((64, 64), 0.5)])  # fmt: skip
    waves = ndimage.gaussian_filter(rng.normal(0, 1, (3, 64, 64)), (0, 3, 3))
    images = {
        "uniform": rng.uniform(0, 1, (3, 64, 64)),
        "normal": 0.5 + rng.normal(0, 0.2, (3, 64, 64)).clip(-0.5, 0.5),
        "waves": (waves - waves.min()) / np.ptp(waves),
        "ramp": ramp,
        "grey": np.full((3, 64, 64), 0.5),
        "red": np.broadcast_to(np.array(COLOURS["red"])[:, None, None], (3, 64, 64)),
        "black": np.zeros((3, 20, 30)),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(image)).float() for name, image in images.items()}


@pytest.mark.parametrize("name", garbage())
def test_nothing_is_found_in_garbage(name: str) -> None:
    assert judge(garbage()[name]) == []
    assert not satisfies(garbage()[name], "a red circle")


def test_grey_does_not_change_the_hue() -> None:
    rng = np.random.default_rng(0)
    colour, share = rng.uniform(0, 1, (3, 5, 5)), rng.uniform(0.1, 1, (5, 5))
    hue, chroma = hue_and_chroma(colour)
    mixed, weaker = hue_and_chroma(share * colour + (1 - share) * 0.4)
    np.testing.assert_allclose(mixed, hue, atol=1e-6)
    np.testing.assert_allclose(weaker, share * chroma, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fit_finds_place_size_and_turn_also_of_a_covered_thing(shape: str) -> None:
    y, x = np.mgrid[:64, :64] + 0.5
    cos, sin = np.cos(np.radians(12)), np.sin(np.radians(12))
    u, v = (x - 30) / 12, (y - 35) / 12
    region = whole(shape, cos * u + sin * v, cos * v - sin * u) * 12 < 0.3
    for covered in (x > 99, x > 37):
        found = fit(region & ~covered, covered & (np.hypot(x - 45, y - 35) < 12), SHAPES)
        assert found.shape == shape
        assert np.hypot(found.centre[0] - 30, found.centre[1] - 35) < 2
        assert found.size == pytest.approx(24, rel=0.12)


def test_bad_input() -> None:
    with pytest.raises((ValueError, TypeCheckError), match="image"):
        judge(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="shapes='blob'"):
        judge(torch.zeros(3, 64, 64), ("blob",))
    with pytest.raises(ValueError, match="no phrase"):
        satisfies(torch.zeros(3, 64, 64), "a mauve circle")
    assert judge_tone(torch.full((3, 8, 8), 0.5)) == "grey"
