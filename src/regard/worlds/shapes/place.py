"""Where things can stand without hiding each other more than they may."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from regard.worlds.shapes.render import Layer, layer, reach
from regard.worlds.shapes.scene import COMPOSITES, Pattern, Thing

GAP = 2.0
SMALL, LARGE = 0.27, 0.33
PACKED = 0.5


class Crowded(Exception):
    """No place was found."""


def draw_size(rng: np.random.Generator, low: float, high: float) -> float:
    """Uniform in its logarithm between low and high, with nothing between small and large."""
    spans = [(a, b) for a, b in ((low, min(high, SMALL)), (max(low, LARGE), high)) if a <= b]
    lengths = [math.log(b / a) for a, b in spans]
    t = rng.uniform() * sum(lengths)
    if len(spans) == 2 and t > lengths[0]:
        return spans[1][0] * math.exp(t - lengths[0])
    return spans[0][0] * math.exp(t)


def shared(a: Layer, b: Layer) -> int:
    """Pixels that both cover."""
    (ya, xa), (yb, xb) = a.window, b.window
    y0, y1 = max(ya.start, yb.start), min(ya.stop, yb.stop)
    x0, x1 = max(xa.start, xb.start), min(xa.stop, xb.stop)
    if y0 >= y1 or x0 >= x1:
        return 0
    one, other = (
        m.mask[y0 - m.window[0].start : y1 - m.window[0].start, x0 - m.window[1].start : x1 - m.window[1].start]
        for m in (a, b)
    )
    return int((one & other).sum())


def smallest_visible_share(masks: Sequence[Bool[ndarray, "h w"]]) -> float:
    """Of whole masks in painter's order: the share seen of the one that is seen least."""
    shares = [1.0]
    for i, mask in enumerate(masks):
        hidden = mask & np.logical_or.reduce([np.zeros_like(mask), *masks[i + 1 :]])
        shares.append(1 - float(hidden.sum() / max(1, mask.sum())))
    return min(shares)


@dataclass(frozen=True)
class Placer:
    """Puts things at random into a picture of ``side`` pixels; the fields are those of :class:`Shapes`."""

    side: int
    sizes: tuple[float, float]
    tilt: float
    overlap: float
    visible: float
    colours: Sequence[str]

    def place(
        self, rng: np.random.Generator, kinds: Sequence[tuple[str, str]], patterns: Sequence[Pattern]
    ) -> tuple[Thing, ...]:
        """Things of these kinds, wholly inside the picture, in a random painter's order.

        The largest is placed first; many things are smaller than few, and smaller after each vain attempt.

        Raises:
            Crowded: a hundred attempts were in vain.
        """
        low, high = self.sizes
        low = LARGE if SMALL < low < LARGE else low
        high = min(high, math.sqrt(PACKED / max(1, len(kinds)) / max(0.5, 1 - self.overlap)))
        for attempt in range(100):
            top = max(low, high * 0.95**attempt)
            drawn = sorted((draw_size(rng, low, top) for _ in kinds), reverse=True)
            placed: list[tuple[Thing, Layer]] = []
            for size, i in zip(drawn, rng.permutation(len(kinds))):
                stood = self._stand(rng, kinds[i], patterns[i], size * self.side, placed)
                if stood is None:
                    break
                placed.append(stood)
            else:
                order = rng.permutation(len(placed))
                masks = [placed[i][1].full(placed[i][1].mask, (self.side, self.side)) for i in order]
                if self.overlap == 0 or smallest_visible_share(masks) >= self.visible:
                    return tuple(placed[i][0] for i in order)
        raise Crowded

    def _stand(
        self,
        rng: np.random.Generator,
        kind: tuple[str, str],
        pattern: Pattern,
        size: float,
        placed: list[tuple[Thing, Layer]],
    ) -> tuple[Thing, Layer] | None:
        colour, shape = kind
        others = [c for c in self.colours if c != colour] or [colour]
        parts = tuple(others[int(rng.integers(len(others)))] for _ in COMPOSITES.get(shape, ("whole",))[1:])
        angle = float(rng.uniform(-self.tilt, self.tilt))
        thing = Thing(shape, colour, (0.0, 0.0), size, angle, pattern, parts)
        half = reach(thing) + 0.5
        if 2 * half > self.side:
            return None
        for x, y in rng.uniform(half, self.side - half, (40, 2)).tolist():
            thing = replace(thing, centre=(x, y))
            near = [(other, drawn) for other, drawn in placed if not apart(thing, other)]
            if near and (self.overlap == 0 or any(alike(thing, other) for other, _ in near)):
                continue
            mine = layer(thing, (self.side, self.side))
            if all(shared(mine, drawn) <= self.overlap * min(mine.mask.sum(), drawn.mask.sum()) for _, drawn in near):
                return thing, mine
        return None


def apart(a: Thing, b: Thing) -> bool:
    """Whether their upright squares leave a gap between them."""
    far = reach(a) + reach(b) + GAP
    return abs(a.centre[0] - b.centre[0]) >= far or abs(a.centre[1] - b.centre[1]) >= far


def alike(a: Thing, b: Thing) -> bool:
    """Whether they have a colour in common."""
    return not {a.colour, *a.parts}.isdisjoint({b.colour, *b.parts})
