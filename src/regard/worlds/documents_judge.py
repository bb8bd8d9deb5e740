"""Reads a page back into words with boxes in reading order, without any network, by matching drawn signs to the ink."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from regard.worlds.documents import Page
from regard.worlds.shapes.facts import Verdict
from regard.worlds.typeset import FAMILIES, Box, Face, font

BLANK = " "
SIGNS = (BLANK, *"abcdefghijklmnopqrstuvwxyz0123456789.-")
BEFORE = 3
PRICE = 0.02
DARK = 0.4
CLEAR, ACCEPT = 0.93, 0.6
TRIES = 12
SAME = 0.5


@dataclass(frozen=True)
class Printed:
    """A word that is read off a page.

    Args:
        text: small letters, digits, points and hyphens, not of points and hyphens alone.
        box: the ink of that text, in pixels.
        face: its font and size.
        start, end: where its first sign starts on the base line and where the next one would.
        base: the row below the base line.
        score: how well ink and text agree: 1 less the squared difference over the squared ink, at most 1.
    """

    text: str
    box: Box
    face: Face
    start: int
    end: int
    base: int
    score: float


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The signs of a face as darkness, ``BEFORE`` columns before and rows ``rise`` above their place on the base line.

    Args:
        drawn: (g, r, c).
        step: (g, g), from the place of a sign to that of the next one.
        overlap: (g, g), twice the product of the darkness of two neighbours.
        price: (g,), the squared darkness, and a little for a column without ink.
        rise: rows above the base line.
    """

    drawn: Float[ndarray, "g r c"]
    step: Int[ndarray, "g g"]
    overlap: Float[ndarray, "g g"]
    price: Float[ndarray, "g"]
    rise: int


def darkness(face: Face, text: str) -> tuple[Float[ndarray, "h w"], Box]:
    """How dark a word is drawn, and its place relative to where it starts on the base line."""
    mask, (x, y) = font(*face).getmask2(text, mode="L", anchor="ls")
    width, height = mask.size
    return np.array(mask, np.float32).reshape(height, width) / 255, (x, y, x + width, y + height)


@cache
def alphabet(face: Face) -> Alphabet:
    """The signs of a face."""
    drawn = font(*face)
    signs = {sign: darkness(face, sign) for sign in SIGNS[1:]}
    ahead = {sign: round(drawn.getlength(sign)) for sign in SIGNS[1:]} | {BLANK: 1}
    boxes = np.array([box for _, box in signs.values()])
    rise, wide = -int(boxes[:, 1].min()), BEFORE + int(boxes[:, 2].max())
    masks = np.zeros((len(SIGNS), rise + int(boxes[:, 3].max()), wide), np.float32)
    for sign, (mask, (x0, y0, x1, y1)) in signs.items():
        masks[SIGNS.index(sign), rise + y0 : rise + y1, BEFORE + x0 : BEFORE + x1] = mask
    step = np.array([[ahead[a]] * len(SIGNS) for a in SIGNS])
    for i, a in enumerate(SIGNS[1:], 1):
        for j, b in enumerate(SIGNS[1:], 1):
            step[i, j] = round(drawn.getlength(a + b)) - ahead[b]
    overlap = np.zeros(step.shape, np.float32)
    for i, j in np.ndindex(*step.shape):
        if (shared := wide - step[i, j]) > 0:
            overlap[i, j] = 2 * (masks[i, :, step[i, j] :] * masks[j, :, :shared]).sum()
    price = (masks**2).sum((1, 2))
    price[0] = PRICE
    return Alphabet(masks, step, overlap, price, rise)


def read_page(image: Float[Tensor, "3 h w"], size: int = 12) -> list[Printed]:
    """The words on an upright page of :class:`Documents` or on a picture of one, in reading order.

    Words are of small letters, digits, points and hyphens. Ink that is no word of these is left out.

    Args:
        image: (3, h, w) in [0, 1], black on white.
        size: of the text in pixels.

    Raises:
        ValueError: not an image of three channels, text below 10 pixels, whose signs blur into each other.
    """
    if image.ndim != 3 or len(image) != 3:
        raise ValueError(f"image of shape {tuple(image.shape)} must be (3, h, w)")
    if size < 10:
        raise ValueError(f"size={size} must be 10 or more to be told apart")
    dark = 1 - image.detach().cpu().mean(0).numpy().astype(np.float32)
    dark[rules(dark > DARK, size)] = 0
    words = [word for piece, alone in pieces(dark, size) for word in read_piece(alone, piece, size)]
    return in_order(words, image.shape[2], size)


