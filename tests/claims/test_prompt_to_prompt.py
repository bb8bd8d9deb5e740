"""What counts as an edit that came out, on pictures whose truth is known; and the claim runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from regard.claims import prompt_to_prompt as claim
from regard.train.pretrained import trained
from regard.worlds.shapes.facts import Phrase, truth
from regard.worlds.shapes.language import caption
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import Background, Scene, Thing

RED, BLUE = Thing("circle", "red", (9.0, 9.0), 12.0), Thing("square", "blue", (22.0, 22.0), 12.0)
SCENE = Scene((32, 32), Background(), (RED, BLUE))


def picture(*things: Thing) -> torch.Tensor:
    return ShapesSample.of(replace(SCENE, things=things)).image


def case(edited: int) -> claim.Case:
    sample = ShapesSample.of(SCENE)
    said = caption(np.random.default_rng(0), truth(sample))
    first = [p.shape for p in said.phrases].index(SCENE.things[edited].shape)
    return claim.Case(said, first, "green", "star", torch.zeros(1, 12, 16, 16), sample.image)


def test_prompts_differ_in_one_word() -> None:
    one = case(0)
    assert sorted(one.prompt().split()) == sorted(str(one.said).split())
    for phrase, gone, come in ((one.recoloured(), "red", "green"), (one.reshaped(), "circle", "star")):
        old, new = one.prompt().split(), one.prompt(phrase).split()
        assert [(a, b) for a, b in zip(old, new, strict=True) if a != b] == [(gone, come)]


def test_a_clean_edit_succeeds_and_preserves() -> None:
    one = case(0)
    for phrase, thing in (
        (one.recoloured(), replace(RED, colour="green")),
        (one.reshaped(), replace(RED, shape="star")),
    ):
        came = claim.outcome(one, picture(thing, BLUE), phrase)
        assert came.success
        assert came.preserved
        assert came.outside < 0.01


def test_what_does_not_count() -> None:
    one = case(0)
    green = replace(RED, colour="green")
    assert not claim.outcome(one, one.picture, one.recoloured()).success
    for things in ((green,), (green, replace(BLUE, centre=(19.0, 22.0))), (green, replace(BLUE, colour="pink"))):
        came = claim.outcome(one, picture(*things), one.recoloured())
        assert came.success
        assert not came.preserved
    other = picture(green, BLUE).clone()
    other[:, 20:, :14] = 0
    came = claim.outcome(one, other, one.recoloured())
    assert came.outside > claim.OUTSIDE
    assert not came.preserved


def test_amount_grows_with_size_and_chroma() -> None:
    small, large = (claim.amount(picture(replace(RED, size=size), BLUE), "red") for size in (10.0, 14.0))
    assert 0 < small < large
    assert claim.amount(picture(BLUE), "red") == 0
    faded = 0.5 + 0.5 * (picture(RED, BLUE) - 0.5)
    assert claim.amount(faded, "red") < claim.amount(picture(RED, BLUE), "red")


def test_the_larger_of_two_is_taken() -> None:
    sample = ShapesSample.of(replace(SCENE, things=(RED, replace(RED, size=8.0, centre=(24.0, 8.0)))))
    found = truth(sample)
    assert claim.one(found, Phrase("circle", "red")) is found[0]
    assert claim.one(found, Phrase("circle", "blue")) is None


@pytest.mark.skipif(
    "shapes-diffusion" not in trained(), reason="shapes-diffusion is not trained: regard train shapes-diffusion"
)
def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows] == [False] * 7 + [True] * 5
    assert all(a <= b for a, b in pairwise(claim.SHARES))
