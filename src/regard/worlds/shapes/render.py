"""Pictures of scenes, anti-aliased: a pixel is covered by ``0.5 - d`` at signed distance ``d`` pixels, within 0 and 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage

from regard.worlds.shapes.outlines import OUTLINES
from regard.worlds.shapes.scene import COLOURS, SHADE, TONES, Background, Pattern, Scene, Thing


@dataclass(frozen=True, eq=False)
class Layer:
    """One thing inside its window of the picture: how far each part covers each pixel, and its colours."""

    window: tuple[slice, slice]
    covers: tuple[Float[ndarray, "h w"], ...]
    colours: tuple[Float[ndarray, "... 3"], ...]

    @cached_property
    def mask(self) -> Bool[ndarray, "h w"]:
        return np.maximum.reduce(self.covers) >= 0.5

    def full(self, mask: Bool[ndarray, "h w"], size: tuple[int, int]) -> Bool[ndarray, "H W"]:
        """A mask of the window as a mask of the picture."""
        out = np.zeros(size, bool)
        out[self.window] = mask
        return out


def reach(thing: Thing) -> float:
    """Half the side of the upright square that holds the turned thing, in pixels."""
    turn = math.radians(thing.angle)
    return thing.size / 2 * (abs(math.cos(turn)) + abs(math.sin(turn)))


def frame(thing: Thing, size: tuple[int, int]) -> tuple[tuple[slice, slice], ndarray, ndarray]:
    """The thing's window, and its pixels' centres in the thing's own frame."""
    (cx, cy), half = thing.centre, reach(thing) + 1
    x0, x1 = max(0, math.floor(cx - half)), max(0, min(size[1], math.ceil(cx + half)))
    y0, y1 = max(0, math.floor(cy - half)), max(0, min(size[0], math.ceil(cy + half)))
    x = ((np.arange(x0, x1, dtype=np.float32) + 0.5 - cx) / (thing.size / 2))[None]
    y = ((np.arange(y0, y1, dtype=np.float32) + 0.5 - cy) / (thing.size / 2))[:, None]
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return (slice(y0, y1), slice(x0, x1)), cos * x + sin * y, cos * y - sin * x


def cover(distance: Float[ndarray, "*p"]) -> Float[ndarray, "*p"]:
    return np.clip(0.5 - distance, 0, 1)


def wave(t: Float[ndarray, "*p"], period: float, scale: float) -> Float[ndarray, "*p"]:
    """1 on every other half period of t, with edges as wide as a pixel; ``scale`` pixels to the unit of t."""
    return cover((np.abs((t / period) % 1 - 0.5) - 0.25) * period * scale)


def second_tone(pattern: Pattern, x: Float[ndarray, "*p"], y: Float[ndarray, "*p"], size: float) -> ndarray:
    """How far the second tone covers each point of a thing of this size."""
    turn, period, scale = math.radians(pattern.angle), 2 * pattern.period, size / 2
    u, v = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    if pattern.kind == "striped":
        return wave(u, period, scale)
    if pattern.kind == "checked":
        a, b = wave(u, period, scale), wave(v, period, scale)
        return a + b - 2 * a * b
    du, dv = ((t / period) % 1 - 0.5 for t in (u, v))
    return cover((np.hypot(du, dv) - 0.32) * period * scale)


def layer(thing: Thing, size: tuple[int, int]) -> Layer:
    """The thing as it would be if nothing hid it, cut at the edge of the picture."""
    window, x, y = frame(thing, size)
    covers = tuple(cover(outline(x, y) * (thing.size / 2)) for outline in OUTLINES[thing.shape])
    first, *further = (np.array(COLOURS[c], np.float32) for c in (thing.colour, *thing.parts))
    if thing.pattern.kind != "solid":
        tone = second_tone(thing.pattern, x, y, thing.size)[..., None]
        second = SHADE * first if thing.pattern.second is None else np.array(COLOURS[thing.pattern.second], np.float32)
        first = first + tone * (second - first)
    return Layer(window, covers, (first, *further))


def backdrop(background: Background, size: tuple[int, int]) -> Float[ndarray, "h w"]:
    """The grey values behind the things."""
    tone = TONES[background.tone]
    h, w = size
    if background.kind == "plain":
        return np.full(size, tone, np.float32)
    if background.kind == "noise":
        coarse = np.random.default_rng(background.seed).uniform(-0.15, 0.15, (h // 6 + 2, w // 6 + 2))
        texture = ndimage.zoom(coarse, 6, order=1)[:h, :w]
    else:
        turn = math.radians(background.angle)
        x, y = (np.arange(w) + 0.5 - w / 2)[None], (np.arange(h) + 0.5 - h / 2)[:, None]
        along = math.cos(turn) * x + math.sin(turn) * y
        texture = 0.3 * along / (h + w) if background.kind == "gradient" else 0.15 * (wave(along, 8.0, 1.0) - 0.5)
    return np.clip(tone + texture, 0, 1).astype(np.float32)


def render(scene: Scene, layers: tuple[Layer, ...]) -> tuple[Float[ndarray, "3 h w"], Int[ndarray, "h w"]]:
    """The picture, and at each pixel the number of the thing seen there, from 1; 0 is the background."""
    image = np.repeat(backdrop(scene.background, scene.size)[..., None], 3, 2)
    index = np.zeros(scene.size, np.int64)
    for number, one in enumerate(layers, 1):
        pixels = image[one.window]
        for alpha, colour in zip(one.covers, one.colours):
            pixels += alpha[..., None] * (colour - pixels)
        index[one.window][one.mask] = number
    return np.ascontiguousarray(image.transpose(2, 0, 1)), index
