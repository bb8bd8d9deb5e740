"""Reads things off a picture, without any network: by hue, by connected regions, and by fitting the shapes to them."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

from regard.worlds.shapes.facts import PLAIN, Caption, Found, Verdict, check
from regard.worlds.shapes.fit import GROWN, Fit, fit, pixels
from regard.worlds.shapes.language import read_caption
from regard.worlds.shapes.render import second_tone
from regard.worlds.shapes.scene import (
    CLASSES,
    COLOURS,
    COMPOSITES,
    LARGE,
    PATTERNS,
    SHADE,
    SHAPES,
    TONES,
    Pattern,
    known,
)

WORKING = (64, 96)
CHROMA = 0.14
BLUR = 0.5
HUES = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in COLOURS.values()])
ACCEPT = 0.76
CLEAR = 0.9
PART = 0.5
MOST = 30
WIDEST, OFF, OPEN, CROWDED = 0.8, 0.2, 0.25, 0.75
LEAST = 10


@dataclass(frozen=True, eq=False)
class Reading:
    """A thing on the picture at working size."""

    fit: Fit
    colour: int
    region: Bool[ndarray, "h w"]


def hue_and_chroma(rgb: Float[ndarray, "3 h w"]) -> tuple[Float[ndarray, "h w"], Float[ndarray, "h w"]]:
    """Hue in turns, and the largest less the smallest channel; mixing with grey leaves the hue as it is."""
    r, g, b = rgb
    top, chroma = rgb.max(0), np.ptp(rgb, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(top == r, (g - b) / safe, np.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    return (hue / 6) % 1, chroma


def labels(rgb: Float[ndarray, "3 h w"]) -> tuple[Int[ndarray, "h w"], Bool[ndarray, "h w"]]:
    """The nearest colour of each pixel, and where there is colour at all."""
    hue, chroma = hue_and_chroma(rgb)
    around = ndimage.maximum_filter(chroma, 5)
    away = np.abs(hue[..., None] - HUES)
    return np.minimum(away, 1 - away).argmin(-1), (chroma > CHROMA) & (chroma > 0.33 * around)


def regions(colour: Int[ndarray, "h w"], coloured: Bool[ndarray, "h w"]) -> list[tuple[int, Bool[ndarray, "h w"]]]:
    """Connected pixels of one colour, largest first; seams where two colours mix are too thin to count."""
    found = []
    for c in np.unique(colour[coloured]):
        numbered, n = ndimage.label(coloured & (colour == c), np.ones((3, 3)))
        for region in (numbered == i for i in range(1, n + 1)):
            if region.sum() >= LEAST and ndimage.binary_erosion(region).any():
                found.append((int(c), region))
    return sorted(found, key=lambda pair: -int(pair[1].sum()))


def judge(image: Float[Tensor, "3 h w"], shapes: Sequence[str] = SHAPES) -> list[Found]:
    """The things in a picture, by size of what is seen; none where nothing is well explained.

    Args:
        image: (3, h, w) in [0, 1]; of a grey background, plain or textured, and things in the colours of the world.
        shapes: what is looked for, of ``CLASSES``.

    Raises:
        ValueError: not an image of three channels, an unknown shape.
    """
    rgb = image.detach().cpu().numpy().astype(np.float32)
    if rgb.ndim != 3 or len(rgb) != 3:
        raise ValueError(f"image of shape {tuple(image.shape)} must be (3, h, w)")
    for shape in shapes:
        known("shapes", shape, CLASSES)
    small, scale = working(rgb)
    smooth = ndimage.gaussian_filter(small, (0, BLUR, BLUR))
    read = [one for one in read_things(smooth, shapes) if plausible(one, smooth)]
    patterns = [pattern_of(one, small) for one in read]
    size = (rgb.shape[1], rgb.shape[2])
    fits = [one.fit.scaled(1 / scale) for one in read]
    inside = [one.distance(size) < 0 for one in fits]
    over = in_front(read)
    found = []
    for i, (one, fitted) in enumerate(zip(read, fits)):
        mask = inside[i] & ~np.logical_or.reduce(
            [np.zeros(size, bool)] + [inside[j] for j in range(len(read)) if i in over[j]]
        )
        ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(xs) else (0, 0, 0, 0)
        large = fitted.size >= LARGE * min(size)
        words = (fitted.shape, list(COLOURS)[one.colour], patterns[i], "large" if large else "small")
        found.append(Found(*words, fitted.centre, box, torch.from_numpy(mask), over[i], min(1.0, fitted.score)))
    return found


def working(rgb: Float[ndarray, "3 h w"]) -> tuple[Float[ndarray, "3 H W"], float]:
    """The picture at a size that is read well and fast, and how many of its pixels go to one of the given ones."""
    h, w = rgb.shape[1:]
    least, most = WORKING
    if max(h, w) > most:
        every = -(-max(h, w) // most)
        cut = rgb[:, : h // every * every, : w // every * every]
        return cut.reshape(3, h // every, every, w // every, every).mean((2, 4)), 1 / every
    times = -(-least // max(h, w))
    if times > 1:
        return ndimage.zoom(rgb, (1, times, times), order=1, mode="nearest", grid_mode=True), float(times)
    return rgb, 1.0


def read_things(rgb: Float[ndarray, "3 h w"], shapes: Sequence[str]) -> list[Reading]:
    """The fits that explain their region, composites first; none in a picture of hardly any grey or of too many pieces."""
    colour, coloured = labels(rgb)
    pieces = regions(colour, coloured)
    if coloured.mean() > CROWDED or len(pieces) > MOST:
        return []
    simple, composed = (tuple(s for s in shapes if (s in COMPOSITES) == c) for c in (False, True))
    simple = simple or SHAPES
    left = [Reading(fit(region, coloured & ~region, simple), c, region) for c, region in pieces]
    read = composites(left, np.where(coloured, colour + 1, 0), composed) if composed else []
    inside = [one.fit.distance(one.region.shape) < GROWN for one in read]  # type: ignore[arg-type]
    left = [one for one in left if not any((one.region & mask).sum() > 0.5 * one.region.sum() for mask in inside)]
    while left:
        one = left.pop(0)
        for other in [o for o in left if o.colour == one.colour and o.fit.score < CLEAR and near(one.fit, o.fit)]:
            joint = one.region | other.region
            both = Reading(fit(joint, coloured & ~joint, simple), one.colour, joint)
            if both.fit.score > max(ACCEPT, one.fit.score - 0.05):
                one = both
                left.remove(other)
        if one.fit.score >= ACCEPT:
            read.append(one)
    return sorted(read, key=lambda one: -int(one.region.sum()))


def near(a: Fit, b: Fit) -> bool:
    """Whether two fits may be of two pieces of one thing."""
    return float(np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1])) < a.size


def plausible(one: Reading, rgb: Float[ndarray, "3 h w"]) -> bool:
    """Whether the inside has about the colour of its name or a shade of it, and grey lies around most of the outline."""
    size = (rgb.shape[1], rgb.shape[2])
    distance = one.fit.distance(size)
    inside = one.region & (distance < -0.7)
    around = (distance > 1.5) & (distance < 3)
    if one.fit.size > WIDEST * min(size) or not inside.any() or not around.any():
        return False
    colour = np.array(list(COLOURS.values())[one.colour])
    if one.fit.shape not in COMPOSITES:
        pixels_ = rgb[:, inside].T
        along = np.clip((pixels_ @ colour) / (colour @ colour), SHADE, 1)[:, None]
        if np.percentile(np.linalg.norm(pixels_ - along * colour, axis=1), 30) > OFF:
            return False
    return float((np.ptp(rgb, 0)[around] <= CHROMA).mean()) >= OPEN


def composites(left: list[Reading], names: Int[ndarray, "h w"], shapes: tuple[str, ...]) -> list[Reading]:
    """Things of several parts: touching regions that together have the outline of one, each part in one colour.

    A composite has to agree about as well as its regions do with shapes of their own.
    """
    coloured = names > 0
    wide = [ndimage.binary_dilation(one.region, iterations=2) for one in left]
    rest = coloured & ~np.logical_or.reduce([np.zeros_like(coloured)] + [one.region for one in left])
    found: list[tuple[Reading, set[int]]] = []
    for n in (1, 2, 3):
        for chosen in itertools.combinations(range(len(left)), n):
            if len({left[i].colour for i in chosen}) < n or not _touching(chosen, wide, left):
                continue
            region = np.logical_or.reduce([left[i].region for i in chosen])
            close = rest & ndimage.binary_dilation(region, iterations=5)
            if n == 1 and close.sum() < LEAST:
                continue
            region |= close
            best = fit(region, coloured & ~region, shapes, keep=2)
            agreement, colour = parts_agree(best, names, region)
            apart = np.average([left[i].fit.score for i in chosen], weights=[left[i].region.sum() for i in chosen])
            if agreement >= max(ACCEPT, apart - 0.05 * n):
                found.append((Reading(replace(best, score=agreement), colour, region), set(chosen)))
    kept: list[Reading] = []
    taken: set[int] = set()
    for one, which in sorted(found, key=lambda pair: -pair[0].fit.score - 0.05 * len(pair[1])):
        if not which & taken:
            kept.append(one)
            taken |= which
    return kept


def _touching(chosen: tuple[int, ...], wide: list[ndarray], left: list[Reading]) -> bool:
    """Whether each region is next to one of the others."""
    return len(chosen) == 1 or all(any((wide[i] & left[j].region).any() for j in chosen if j != i) for i in chosen)


def parts_agree(one: Fit, names: Int[ndarray, "h w"], region: Bool[ndarray, "h w"]) -> tuple[float, int]:
    """The share of the pixels of a region or a fit that have the colour of the part there, and the first part's colour.

    Nothing agrees if a part does not by half, or a further one has the first one's colour.
    """
    size = (names.shape[0], names.shape[1])
    expected = np.zeros(size, int)
    for part in range(len(COMPOSITES[one.shape])):
        expected[one.distance(size, part) < GROWN] = part + 1
    counted = ((expected > 0) | region) & ((names == 0) | region)
    colours, agreed = [], 0
    for part in range(1, expected.max() + 1):
        here = counted & (expected == part)
        counts = np.bincount(names[here], minlength=2)[1:]
        colours.append(int(counts.argmax()))
        agreed += int(counts.max())
        own = counted & (names == colours[-1] + 1)
        if here.sum() >= LEAST and counts.max() < PART * (here | own).sum():
            return 0.0, colours[0]
    if colours[0] in colours[1:]:
        return 0.0, colours[0]
    return agreed / max(1, int(counted.sum())), colours[0]


def in_front(read: list[Reading]) -> list[frozenset[int]]:
    """For each thing those it hides a part of: where the two fitted outlines overlap its own colour is seen."""
    over: list[set[int]] = [set() for _ in read]
    inside = [one.fit.distance(one.region.shape) < 0 for one in read]  # type: ignore[arg-type]
    for i, j in itertools.combinations(range(len(read)), 2):
        both = inside[i] & inside[j]
        if both.sum() >= PLAIN * both.size:
            mine, theirs = ((both & read[k].region).sum() for k in (i, j))
            over[i if mine > theirs else j].add(j if mine > theirs else i)
    return [frozenset(others) for others in over]


def pattern_of(read: Reading, rgb: Float[ndarray, "3 h w"]) -> str:
    """Solid unless much of the inside is dark; else the pattern that goes with the light and dark best."""
    one, size = read.fit, (rgb.shape[1], rgb.shape[2])
    distance = one.distance(size, 0 if one.shape in COMPOSITES else None)
    inside = read.region & (distance < -1)
    value = rgb.max(0)[inside]
    if len(value) < 6:
        return "solid"
    light = np.percentile(value, 90)
    dark = np.clip((1 - value / light) / 0.55, 0, 1)
    if dark.mean() < 0.1 or dark.std() < 0.15:
        return "solid"
    u, v = one.local(*pixels(size))
    u, v = u[inside], v[inside]
    fits = {kind: np.corrcoef(second_tone(Pattern(kind), u, v, one.size), dark)[0, 1] for kind in PATTERNS[1:]}
    return max(fits, key=lambda kind: np.nan_to_num(fits[kind], nan=-1.0))


def judge_tone(image: Float[Tensor, "3 h w"]) -> str:
    """The word of ``TONES`` nearest to the middle grey of what has no colour."""
    rgb = image.detach().cpu().numpy().astype(np.float32)
    grey = rgb.mean(0)[np.ptp(rgb, 0) <= CHROMA]
    middle = np.median(grey if grey.size else rgb)
    return min(TONES, key=lambda tone: abs(TONES[tone] - middle))


def satisfies(image: Float[Tensor, "3 h w"], caption: str | Caption) -> Verdict:
    """Whether a picture shows what a caption says, fact by fact.

    Raises:
        ValueError: a caption that cannot be read.
    """
    said = read_caption(caption) if isinstance(caption, str) else caption
    named = [phrase.shape for phrase in said.phrases if phrase.shape in COMPOSITES]
    return check(said, judge(image, (*SHAPES, *named)), judge_tone(image))
