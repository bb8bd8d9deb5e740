"""Questions about pictures and their answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from regard.worlds.shapes.facts import RELATIONS, SIDES, Found, Phrase, direction
from regard.worlds.shapes.language import plain_relation, plural, refer
from regard.worlds.shapes.scene import CLASSES, COLOURS

KINDS = ("existence", "count", "colour", "shape", "pattern", "place", "relation")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class Question:
    """A question, its answer in one or two words, and the places of the things it is about.

    Args:
        kind: one of ``KINDS``.
    """

    text: str
    answer: str
    kind: str
    about: tuple[int, ...] = ()


def existence(phrase: Phrase, found: Sequence[Found]) -> Question:
    about = tuple(i for i, thing in enumerate(found) if phrase.fits(thing))
    return Question(f"is there a {phrase} ?", "yes" if about else "no", "existence", about)


def count(phrase: Phrase, found: Sequence[Found]) -> Question:
    *words, noun = str(phrase).split()
    about = tuple(i for i, thing in enumerate(found) if phrase.fits(thing))
    return Question(f"how many {' '.join([*words, plural(noun)])} are there ?", str(len(about)), "count", about)


def cell(found: Found) -> str:
    """Where a thing is on a grid of three by three: ``"top left"``, ``"top"``, ..., ``"centre"``."""
    h, w = found.mask.shape
    row, column = (min(2, max(0, int(3 * p / n))) for p, n in zip(reversed(found.centre), (h, w)))
    return f"{ROWS[row]} {COLUMNS[column]}".strip() or "centre"


def attribute(found: Sequence[Found], i: int, kind: str) -> Question | None:
    """What colour, shape or pattern thing i is, or its place; None where it cannot be singled out without the answer."""
    if kind == "place":
        text = refer(found, i)
        return None if text is None else Question(f"where is {text} ?", cell(found[i]), kind, (i,))
    said = [name for name in ("shape", "colour", "size", "pattern") if name != kind]
    for n in range(1, 4):
        phrase = Phrase.of(found[i], *said[:n])
        if [j for j, thing in enumerate(found) if phrase.fits(thing)] == [i]:
            return Question(f"what {kind} is the {phrase} ?", getattr(found[i], kind), kind, (i,))
    return None


def relation(rng: np.random.Generator, found: Sequence[Found], true: bool) -> Question | None:
    """Whether one thing is to one side of another; None where no two things are plainly so."""
    names = [refer(found, i) for i in range(len(found))]
    plain = [i for i, name in enumerate(names) if name and not any(word in name for word in RELATIONS)]
    pairs = [(i, j) for i, j in itertools.permutations(plain, 2) if plain_relation(found, i, j) in SIDES]
    if not pairs:
        return None
    i, j = pairs[rng.integers(len(pairs))]
    actual = direction(found[i], found[j])
    asked = actual if true else [side for side in SIDES if side != actual][rng.integers(3)]
    return Question(f"is {names[i]} {asked} {names[j]} ?", "yes" if true else "no", "relation", (i, j))


def absent(
    rng: np.random.Generator,
    found: Sequence[Found],
    how: Literal["random", "popular", "adversarial"],
    bias: Sequence[tuple[str, str, float]] = (),
) -> Phrase | None:
    """A colour and shape that no thing has: any; one that a bias adds often; one that usually goes with a thing in sight.

    ``popular`` and ``adversarial`` give None where the bias has no such kind.
    """
    here = {f"{f.colour} {f.shape}" for f in found}
    if how == "random":
        kinds = [f"{colour} {shape}" for colour in COLOURS for shape in CLASSES]
    else:
        kinds = [second for first, second, _ in bias if how == "popular" or first in here]
    kinds = [kind for kind in kinds if kind not in here]
    if not kinds:
        return None
    colour, shape = kinds[rng.integers(len(kinds))].split()
    return Phrase(shape, colour)


def questions(rng: np.random.Generator, found: Sequence[Found]) -> list[Question]:
    """One question of each kind that can be asked, of things drawn at random; yes and no come alike."""
    asked: list[Question | None] = []
    some = found[int(rng.integers(len(found)))] if found else None
    yes = some is not None and rng.uniform() < 0.5
    phrase = Phrase.of(some, "shape", "colour") if yes and some else absent(rng, found, "random")
    asked.append(existence(phrase, found) if phrase else None)
    if some is not None:
        say = (("shape",), ("colour",), ("shape", "colour"))[rng.integers(3)]
        asked.append(count(Phrase.of(some, *say), found))
        i = int(rng.integers(len(found)))
        asked += [attribute(found, i, kind) for kind in ("colour", "shape", "pattern", "place")]
        asked.append(relation(rng, found, bool(rng.uniform() < 0.5)))
    return [question for question in asked if question is not None]
