"""The judge reads pages whole and in order, noisy ones too, and sees what is misspelt, moved, missing or too much."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from regard.worlds.documents import Documents, render_text
from regard.worlds.documents_judge import PRICE, SIGNS, alphabet, cheapest, costs_of, overlaps, read_page, shows
from regard.worlds.layouts import LAYOUTS, compose
from regard.worlds.typeset import FAMILIES, Face, Sheet


def sheet_of(world: Documents, index: int) -> Sheet:
    rng = world.rng(index)
    layout = str(rng.choice(world.layouts))
    sheet = Sheet(world.width, world.height)
    compose(sheet, layout, world.size, world.margin, rng)
    return sheet


def drawn(sheet: Sheet) -> Tensor:
    return torch.from_numpy(np.array(sheet.draw(), np.float32) / 255).expand(3, -1, -1)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_boxes_and_order_are_those_of_the_page(layout: str, noise: float) -> None:
    world = Documents(split="test", layouts=(layout,), noise=noise)
    for i in range(2):
        page = world[i]
        found = read_page(page.image)
        assert tuple(word.text for word in found) == page.words
        boxes = torch.tensor([word.box for word in found], dtype=torch.float32)
        assert overlaps(boxes, page.boxes).diagonal().min() > 0.9
        assert shows(page.image, page)


@pytest.mark.parametrize("size", [10, 16])
def test_other_sizes_and_a_blurred_page(size: int) -> None:
    world = Documents(size=size, height=20 * size, width=20 * size, split="test")
    for spoilt in (world, replace(world, blur=0.5)):
        for i in range(3):
            found = read_page(spoilt[i].image, size)
            assert tuple(word.text for word in found) == spoilt[i].words


@pytest.mark.parametrize("index", range(5))
def test_a_wrong_page_is_told(index: int) -> None:
    world = Documents(split="test")
    page, rng = world[index], np.random.default_rng(index)
    sheet = sheet_of(world, index)
    i = int(rng.integers(len(sheet.words)))
    word, told = sheet.words[i], f"{page.words[i]} at {page.boxes[i].tolist()}"
    misspelt = word.text[:-1] + ("k" if word.text[-1] != "k" else "h")
    for wrong in (word._replace(text=misspelt), word._replace(x=word.x + 40, y=word.y + 7), None):
        sheet.words[i : i + 1] = [] if wrong is None else [wrong]
        verdict = shows(drawn(sheet), page)
        assert not verdict
        facts = dict(verdict.facts)
        assert not facts[told]
        if wrong is None:
            assert not facts["in this order"]
        elif wrong.text == misspelt:
            assert sum(not holds for holds in facts.values()) == 3
            assert misspelt in [one.text for one in read_page(drawn(sheet))]
        sheet.words[i : i + (wrong is not None)] = [word]
    assert shows(drawn(sheet), page)


def test_two_words_that_changed_places_are_told() -> None:
    world = Documents(split="test", layouts=("scattered",))
    sheet, page = sheet_of(world, 1), world[1]
    a, b = sheet.words[0], sheet.words[-1]
    sheet.words[0], sheet.words[-1] = a._replace(text=b.text), b._replace(text=a.text)
    verdict = shows(drawn(sheet), page)
    assert not dict(verdict.facts)["in this order"]
    assert verdict.score == pytest.approx(1 - 4 / (len(page.words) + 2))


def test_a_given_text_is_read_back() -> None:
    text = "the quick brown fox jumps over the lazy dog 0123456789 x-y 4.50"
    assert " ".join(word.text for word in read_page(render_text(text, 300, 12).image)) == text


@pytest.mark.parametrize("name", ["noise", "specks", "white", "black", "bars", "waves"])
def test_nothing_is_read_in_garbage(name: str) -> None:
    rng, y = np.random.default_rng(0), np.arange(96)[:, None] + np.zeros((1, 96))
    image = {
        "noise": rng.uniform(0, 1, (96, 96)),
        "specks": (rng.random((96, 96)) > 0.03).astype(float),
        "white": np.ones((96, 96)),
        "black": np.zeros((96, 96)),
        "bars": (y % 12 < 6).astype(float),
        "waves": 0.5 + 0.5 * np.sin(y / 3) * np.sin(y.T / 4),
    }[name]
    assert read_page(torch.from_numpy(image).float().expand(3, -1, -1)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_signs_are_cheaper(family: str) -> None:
    """The cost is the squared difference of the signs laid over each other, and that of no random text is less."""
    letters = alphabet(Face(family, 10))
    rows, wide = letters.drawn.shape[1:]
    rng = np.random.default_rng(0)

    def laid(text: str, at: int) -> np.ndarray:
        canvas = np.zeros((rows, 8 * wide), np.float32)
        places = np.cumsum([at, *(letters.step[SIGNS.index(a), SIGNS.index(b)] for a, b in pairwise(text))])
        for sign, place in zip(text, places):
            canvas[:, place : place + wide] += letters.drawn[SIGNS.index(sign)]
        return canvas

    strip = laid("away", 7) + rng.normal(0, 0.1, (rows, 8 * wide)).astype(np.float32)
    cost, signs = cheapest(costs_of(strip, letters), letters)
    assert "".join(sign for sign, _ in signs).strip() == "away"
    squared = np.square(strip - laid("".join(sign for sign, _ in signs), 1)).sum() - np.square(strip).sum()
    assert cost == pytest.approx(squared + PRICE * sum(sign == " " for sign, _ in signs), abs=0.05)
    for text in ["awag", "avvay", "awa", *("".join(rng.choice(SIGNS[1:], 4)) for _ in range(200))]:
        assert np.square(strip - laid(text, 7)).sum() - np.square(strip).sum() > cost


def test_bad_input_is_refused() -> None:
    with pytest.raises((ValueError, TypeCheckError), match="image"):
        read_page(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="size=8 must be 10 or more"):
        read_page(torch.zeros(3, 64, 64), 8)
