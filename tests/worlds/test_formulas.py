"""Formulas: markup, tree and image agree, boxes hold the ink, and are where the tree says that they are."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.formulas import FAMILIES, Formula, Formulas, image_score, render
from regard.worlds.markup import (
    TOKENS,
    Fraction,
    Group,
    Root,
    Row,
    Scripts,
    Sign,
    compact,
    decode,
    equivalent,
    parse,
    spell,
)
from regard.worlds.world import SPLITS


@st.composite
def worlds(draw: st.DrawFn) -> Formulas:
    size, depth, longest = draw(st.integers(10, 24)), draw(st.integers(0, 3)), draw(st.integers(1, 40))
    return Formulas(
        seed=draw(st.integers(0, 2**32)),
        height=draw(st.integers(2 * size, 5 * size)),
        width=draw(st.integers(4 * size, 20 * size)),
        size=size,
        longest=longest,
        depth=depth,
        family=draw(st.sampled_from(FAMILIES)),
    )


def bounds(image: torch.Tensor) -> tuple[int, int, int, int]:
    ys, xs = (image[0] < 1).nonzero().T
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_markup_tokens_tree_and_image_agree(world: Formulas) -> None:
    sample = world[0]
    assert parse(sample.markup) == sample.tree
    assert sample.markup == " ".join(spell(sample.tree)) == " ".join(decode(sample.tokens))
    assert len(sample.tokens) - 2 <= world.longest
    assert sample.image.shape == (3, world.height, world.width)
    for spelling in (sample.markup, compact(spell(sample.tree))):
        assert torch.equal(render(spelling, world.height, world.width, world.size, world.family), sample.image)


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_all_ink_lies_in_boxes_and_every_box_holds_some(world: Formulas) -> None:
    sample = world[0]
    boxes = sample.boxes
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([world.width, world.height])).all()
    free = sample.image[0].clone()
    for box in boxes:
        x0, y0 = box[:2].floor().long().tolist()
        x1, y1 = box[2:].ceil().long().tolist()
        assert (sample.image[0, y0:y1, x0:x1] < 1).any()
        free[y0:y1, x0:x1] = 1
    assert (free == 1).all()
    hull = (*boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist())
    assert all(abs(a - b) <= 1 for a, b in zip(hull, bounds(sample.image)))


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_every_token_with_ink_has_one_box(world: Formulas) -> None:
    sample = world[0]
    tokens = [TOKENS[i] for i in sample.tokens]
    inked = [i for i, token in enumerate(tokens) if token not in ("<s>", "</s>", "{", "}", "_", "^")]
    assert sample.signs.tolist() == inked
    assert len(sample.boxes) == len(inked)


@cache
def alone(token: str, family: str) -> tuple[float, float]:
    """Width and height of a sign on its own at 20 pixels, of an image so fine that they are exact to half a percent."""
    x0, y0, x1, y1 = bounds(render(token, 1200, 1200, 400, family))
    return (x1 - x0) / 20, (y1 - y0) / 20


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(FAMILIES))
def test_a_box_has_the_shape_of_its_sign(seed: int, family: str) -> None:
    """Scripts and parts of fractions are drawn at 0.7 of the size, and so on downwards."""
    world = Formulas(seed=seed, family=family, height=120, width=400, size=20, longest=30)
    sample = world[0]
    for place, (x0, y0, x1, y1) in zip(sample.signs.tolist(), sample.boxes.tolist(), strict=True):
        token = TOKENS[sample.tokens[place]]
        if token not in (r"\frac", r"\sqrt"):
            wide, high = alone(token, family)
            fits = [abs(x1 - x0 - wide * s) < 0.2 and abs(y1 - y0 - high * s) < 0.2 for s in (1, 0.7, 0.49, 0.343)]
            assert any(fits), (sample.markup, token)


def relations(row: Row, at: int, sample: Formula) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Pairs of hulls that the tree puts above, left of, or inside each other."""

    def hull(start: int, stop: int) -> torch.Tensor:
        part = sample.boxes[(sample.signs >= start) & (sample.signs < stop)]
        return torch.cat([part[:, :2].amin(0), part[:, 2:].amax(0)])

    previous = None
    for node in row:
        stop = at + len(spell((node,)))
        if previous is not None:
            yield "left", previous, hull(at, stop)
        previous = hull(at, stop)
        match node:
            case Fraction(above, below):
                middle = at + 3 + len(spell(above))
                yield "above", hull(at + 2, middle - 1), hull(at, at + 1)
                yield "above", hull(at, at + 1), hull(middle, stop - 1)
                yield from relations(above, at + 2, sample)
                yield from relations(below, middle + 1, sample)
            case Root(body):
                yield "inside", hull(at + 2, stop - 1), hull(at, at + 1)
                yield from relations(body, at + 2, sample)
            case Group(body):
                yield from relations(body, at + 1, sample)
            case Scripts(base, below, above):
                root = at + len(spell((base,)))
                middle = root if below is None else root + 3 + len(spell(below))
                if below is not None:
                    yield "lower", hull(root, middle), hull(at, root)
                if above is not None:
                    yield "lower", hull(at, root), hull(middle, stop)
        at = stop


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_boxes_lie_as_the_tree_says(world: Formulas) -> None:
    sample = world[0]
    for relation, a, b in relations(sample.tree, 1, sample):
        if relation == "above":
            assert a[3] <= b[1] + 0.1
        elif relation == "left":
            assert a[[0, 2]].sum() < b[[0, 2]].sum()
        elif relation == "lower":
            assert a[[1, 3]].sum() > b[[1, 3]].sum()
        else:
            assert (a[:2] >= b[:2] - 0.5).all()
            assert (a[2:] <= b[2:] + 0.5).all()