def rules(ink: Bool[ndarray, "h w"], size: int) -> Bool[ndarray, "h w"]:
    """Straight lines that are longer than signs are."""
    from scipy import ndimage

    flat, upright = np.ones((1, 4 * size)), np.ones((int(1.5 * size), 1))
    return ndimage.binary_opening(ink, flat) | ndimage.binary_opening(ink, upright)


def pieces(dark: Float[ndarray, "h w"], size: int) -> Iterator[tuple[Box, Float[ndarray, "h w"]]]:
    """Ink with gaps of at most half the size, as boxes and alone on the page; bullets and specks are left out.

    Gaps between lines and columns are wider; a space may be.
    """
    from scipy import ndimage

    ink = dark > DARK
    across, down = 2 * round(size / 4) + 1, 1 + round(size / 6)
    numbered, _ = ndimage.label(ndimage.binary_dilation(ink, np.ones((down, across))))
    for number, found in enumerate(ndimage.find_objects(np.where(ink, numbered, 0)), 1):
        ys, xs = found
        bullet = {ys.stop - ys.start, xs.stop - xs.start} == {size // 4} and ink[found].all()
        if not bullet and ink[found].sum() >= size // 2:
            yield (xs.start, ys.start, xs.stop, ys.stop), np.where(numbered == number, dark, 0)


def faces(size: int) -> Iterator[Face]:
    """Those of a page: of the text, of what is strong, of titles."""
    for family in FAMILIES:
        yield from (Face(family, size), Face(f"{family}-Bold", size), Face(f"{family}-Bold", round(1.25 * size)))


def read_piece(dark: Float[ndarray, "h w"], piece: Box, size: int) -> list[Printed]:
    """The words of one piece, alone on the page, in the face and on the base line that explain its ink best."""
    x0, _, x1, y1 = piece
    guesses = []
    for face in faces(size):
        letters = alphabet(face)
        below = letters.drawn.shape[1] - letters.rise
        for base in range(y1 - below, y1 + 2):
            strip = cut(dark, (x0 - size - BEFORE, base - letters.rise, x1 + letters.drawn.shape[2], base + below))
            costs = costs_of(strip, letters)
            guesses.append((float(np.square(costs.min(1)).sum()), face, base, costs))
    ink = float(np.square(dark).sum())
    least, words = 0.0, []
    for _, face, base, costs in sorted(guesses, key=lambda guess: -guess[0])[:TRIES]:
        cost, signs = cheapest(costs, alphabet(face))
        if cost < least:
            least, words = cost, spelt(dark, signs, face, (x0 - size, base))
        if -least > CLEAR * ink and all(word.score > CLEAR for word in words):
            break
    return [word for word in words if word.score >= ACCEPT and any(sign.isalnum() for sign in word.text)]


def cut(dark: Float[ndarray, "h w"], box: Box) -> Float[ndarray, "r c"]:
    """What is in a box, blank beyond the page."""
    x0, y0, x1, y1 = box
    out = np.zeros((y1 - y0, x1 - x0), np.float32)
    top, left, bottom, right = max(0, y0), max(0, x0), min(len(dark), y1), min(dark.shape[1], x1)
    if top < bottom and left < right:
        out[top - y0 : bottom - y0, left - x0 : right - x0] = dark[top:bottom, left:right]
    return out


def costs_of(strip: Float[ndarray, "r c"], letters: Alphabet) -> Float[ndarray, "p g"]:
    """By how much the squared difference from the strip changes with each sign at each place."""
    rows, wide = letters.drawn.shape[1:]
    windows = np.lib.stride_tricks.sliding_window_view(strip, wide, axis=1).transpose(1, 0, 2)
    flat = np.ascontiguousarray(windows).reshape(-1, rows * wide)
    return letters.price - 2 * flat @ letters.drawn.reshape(len(SIGNS), -1).T


def spelt(
    dark: Float[ndarray, "h w"], signs: Sequence[tuple[str, int]], face: Face, corner: tuple[int, int]
) -> list[Printed]:
    """The words that signs make, parted by more than half a space; ``corner`` is where place 0 is on the base line."""
    words, text, begun, blanks = [], "", 0, 0
    for sign, place in [*signs, *[(BLANK, -1)] * face.space]:
        if sign != BLANK:
            begun, text, blanks = begun if text else place, text + sign, 0
        elif text:
            blanks += 1
            if 2 * blanks > face.space:
                words.append(printed(dark, text, face, corner[0] + begun, corner[1]))
                text = ""
    return words


def cheapest(costs: Float[ndarray, "p g"], letters: Alphabet) -> tuple[float, list[tuple[str, int]]]:
    """The least sum of costs and overlaps, and the signs and blanks side by side, with their places, that have it.

    It is what they change of the squared difference from the strip, but for three signs on one pixel.
    """
    places, count = costs.shape
    start, signs = int(letters.step.max()), np.arange(count)[:, None]
    total = np.full((start + places, count), np.inf, np.float32)
    total[start, 0] = 0
    came = np.zeros((places, count), int)
    for place in range(1, places):
        ways = total[start + place - letters.step, signs] + letters.overlap
        came[place] = ways.argmin(0)
        total[start + place] = ways.min(0) + costs[place]
    found, sign, place = [], 0, places - 1
    while place > 0:
        found.append((SIGNS[sign], place))
        before = int(came[place, sign])
        place -= int(letters.step[before, sign])
        sign = before
    return float(total[-1, 0]), found[::-1]


def printed(dark: Float[ndarray, "h w"], text: str, face: Face, x: int, base: int) -> Printed:
    """The word with its score: it is drawn and held against the page, a pixel further on every side."""
    mask, (x0, y0, x1, y1) = darkness(face, text)
    page = cut(dark, (x + x0 - 1, base + y0 - 1, x + x1 + 1, base + y1 + 1))
    score = 1 - float(np.square(page - np.pad(mask, 1)).sum() / np.square(mask).sum())
    ink = face.ink(text)
    box = x + ink[0], base + ink[1], x + ink[2], base + ink[3]
    return Printed(text, box, face, x, x + face.width(text), base, score)


def in_order(words: Sequence[Printed], width: int, size: int) -> list[Printed]:
    """Line by line; in two columns where running text keeps to either side of the gap in the middle of the page."""
    body = [word for word in words if word.face in {Face(family, size) for family in FAMILIES}]
    low, high = (width - size) / 2 + 1, (width + size) / 2 - 1
    rows = in_lines(body, size)
    runs = any(b.start - a.end == a.face.space for row in rows for a, b in pairwise(row))
    if not runs or any(word.box[0] < high and word.box[2] > low for word in body):
        return [word for row in in_lines(words, size) for word in row]
    titles = [word for word in words if word not in body]
    sides = [word for word in body if word.box[2] <= low], [word for word in body if word.box[0] >= high]
    return [word for part in (titles, *sides) for row in in_lines(part, size) for word in row]


def in_lines(words: Sequence[Printed], size: int) -> list[list[Printed]]:
    """Words whose base lines differ by no more than half the size, from left to right."""
    rows: list[list[Printed]] = []
    for word in sorted(words, key=lambda one: one.base):
        if not rows or word.base - rows[-1][0].base > size / 2:
            rows.append([])
        rows[-1].append(word)
    return [sorted(row, key=lambda one: one.start) for row in rows]


def overlaps(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every two boxes."""
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    both = sides.prod(-1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1) - both).clamp(min=1e-9)


def shows(image: Float[Tensor, "3 h w"], page: Page, size: int = 12) -> Verdict:
    """Whether a picture shows the words of a page, each in its place, no others, and in the page's order.

    Raises:
        ValueError: as for :func:`read_page`.
    """
    found = read_page(image, size)
    alike = overlaps(page.boxes, torch.tensor([word.box for word in found]).reshape(-1, 4).float()) >= SAME
    same = torch.tensor([[word.text == text for word in found] for text in page.words]).reshape(alike.shape)
    held = alike & same.bool()
    facts = [(f"{text} at {box}", bool(row.any())) for text, box, row in zip(page.words, page.boxes.tolist(), held)]
    facts.append(("nothing else", bool(held.any(0).all())))
    facts.append(("in this order", tuple(word.text for word in found) == page.words))
    return Verdict(tuple(facts))
