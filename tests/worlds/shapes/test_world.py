"""Truths of whole scenes, splits, bias, what is held out, and requests that cannot be met."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.shapes.render import layer, render
from regard.worlds.shapes.scene import BACKGROUNDS, CLASSES, COLOURS, PATTERNS
from regard.worlds.shapes.world import Shapes

RICH = Shapes(
    things=(2, 5), overlap=0.3, visible=0.6, patterns=PATTERNS, backgrounds=BACKGROUNDS, composites=True, tilt=90
)
indices = st.integers(0, 9_999)
quick = settings(max_examples=25, deadline=None)


@quick
@given(indices)
def test_visible_masks_partition_and_amodal_masks_contain_them(index: int) -> None:
    sample = RICH[index]
    together = torch.cat([(sample.index == 0)[None], sample.visible]).sum(0)
    assert (together == 1).all()
    assert not (sample.visible & ~sample.amodal).any()
    assert torch.equal(sample.visible.any(0), sample.amodal.any(0))
    assert sample.visible_share.min() >= RICH.visible


@quick
@given(indices)
def test_the_last_painted_thing_is_seen_where_several_are(index: int) -> None:
    sample = RICH[index]
    n = len(sample.scene.things)
    top = (sample.amodal * torch.arange(1, n + 1).view(-1, 1, 1)).amax(0)
    assert torch.equal(top, sample.index)
    assert torch.equal(sample.depth.unique().sort().values, (1 - sample.index.unique() / (n + 1)).sort().values)
    for i in range(n):
        for j in range(n):
            assert sample.occludes[i, j] == (i > j and bool((sample.amodal[i] & sample.amodal[j]).any()))


@quick
@given(indices)
def test_boxes_are_tight_and_ellipses_cover(index: int) -> None:
    sample = RICH[index]
    for masks, boxes in ((sample.visible, sample.boxes), (sample.amodal, sample.amodal_boxes)):
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    for mask, (x, y, a, b, turn) in zip(sample.amodal, sample.ellipses.tolist()):
        ys, xs = mask.nonzero(as_tuple=True)
        t = np.radians(turn)
        dx, dy = xs + 0.5 - x, ys + 0.5 - y
        u, v = np.cos(t) * dx + np.sin(t) * dy, np.cos(t) * dy - np.sin(t) * dx
        reach = (u / a) ** 2 + (v / b) ** 2
        assert a >= b
        assert 0.9 < reach.max() <= 1.0001


@quick
@given(indices)
def test_parts_partition_what_is_seen(index: int) -> None:
    sample = RICH[index]
    for thing, seen, parts in zip(sample.scene.things, sample.visible, sample.parts):
        assert tuple(parts) == thing.part_names
        assert torch.equal(torch.stack(list(parts.values())).sum(0), seen.long())
        name = thing.part_names[0]
        if thing.pattern.kind == "solid" and parts[name].any():
            middle = sample.image[:, parts[name]].median(1).values
            assert (middle - torch.tensor(COLOURS[thing.colour])).abs().max() < 0.02


@quick
@given(indices)
def test_labels_are_those_of_the_scene(index: int) -> None:
    sample = RICH[index]
    for i, thing in enumerate(sample.scene.things):
        assert CLASSES[sample.shapes[i]] == thing.shape
        assert list(COLOURS)[sample.colours[i]] == thing.colour
        assert PATTERNS[sample.patterns[i]] == thing.pattern.kind
        assert sample.large[i] == (thing.size >= 0.3 * 64)
        assert not 0.27 * 64 < thing.size < 0.33 * 64
        assert (sample.semantic[sample.visible[i]] == sample.shapes[i] + 1).all()
    assert ((sample.semantic == 0) == (sample.index == 0)).all()


@quick
@given(indices)
def test_overlaps_are_small_and_never_of_one_colour(index: int) -> None:
    sample = RICH[index]
    things, areas = sample.scene.things, sample.amodal.flatten(1).sum(1)
    for i in range(len(things)):
        for j in range(i):
            both = (sample.amodal[i] & sample.amodal[j]).sum()
            assert both <= RICH.overlap * min(areas[i], areas[j])
            if both:
                assert {things[i].colour, *things[i].parts}.isdisjoint({things[j].colour, *things[j].parts})


def test_without_overlap_nothing_is_hidden() -> None:
    world = Shapes(things=(4, 4))
    for i in range(20):
        assert not world[i].occludes.any()
        assert len(world[i].scene.things) == 4


def test_distance_to_a_circle() -> None:
    sample = Shapes(shapes=("circle",), things=(1, 1))[0]
    (thing,) = sample.scene.things
    y, x = np.mgrid[:64, :64] + 0.5
    exact = np.abs(np.hypot(x - thing.centre[0], y - thing.centre[1]) - thing.size / 2)
    np.testing.assert_allclose(sample.distance, exact, atol=0.35)


def test_the_same_in_any_order() -> None:
    digest = hashlib.sha256(b"".join(RICH[i].image.numpy().tobytes() for i in (5, 0, 3))).hexdigest()
    images = {i: RICH[i].image.numpy().tobytes() for i in range(6)}
    assert hashlib.sha256(b"".join(images[i] for i in (5, 0, 3))).hexdigest() == digest


def test_a_sample_can_be_rendered_again_from_its_scene() -> None:
    sample = RICH[7]
    image, index = render(sample.scene, tuple(layer(t, sample.scene.size) for t in sample.scene.things))
    assert np.array_equal(image, sample.image)
    assert np.array_equal(index, sample.index)


def test_splits_share_no_picture() -> None:
    world = replace(RICH, size=32)
    seen = [{replace(world, split=s)[i].image.numpy().tobytes() for i in range(60)} for s in ("train", "val", "test")]  # type: ignore[arg-type]
    assert all(len(s) == 60 for s in seen)
    assert len(set.union(*seen)) == 180


def test_held_out_kinds_are_in_every_test_scene_and_in_no_other() -> None:
    held = ("red circle", "blue star")
    for split, expected in (("train", False), ("val", False), ("test", True)):
        world = Shapes(split=split, hold_out=held, shapes=("circle", "star"), colours=("red", "blue"))  # type: ignore[arg-type]
        for i in range(60):
            assert any(t.kind in held for t in world[i].scene.things) == expected


def test_bias_is_the_conditional_probability() -> None:
    world = Shapes(things=(2, 2), bias=(("red circle", "blue square", 0.7), ("red circle", "green star", 0.2)),
                   shapes=("circle", "square", "star"), colours=("red", "blue", "green"))  # fmt: skip
    drawn = [world.draw_kinds(world.rng(i)) for i in range(6000)]
    after = Counter(b for a, b in drawn if a == ("red", "circle"))
    total = sum(after.values())
    assert after["blue", "square"] / total == pytest.approx(0.7, abs=0.05)
    assert after["green", "star"] / total == pytest.approx(0.2, abs=0.05)
    free = Counter(b for a, b in drawn if a != ("red", "circle"))
    assert free["blue", "square"] / sum(free.values()) == pytest.approx(1 / 9, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"things": (20, 30)}, r"things=\(20, 30\) .* at most 12"),
        ({"things": (3, 2)}, r"things=\(3, 2\)"),
        ({"size": 16}, "size=16"),
        ({"shapes": ("blob",)}, "shapes='blob'"),
        ({"shapes": ()}, r"shapes=\(\)"),
        ({"sizes": (0.28, 0.32)}, "sizes="),
        ({"sizes": (0.4, 0.2)}, "sizes="),
        ({"overlap": 1.5}, "overlap=1.5"),
        ({"visible": -1}, "visible=-1"),
        ({"tilt": 200}, "tilt=200"),
        ({"hold_out": ("red",)}, "shape=''"),
        ({"hold_out": ("red circle",), "shapes": ("circle",), "colours": ("red",)}, "leaves nothing"),
        ({"hold_out": ("red circle",), "bias": (("blue star", "red circle", 0.5),)}, "leaves out"),
        ({"bias": (("blue star", "red circle", 1.5),)}, "probability"),
        ({"bias": (("blue star", "red circle", 0.7), ("blue star", "red star", 0.7))}, "more than 1"),
        ({"hold_out": ("red circle",), "split": "test", "things": (0, 2)}, "things="),
    ],
)
def test_impossible_requests(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes(**fields)


def test_a_crowd_that_passes_the_count_but_finds_no_place_says_so() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        [Shapes(things=(12, 12), sizes=(0.2, 0.2))[i] for i in range(20)]


def test_panels() -> None:
    for panel in RICH.panels(RICH[0]).values():
        assert isinstance(panel, torch.Tensor)
        assert panel.shape == (3, 64, 64)
        assert torch.equal(panel, panel.clamp(0, 1))
