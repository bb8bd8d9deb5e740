"""Outlines, layers and pictures against areas and distances worked out by hand or by brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.shapes.outlines import OUTLINES, polygon, whole
from regard.worlds.shapes.render import backdrop, layer, second_tone
from regard.worlds.shapes.sample import ShapesSample, covering_ellipses, tight_boxes
from regard.worlds.shapes.scene import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    COMPOSITES,
    PATTERNS,
    SHADE,
    TONES,
    Background,
    Pattern,
    Scene,
    Thing,
)


def thing(shape: str, centre: tuple[float, float] = (32, 32), size: float = 40, angle: float = 0) -> Thing:
    return Thing(shape, "red", centre, size, angle, parts=("blue", "green")[: len(COMPOSITES.get(shape, "w")) - 1])


AREAS = {
    "circle": math.pi,
    "square": 1.76**2,
    "triangle": 1.75,
    "star": 10 * 0.5 * 0.42 * math.sin(math.pi / 5),
    "cross": 4 * 0.32 * 2 - 0.64**2,
    "heart": 2 * 0.8**2 + math.pi * (0.8 * math.sqrt(0.5)) ** 2,
    "ring": math.pi * 0.75,
    "diamond": 2 * 0.58,
    "tree": math.pi * 0.7**2 + 0.4 * 0.6,
}


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize("angle", [0, 33])
def test_area(shape: str, angle: float) -> None:
    one = layer(thing(shape, angle=angle), (64, 64))
    covered = np.maximum.reduce(one.covers).sum() / 400
    assert covered == pytest.approx(AREAS[shape], rel=0.02)


@pytest.mark.parametrize("shape", CLASSES)
def test_whole_stays_in_its_frame_and_touches_it(shape: str) -> None:
    t = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    x, y = np.meshgrid(t, t)
    inside = whole(shape, x, y) <= 0
    assert not inside[(np.abs(x) > 1.01) | (np.abs(y) > 1.01)].any()
    assert max(np.abs(x[inside]).max(), np.abs(y[inside]).max()) > 0.87


@pytest.mark.parametrize(("shape", "part"), [(s, i) for s in CLASSES for i in range(len(OUTLINES[s]))])
def test_distance_outside_is_that_to_the_nearest_inside_point(shape: str, part: int) -> None:
    t = np.linspace(-1.6, 1.6, 161, dtype=np.float32)
    x, y = np.meshgrid(t, t)
    distance = OUTLINES[shape][part](x, y)
    inside = np.stack([x[distance <= 0], y[distance <= 0]], 1)
    points = np.stack([x[distance > 0], y[distance > 0]], 1)[::37]
    brute = np.sqrt(((points[:, None] - inside[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(distance[distance > 0][::37], brute, atol=0.04)


def test_polygon_by_hand() -> None:
    square = polygon((-1, -1), (1, -1), (1, 1), (-1, 1))
    x, y = np.array([0.0, 2, 2, 0.5], np.float32), np.array([0.0, 0, 2, 0], np.float32)
    np.testing.assert_allclose(square(x, y), [-1, 1, math.sqrt(2), -0.5], rtol=1e-6)


def test_every_pair_of_shapes_differs_by_a_fifth_at_32_pixels() -> None:
    masks = {
        s: layer(thing(s, (16, 16), 14), (32, 32)).full(layer(thing(s, (16, 16), 14), (32, 32)).mask, (32, 32))
        for s in CLASSES
    }
    for a, b in itertools.combinations(masks, 2):
        assert (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum() < 0.85, (a, b)


def test_colours_are_far_apart_also_in_their_shade_and_tones_are_grey() -> None:
    values = np.array([*COLOURS.values()])
    assert all(np.linalg.norm(a - b) > 0.35 for a, b in itertools.combinations(values, 2))
    assert (np.ptp(values * SHADE, 1) > 0.25).all()
    assert min(abs(a - b) for a, b in itertools.combinations(TONES.values(), 2)) > 0.3


def test_a_turned_thing_is_the_rotated_one() -> None:
    upright, turned = (layer(thing("heart", angle=a), (64, 64)) for a in (0, 90))
    masks = [one.full(one.mask, (64, 64)) for one in (upright, turned)]
    assert (np.rot90(masks[0], -1) == masks[1]).mean() > 0.999


@pytest.mark.parametrize("shape", CLASSES)
def test_the_window_cuts_nothing_off_and_the_edge_of_the_picture_does(shape: str) -> None:
    big = layer(thing(shape, angle=40), (200, 200))
    assert (big.window[0].stop, big.window[1].stop) < (70, 70)
    rim = np.ones_like(big.mask)
    rim[1:-1, 1:-1] = False
    assert not big.mask[rim].any()
    cut = layer(thing(shape, centre=(0, 32)), (64, 64))
    assert cut.window[1].start == 0
    assert layer(thing(shape, centre=(-90, 32)), (64, 64)).mask.size == 0


def test_a_half_covered_pixel_is_half_the_colour() -> None:
    scene = Scene((64, 64), Background(), (Thing("square", "red", (32.5, 32), 25 / 0.88),))
    image = ShapesSample.of(scene).image
    np.testing.assert_allclose(image[:, 32, 32], COLOURS["red"], atol=1e-6)
    np.testing.assert_allclose(image[:, 32, 2], TONES["white"], atol=1e-6)
    scene = Scene((64, 64), Background(), (Thing("square", "red", (32, 32), 25 / 0.88),))
    middle = (np.array(COLOURS["red"]) + TONES["white"]) / 2
    np.testing.assert_allclose(ShapesSample.of(scene).image[:, 32, 19], middle, atol=1e-4)


@pytest.mark.parametrize(("kind", "share"), [("striped", 0.5), ("checked", 0.5), ("dotted", math.pi * 0.32**2)])
def test_patterns_share_and_period(kind: str, share: float) -> None:
    x, y = np.meshgrid(np.arange(400) / 100, np.arange(400) / 100)
    tone = second_tone(Pattern(kind, period=0.25, angle=0), x, y, 400.0)
    assert tone.mean() == pytest.approx(share, abs=0.02)
    np.testing.assert_allclose(tone[:, :-50], tone[:, 50:], atol=1e-5)
    assert np.abs(tone[:, :-25] - tone[:, 25:]).max() > 0.9


def test_pattern_uses_the_second_colour_or_a_shade() -> None:
    for second, expected in ((None, np.array(COLOURS["red"]) * SHADE), ("blue", np.array(COLOURS["blue"]))):
        one = layer(Thing("square", "red", (32, 32), 50, pattern=Pattern("striped", second=second)), (64, 64))
        assert (np.abs(one.colours[0] - expected).max(-1) < 1e-5).mean() > 0.3


@pytest.mark.parametrize("kind", BACKGROUNDS)
@pytest.mark.parametrize("tone", TONES)
def test_backgrounds_keep_their_tone(kind: str, tone: str) -> None:
    grey = backdrop(Background(kind, tone, 30, 5), (48, 80))
    assert grey.shape == (48, 80)
    assert abs(grey.mean() - TONES[tone]) < 0.06
    assert (grey.std() > 0.01) == (kind != "plain")


def test_ellipses_and_boxes_by_hand() -> None:
    mask = torch.zeros(2, 20, 30, dtype=torch.bool)
    mask[0, 5:8, 10:21] = True
    assert tight_boxes(mask).tolist() == [[10, 5, 21, 8], [0, 0, 0, 0]]
    x, y, a, b, turn = covering_ellipses(mask)[0].tolist()
    assert (x, y) == (15.5, 6.5)
    assert a / b == pytest.approx(11 / 3, rel=1e-2)
    assert abs(turn) % 180 == pytest.approx(0, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(CLASSES), st.floats(-180, 180), st.floats(12, 60), st.sampled_from(PATTERNS))
def test_a_lone_thing_is_seen_whole(shape: str, angle: float, size: float, pattern: str) -> None:
    one = Thing(
        shape, "red", (48, 40), size, angle, Pattern(pattern), ("blue", "green")[: len(COMPOSITES.get(shape, "w")) - 1]
    )
    sample = ShapesSample.of(Scene((80, 96), things=(one,)))
    assert torch.equal(sample.visible, sample.amodal)
    assert sample.visible_share.tolist() == [1.0]
    assert torch.isfinite(sample.image).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Thing("blob", "red", (0, 0), 5), "shape='blob'"),
        (lambda: Thing("circle", "mauve", (0, 0), 5), "colour='mauve'"),
        (lambda: Thing("circle", "red", (0, 0), 0), "size=0"),
        (lambda: Thing("tree", "red", (0, 0), 5), r"parts=\(\) must be 1"),
        (lambda: Pattern("wavy"), "kind='wavy'"),
        (lambda: Pattern(period=0), "period=0"),
        (lambda: Pattern(second="mauve"), "second='mauve'"),
        (lambda: Background("sky"), "kind='sky'"),
        (lambda: Background(tone="mauve"), "tone='mauve'"),
        (lambda: Scene((0, 5)), "size="),
    ],
)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
