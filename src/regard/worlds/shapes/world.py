"""The world of coloured shapes: pictures of a few things, with every truth about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from regard.worlds.shapes.place import LARGE, PACKED, SMALL, Crowded, Placer
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    COMPOSITES,
    PATTERNS,
    SHAPES,
    TONES,
    Background,
    Pattern,
    Scene,
    known,
)
from regard.worlds.shapes.show import paint
from regard.worlds.world import World

Kind = tuple[str, str]


def kind(text: str) -> Kind:
    """Colour and shape of ``"red circle"``."""
    colour, _, shape = text.partition(" ")
    known("colour", colour, COLOURS)
    known("shape", shape, CLASSES)
    return colour, shape


@dataclass(frozen=True, kw_only=True)
class Shapes(World[ShapesSample]):
    """Scenes of coloured things on a grey background.

    Things that overlap, or nearly touch, differ in colour, so that what is in a picture can be read off it. Backgrounds
    are grey and things are not.

    Args:
        size: side of the picture in pixels.
        things: fewest and most things of a scene.
        shapes, colours, patterns, backgrounds, tones: what is drawn from, each alike.
        composites: draws houses, trees, lollipops and flags as well.
        sizes: smallest and largest thing, in sides of the picture; none lies between 0.27 and 0.33, so that small and large
            are told apart.
        tilt: things are turned by up to so many degrees to either side.
        overlap: how much of the smaller of two things the other may cover.
        visible: how much of every thing is seen at least.
        bias: rows (first, second, p), as in ``("red circle", "blue square", 0.9)``: the thing drawn after a first is a
            second with probability p and anything else otherwise.
        hold_out: kinds, as in ``"red circle"``, that are never in a training or validation scene and of which one is in every
            test scene.

    Raises:
        ValueError: a word, a range or a share that makes no sense, more things than fit, a bias towards what is held out,
            nothing left to draw.
    """

    size: int = 64
    things: tuple[int, int] = (1, 3)
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    patterns: tuple[str, ...] = ("solid",)
    backgrounds: tuple[str, ...] = ("plain",)
    tones: tuple[str, ...] = tuple(TONES)
    composites: bool = False
    sizes: tuple[float, float] = (0.2, 0.46)
    tilt: float = 15.0
    overlap: float = 0.0
    visible: float = 0.7
    bias: tuple[tuple[str, str, float], ...] = ()
    hold_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        vocabularies = {"shapes": CLASSES, "colours": COLOURS, "patterns": PATTERNS, "backgrounds": BACKGROUNDS}
        for name, words in {**vocabularies, "tones": TONES}.items():
            if not getattr(self, name):
                raise ValueError(f"{name}=() must name at least one of {', '.join(map(repr, words))}")
            for word in getattr(self, name):
                known(name, word, words)
        if not 32 <= self.size <= 256:
            raise ValueError(f"size={self.size} must be 32 to 256 pixels")
        if not 0 <= self.things[0] <= self.things[1]:
            raise ValueError(f"things={self.things} must be the fewest and the most things of a scene")
        if not 4 / self.size <= self.sizes[0] <= self.sizes[1] <= 0.7:
            raise ValueError(f"sizes={self.sizes} must rise and lie between 4 pixels and 0.7 sides of the picture")
        if self.sizes[0] > SMALL and self.sizes[1] < LARGE:
            raise ValueError(f"sizes={self.sizes} lie between small (up to 0.27) and large (from 0.33 on)")
        for name in ("overlap", "visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 <= self.tilt <= 180:
            raise ValueError(f"tilt={self.tilt} must lie between 0 and 180 degrees")
        if self.things[1] * self.sizes[0] ** 2 * (1 - self.overlap) > PACKED:
            raise ValueError(
                f"things={self.things} of sizes={self.sizes} do not fit: at most "
                f"{int(PACKED / (self.sizes[0] ** 2 * (1 - self.overlap)))} of them do"
            )
        held = [kind(text) for text in self.hold_out]
        for first, second, p in self.bias:
            kind(first)
            if not 0 <= p <= 1:
                raise ValueError(f"bias={first, second, p}: the probability must lie between 0 and 1")
            if kind(second) in held:
                raise ValueError(f"bias={first, second, p} asks for a kind that hold_out={self.hold_out} leaves out")
        for first in {row[0] for row in self.bias}:
            total = sum(p for a, _, p in self.bias if a == first)
            if total > 1 + 1e-9:
                raise ValueError(
                    f"bias={self.bias}: after {first!r} the probabilities add up to {total:g}, more than 1"
                )
        if not self._kinds:
            raise ValueError(f"hold_out={self.hold_out} leaves nothing to draw")
        if held and self.split == "test" and self.things[0] < 1:
            raise ValueError(f"things={self.things}: a test scene has at least the one thing held out")

    @property
    def _kinds(self) -> list[Kind]:
        """What is drawn from, without what is held out."""
        shapes = (*self.shapes, *(COMPOSITES if self.composites else ()))
        held = {kind(text) for text in self.hold_out}
        return [(c, s) for s in shapes for c in self.colours if (c, s) not in held]

    def make(self, rng: np.random.Generator) -> ShapesSample:
        return ShapesSample.of(self.scene(rng))

    def scene(self, rng: np.random.Generator) -> Scene:
        """One scene from these random numbers.

        Raises:
            ValueError: no place was found for that many things.
        """
        kinds = self.draw_kinds(rng)
        background = Background(
            kind=_one(rng, self.backgrounds),
            tone=_one(rng, self.tones),
            angle=float(rng.uniform(0, 360)),
            seed=int(rng.integers(2**31)),
        )
        patterns = [Pattern(_one(rng, self.patterns)) for _ in kinds]
        placer = Placer(self.size, self.sizes, self.tilt, self.overlap, self.visible, self.colours)
        try:
            placed = placer.place(rng, kinds, patterns)
        except Crowded:
            raise ValueError(
                f"things={self.things} of sizes={self.sizes} with overlap={self.overlap} do not fit; ask for fewer"
            ) from None
        return Scene((self.size, self.size), background, placed)

    def draw_kinds(self, rng: np.random.Generator) -> list[Kind]:
        """Colours and shapes of one scene, in the order in which ``bias`` holds."""
        held = [kind(text) for text in self.hold_out] if self.split == "test" else []
        count = int(rng.integers(self.things[0], self.things[1] + 1))
        drawn: list[Kind] = []
        for i in range(count):
            follow = [(kind(b), p) for a, b, p in self.bias if drawn and kind(a) == drawn[-1]]
            if held and i == 0:
                drawn.append(held[rng.integers(len(held))])
            elif follow:
                u = rng.uniform() - np.cumsum([p for _, p in follow])
                others = [k for k in self._kinds if k not in [b for b, _ in follow]] or self._kinds
                drawn.append(follow[int((u >= 0).sum())][0] if (u < 0).any() else others[rng.integers(len(others))])
            else:
                drawn.append(self._kinds[rng.integers(len(self._kinds))])
        return drawn

    def panels(self, sample: ShapesSample) -> dict[str, Tensor | str]:
        """The picture, what is seen of each thing, and what each would be if nothing hid it."""
        amodal = sample.amodal.float()
        together = amodal.sum(0, keepdim=True) / max(1.0, float(amodal.sum(0).max()))
        return {
            "image": sample.image,
            "things": paint(sample.index),
            "amodal": together.expand(3, -1, -1),
            "depth": sample.depth.expand(3, -1, -1),
        }


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
