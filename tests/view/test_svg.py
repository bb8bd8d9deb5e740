"""Scales, ticks, labels that keep clear of each other, and images that decode."""

import base64
import io
import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regard.view import svg
from regard.view.svg import Chart, linear, log_ticks, logarithmic, number, place_labels, png, spread, text_width, ticks

reals = st.floats(0.001, 1000)


def test_png_decodes_to_the_same_pixels() -> None:
    rows = [[(i * 40, j * 50, 255 - i) for j in range(5)] for i in range(3)]
    head, body = png(rows).split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert image.size == (5, 3)
    assert [[image.getpixel((j, i)) for j in range(5)] for i in range(3)] == rows


def test_scales() -> None:
    assert linear(2, 4, 100, 0)(3) == 50
    assert logarithmic(1, 100, 0, 10)(10) == pytest.approx(5)


@settings(deadline=None)
@given(reals, reals)
def test_ticks_are_round_within_and_evenly_spaced(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b) + 0.01
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-6 <= tick <= high + 1e-6 for tick in found)
    steps = {round(after - before, 6) for before, after in pairwise(found)}
    assert max(steps) - min(steps) <= 1e-5 * max(1, high)


@settings(deadline=None)
@given(reals, st.floats(1.5, 1e5))
def test_log_ticks_are_within_and_few(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert len(found) <= 10
    assert all(low <= tick <= low * ratio for tick in found)
    assert found == sorted(found)


@settings(deadline=None)
@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_spread_keeps_order_distance_and_bounds(wanted: list[float]) -> None:
    placed = spread(wanted, 14, 0, 300)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = [placed[b] - placed[a] for a, b in pairwise(order)]
    assert all(gap >= 14 - 1e-6 for gap in gaps)
    assert all(-1e-6 <= place <= 300 + 1e-6 for place in placed)


def test_spread_leaves_alone_what_is_apart() -> None:
    assert spread([10, 100, 50], 14, 0, 300) == [10, 100, 50]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(60, 500), st.floats(60, 300)), min_size=2, max_size=9))
def test_labels_stay_inside_and_off_each_other(points: list[tuple[float, float]]) -> None:
    labels = [f"layer-{i}" for i in range(len(points))]
    places = place_labels(points, labels, (0, 0, 600, 400), [])
    boxes = [(x, y - 11, x + text_width(label), y + 3) for (x, y), label in zip(places, labels)]
    for i, box in enumerate(boxes):
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= 600
        assert box[3] <= 400
        assert not any(svg._overlap(box, other) for other in boxes[:i])


def test_a_lone_label_is_beside_its_point() -> None:
    ((x, y),) = place_labels([(100, 100)], ["layer"], (0, 0, 600, 400), [])
    assert math.dist((x, y), (100, 100)) < 20


def test_text_is_escaped_and_the_chart_is_xml() -> None:
    chart = Chart(10, 10, "a < b & c")
    chart.text(1, 2, "<script>")
    for shape in ("circle", "square", "diamond", "triangle", "star"):
        chart.mark(5, 5, 2, shape, "mark", tip="'\"&")
    root = ET.fromstring(str(chart))
    assert root.attrib["aria-label"] == "a < b & c"
    assert root[0].text == "<script>"
    assert all(child[0].text == "'\"&" for child in root[1:])


def test_numbers() -> None:
    assert [number(v) for v in (0.1, 97.5, 3136, 1e6)] == ["0.1", "97.5", "3\u202f136", "1e+06"]
