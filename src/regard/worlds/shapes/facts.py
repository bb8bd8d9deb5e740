"""What can be said of a picture: things with attributes, and relations between them, whether known or read off an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import CLASSES, COLOURS, PATTERNS, known

SIZES = ("small", "large")
SIDES = ("left of", "right of", "above", "below")
RELATIONS = (*SIDES, "in front of", "behind")
PLAIN = 0.001


@dataclass(frozen=True, eq=False)
class Found:
    """A thing in a picture, either from its scene or as :func:`judge` read it.

    Args:
        shape, colour, pattern, size: words of ``CLASSES``, ``COLOURS``, ``PATTERNS``, ``SIZES``.
        centre: (x, y) in pixels, of the whole thing.
        box: tight around what is seen.
        mask: (h, w), what is seen.
        over: places of the things that it hides a part of, of at least ``PLAIN`` of the picture.
        score: how well picture and thing agree, at most 1.
    """

    shape: str
    colour: str
    pattern: str
    size: str
    centre: tuple[float, float]
    box: tuple[int, int, int, int]
    mask: Bool[Tensor, "h w"]
    over: frozenset[int] = frozenset()
    score: float = 1.0


def truth(sample: ShapesSample) -> list[Found]:
    """What is in a rendered scene, in painter's order."""
    boxes, hidden = sample.boxes.int().tolist(), sample.hidden
    plain = hidden >= max(1, PLAIN * sample.index.numel())
    return [
        Found(
            thing.shape,
            thing.colour,
            thing.pattern.kind,
            sample.scene.size_word(thing),
            thing.centre,
            tuple(box),
            sample.visible[i],
            frozenset(plain[i].nonzero().flatten().tolist()),
        )
        for i, (thing, box) in enumerate(zip(sample.scene.things, boxes))
    ]


@dataclass(frozen=True)
class Phrase:
    """A partial description; None is not said, a shape of None is any thing."""

    shape: str | None = None
    colour: str | None = None
    pattern: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        for name, words in (("shape", CLASSES), ("colour", COLOURS), ("pattern", PATTERNS), ("size", SIZES)):
            if getattr(self, name) is not None:
                known(name, getattr(self, name), words)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.pattern, self.colour, self.shape or "thing") if word)

    def fits(self, found: Found) -> bool:
        said = ((name, getattr(self, name)) for name in ("shape", "colour", "pattern", "size"))
        return all(word is None or getattr(found, name) == word for name, word in said)

    @classmethod
    def of(cls, found: Found, *say: str) -> Phrase:
        """The phrase that says these attributes of a thing."""
        return cls(**{name: getattr(found, name) for name in say})


def direction(a: Found, b: Found, margin: float = 0.08, ratio: float = 1.0) -> str | None:
    """Which of ``SIDES`` of b is a: along the longer axis, by ``margin`` of the picture's shorter side and ``ratio`` times
    the shift along the other axis at least."""
    side = min(a.mask.shape)
    dx, dy = ((q - p) / side for p, q in zip(a.centre, b.centre))
    if max(abs(dx), abs(dy)) <= margin:
        return None
    if abs(dx) >= ratio * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= ratio * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def related(found: Sequence[Found], i: int, relation: str, j: int) -> bool:
    """Whether the relation holds between two of the things."""
    known("relation", relation, RELATIONS)
    if relation == "in front of":
        return j in found[i].over
    if relation == "behind":
        return i in found[j].over
    return direction(found[i], found[j]) == relation


@dataclass(frozen=True)
class Caption:
    """Things, each a different one, the relations between some of them, and the background where it is said.

    Args:
        phrases: one a thing.
        relations: (i, relation, j), places in ``phrases``.
        tone: one of ``TONES``.
    """

    phrases: tuple[Phrase, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    tone: str | None = None

    def __str__(self) -> str:
        joined = {i: relation for i, relation, _ in self.relations}
        words = [
            f"{joined.get(i - 1, 'and')} a {phrase}" if i else f"a {phrase}" for i, phrase in enumerate(self.phrases)
        ]
        return " ".join(words + ([f"on a {self.tone} background"] if self.tone else []))


@dataclass(frozen=True)
class Verdict:
    """Whether each fact of a caption holds; true as a whole if all of them do."""

    facts: tuple[tuple[str, bool], ...]

    def __bool__(self) -> bool:
        return all(holds for _, holds in self.facts)

    @property
    def score(self) -> float:
        """The share of the facts that hold."""
        return sum(holds for _, holds in self.facts) / max(1, len(self.facts))


def check(caption: Caption, found: Sequence[Found], tone: str | None = None) -> Verdict:
    """Holds a caption against what is in a picture.

    Phrases are given to different things so that as many as possible find one; a relation holds if some two different
    things that fit its phrases stand so.
    """
    fits = np.array([[phrase.fits(thing) for thing in found] for phrase in caption.phrases], bool)
    fits = fits.reshape(len(caption.phrases), len(found))
    given = {int(i) for i, j in zip(*linear_sum_assignment(fits, maximize=True)) if fits[i, j]}
    facts = [(f"a {phrase}", i in given) for i, phrase in enumerate(caption.phrases)]
    for i, relation, j in caption.relations:
        pairs = ((a, b) for a in fits[i].nonzero()[0] for b in fits[j].nonzero()[0] if a != b)
        holds = any(related(found, int(a), relation, int(b)) for a, b in pairs)
        facts.append((f"a {caption.phrases[i]} {relation} a {caption.phrases[j]}", holds))
    if caption.tone is not None:
        facts.append((f"on a {caption.tone} background", caption.tone == tone))
    return Verdict(tuple(facts))
