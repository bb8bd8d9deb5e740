"""What is in a picture: things of a shape, a colour and a pattern, painted one over the other on a background."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
COMPOSITES = {
    "house": ("wall", "roof", "door"),
    "tree": ("crown", "trunk"),
    "lollipop": ("candy", "stick"),
    "flag": ("cloth", "pole"),
}
CLASSES = (*SHAPES, *COMPOSITES)
COLOURS = {
    "red": (0.90, 0.06, 0.08),
    "orange": (1.00, 0.48, 0.00),
    "yellow": (0.98, 0.90, 0.05),
    "green": (0.08, 0.66, 0.12),
    "cyan": (0.05, 0.80, 0.82),
    "blue": (0.10, 0.28, 0.92),
    "purple": (0.52, 0.10, 0.82),
    "pink": (1.00, 0.35, 0.73),
}
PATTERNS = ("solid", "striped", "dotted", "checked")
TONES = {"white": 0.95, "grey": 0.60, "black": 0.06}
BACKGROUNDS = ("plain", "noise", "gradient", "stripes")
SHADE = 0.45
LARGE = 0.3


def known(argument: str, value: str, words: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of the words."""
    if value not in words:
        raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, words))}")


@dataclass(frozen=True)
class Pattern:
    """A second tone on a thing.

    Args:
        kind: one of ``PATTERNS``.
        period: distance from stripe to stripe, dot to dot, check to check of the same tone, in sizes of the thing.
        angle: degrees by which it is turned against the thing.
        second: the colour of the second tone; without it a dark shade of the thing's own.
    """

    kind: str = "solid"
    period: float = 0.36
    angle: float = 0.0
    second: str | None = None

    def __post_init__(self) -> None:
        known("kind", self.kind, PATTERNS)
        if self.second is not None:
            known("second", self.second, COLOURS)
        if self.period <= 0:
            raise ValueError(f"period={self.period} must be positive")


@dataclass(frozen=True)
class Thing:
    """One thing; lengths in pixels, x to the right, y down.

    Args:
        shape: one of ``CLASSES``.
        colour: of the thing, of the first part where it has several.
        centre: (x, y).
        size: side of the square that just holds it before it is turned.
        angle: degrees, clockwise as seen.
        pattern: of the first part.
        parts: colours of the further parts, in the order of ``COMPOSITES``.
    """

    shape: str
    colour: str
    centre: tuple[float, float]
    size: float
    angle: float = 0.0
    pattern: Pattern = Pattern()
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known("shape", self.shape, CLASSES)
        for colour in (self.colour, *self.parts):
            known("colour", colour, COLOURS)
        if self.size <= 0:
            raise ValueError(f"size={self.size} must be positive")
        wanted = len(COMPOSITES.get(self.shape, ("whole",))) - 1
        if len(self.parts) != wanted:
            raise ValueError(f"parts={self.parts} must be {wanted} colours for a {self.shape}")

    @property
    def kind(self) -> str:
        """Colour and shape, ``"red circle"``."""
        return f"{self.colour} {self.shape}"

    @property
    def part_names(self) -> tuple[str, ...]:
        return COMPOSITES.get(self.shape, ("whole",))


@dataclass(frozen=True)
class Background:
    """A background without colour: plain, or textured around its tone.

    Args:
        kind: one of ``BACKGROUNDS``.
        tone: one of ``TONES``.
        angle: degrees, of a gradient or of stripes.
        seed: of the noise.
    """

    kind: str = "plain"
    tone: str = "white"
    angle: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        known("kind", self.kind, BACKGROUNDS)
        known("tone", self.tone, TONES)


@dataclass(frozen=True)
class Scene:
    """A background and the things on it, the farthest first: each is painted over those before it.

    Args:
        size: (height, width) in pixels.
    """

    size: tuple[int, int]
    background: Background = Background()
    things: tuple[Thing, ...] = ()

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size={self.size} must be a height and a width in pixels")

    def size_word(self, thing: Thing) -> str:
        """``"large"`` from 0.3 of the shorter side on, else ``"small"``."""
        return "large" if thing.size >= LARGE * min(self.size) else "small"

    def scaled(self, factor: int) -> Scene:
        """The same things drawn so many times finer."""
        things = tuple(
            replace(t, centre=(t.centre[0] * factor, t.centre[1] * factor), size=t.size * factor) for t in self.things
        )
        return replace(self, size=(self.size[0] * factor, self.size[1] * factor), things=things)