def test_every_kind_of_node_comes_up() -> None:
    world = Formulas(longest=24, width=200)
    nodes = [node for i in range(150) for node in world[i].tree]
    assert {type(node) for node in nodes} == {Sign, Scripts, Fraction, Root}
    assert {bool(node.below) + 2 * bool(node.above) for node in nodes if isinstance(node, Scripts)} == {1, 2, 3}


def test_equivalent_markups_look_alike_and_others_do_not() -> None:
    pairs = [(r"x^2_1", r"x_{1}^{2}"), (r"{a}+{b}", "a+b"), (r"a\frac{1}{2}", r"a \frac{ 1 }{ {2} }")]
    for a, b in pairs:
        assert equivalent(a, b)
        assert torch.equal(render(a, 40, 100), render(b, 40, 100))
    a, b = render("x^{2}+1", 32, 100), render("x_{2}+1", 32, 100)
    assert not equivalent("x^{2}+1", "x_{2}+1")
    assert 0 < image_score(a, b) < 0.9


def test_image_score_counts_columns_and_leaves_the_margin_out() -> None:
    image = render("a+b", 32, 100)
    assert image_score(image, image) == 1
    assert image_score(image, render("a+b", 32, 80)) == 1
    blank = torch.ones(3, 32, 100)
    assert image_score(blank, blank) == 1
    assert image_score(image, blank) == 0
    changed = image.clone()
    changed[:, :, 5] = 0.5
    inked = bounds(image)[2]
    assert image_score(image, changed) == pytest.approx(1 - 1 / inked)


def test_splits_share_no_formula_however_short() -> None:
    splits = [{replace(Formulas(longest=3), split=split)[i].markup for i in range(150)} for split in SPLITS]
    assert all(len(markups) > 15 for markups in splits)
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]


def test_panels() -> None:
    world = Formulas()
    panels = world.panels(world[4])
    assert panels["markup"] == world[4].markup
    assert panels["signs"].shape == (3, 32, 128)
    assert ((panels["signs"][0] > 0.8) & (panels["signs"][1] < 0.3)).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Formulas(size=5), "size=5 must be 6 or more"),
        (lambda: Formulas(height=25), "height=25 and width=128 must be 26 or more"),
        (lambda: Formulas(longest=0), "longest=0"),
        (lambda: Formulas(depth=-1), "depth=-1"),
        (lambda: Formulas(family="times"), "family='times' must be one of 'cm'"),
        (lambda: render(r"\nothing{", 32, 64), re.escape(r"markup='\\nothing{' cannot be drawn")),
        (lambda: render("", 32, 64), "markup='' cannot be drawn"),
        (lambda: render("abcdefgh", 32, 32), "markup='abcdefgh' does not fit in height=32, width=32"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()
