"""Sentences about pictures, made from what is true of them, and read back into facts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from regard.worlds.shapes.facts import RELATIONS, SIZES, Caption, Found, Phrase, direction, related
from regard.worlds.shapes.scene import CLASSES, COLOURS, PATTERNS, TONES, known

WORDS = {"size": SIZES, "pattern": PATTERNS, "colour": tuple(COLOURS), "shape": CLASSES}
ENDS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
APART, STEEP = 0.15, 1.4


def phrase(found: Found, say: Sequence[str]) -> Phrase:
    """The shape and these attributes of a thing; a pattern of none is left out."""
    said = [name for name in say if not (name == "pattern" and found.pattern == "solid")]
    return Phrase.of(found, *dict.fromkeys(("shape", *said)))


def caption(
    rng: np.random.Generator, found: Sequence[Found], say: Sequence[str] = ("colour",), tone: str | None = None
) -> Caption:
    """All things in a random order, with the relation of each to the next where it is plain to see."""
    order = [int(i) for i in rng.permutation(len(found))]
    relations = []
    for k, (i, j) in enumerate(itertools.pairwise(order)):
        relation = plain_relation(found, i, j)
        if relation:
            relations.append((k, relation, k + 1))
    return Caption(tuple(phrase(found[i], say) for i in order), tuple(relations), tone)


def listing(found: Sequence[Found], say: Sequence[str] = ("colour",), tone: str | None = None) -> Caption:
    """All things in reading order: by thirds of the picture from the top, then from the left."""
    order = sorted(found, key=lambda f: (int(3 * f.centre[1] / f.mask.shape[0]), f.centre[0]))
    return Caption(tuple(phrase(f, say) for f in order), (), tone)


def plain_relation(found: Sequence[Found], i: int, j: int) -> str | None:
    """A relation nobody would dispute: one hides a part of the other, or they are well apart along one axis."""
    for relation in ("in front of", "behind"):
        if related(found, i, relation, j):
            return relation
    return direction(found[i], found[j], APART, STEEP)


def read_phrase(text: str) -> Phrase:
    """The facts in ``"small striped red circle"``.

    Raises:
        ValueError: a word that is not in the language or not in its place.
    """
    words, said = text.split(), {}
    for name, known_words in WORDS.items():
        if words and words[0] in known_words:
            said[name] = words.pop(0)
    if "shape" not in said and words == ["thing"]:
        words = []
    elif "shape" not in said or words:
        raise ValueError(f"{text!r} is no phrase; expected [size] [pattern] [colour] and a shape or 'thing'")
    return Phrase(**said)


def read_caption(text: str) -> Caption:
    """The facts in ``"a red circle left of a blue square and a star on a white background"``; ``str`` is the inverse.

    Raises:
        ValueError: a sentence that is not of this form.
    """
    rest, tone = text.strip(), None
    if rest.endswith(" background"):
        rest, _, tone = f" {rest}".removesuffix(" background").rpartition(" on a ")
        rest = rest.strip()
        known("background", tone, TONES)
    phrases, relations = [], []
    joiners = ("and", *RELATIONS)
    while rest:
        if not rest.startswith("a "):
            raise ValueError(f"{text!r} cannot be read from {rest!r} on; expected 'a' and a phrase")
        places = [(at, joiner) for joiner in joiners if (at := rest.find(f" {joiner} a ")) >= 0]
        end, joiner = min(places, default=(len(rest), ""))
        phrases.append(read_phrase(rest[2:end]))
        rest = rest[end + len(joiner) + 2 :]
        if joiner in RELATIONS:
            relations.append((len(phrases) - 1, joiner, len(phrases)))
    return Caption(tuple(phrases), tuple(relations), tone)


def refer(found: Sequence[Found], i: int) -> str | None:
    """The shortest expression that fits thing i alone, or None where there is none.

    Attributes first, then the relation to a thing that its attributes single out, then an end of the picture.
    """
    one = found[i]
    names = ("shape", "colour", "size", "pattern")
    options = [Phrase.of(one, *say) for n in range(1, 5) for say in itertools.combinations(names, n)]
    for option in options:
        if _fitting(option, found) == [i]:
            return f"the {option}"
    for j, other in enumerate(found):
        anchor = Phrase.of(other, "shape", "colour")
        if j == i or _fitting(anchor, found) != [j]:
            continue
        relation = plain_relation(found, i, j)
        for option in (Phrase.of(one, "shape", "colour"), options[-1]):
            if relation and referents(text := f"the {option} {relation} the {anchor}", found) == [i]:
                return text
    for end in ENDS:
        text = f"the {end} {Phrase.of(one, 'shape', 'colour')}"
        if referents(text, found) == [i]:
            return text
    return None


def referents(text: str, found: Sequence[Found]) -> list[int]:
    """The things that an expression fits.

    Raises:
        ValueError: it is not of the form that :func:`refer` gives.
    """
    if not text.startswith("the "):
        raise ValueError(f"{text!r} must begin with 'the'")
    rest = text.removeprefix("the ")
    first = rest.split(" ", 1)[0]
    if first in ENDS:
        fitting = _fitting(read_phrase(rest.removeprefix(f"{first} ")), found)
        axis, sign = ENDS[first]
        places = {i: sign * found[i].centre[axis] for i in fitting}
        return [i for i in fitting if all(places[i] + 1 < p for j, p in places.items() if j != i)]
    for relation in RELATIONS:
        subject, joiner, anchor = rest.partition(f" {relation} the ")
        if joiner:
            others = _fitting(read_phrase(anchor), found)
            subjects = _fitting(read_phrase(subject), found)
            return [i for i in subjects if any(j != i and related(found, i, relation, j) for j in others)]
    return _fitting(read_phrase(rest), found)


def _fitting(option: Phrase, found: Sequence[Found]) -> list[int]:
    return [i for i, thing in enumerate(found) if option.fits(thing)]


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


@dataclass(frozen=True)
class Vocabulary:
    """All words of the world and their numbers; 0, 1, 2 are padding, start and end."""

    PADDING = 0
    START = 1
    END = 2

    words: tuple[str, ...] = (
        *("<padding>", "<start>", "<end>", "?", "a", "the", "and", "thing", "things"),
        *SIZES,
        *PATTERNS,
        *COLOURS,
        *CLASSES,
        *map(plural, CLASSES),
        *("left", "right", "above", "below", "in", "front", "of", "behind", "on", "background", *TONES),
        *ENDS,
        *("is", "are", "there", "what", "colour", "shape", "pattern", "how", "many", "where", "yes", "no"),
        *("top", "bottom", "centre", *map(str, range(10))),
        *("has", "appeared", "disappeared", "moved", "up", "down", "turned", "become", "nothing", "changed"),
    )

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int | None = None) -> Int[Tensor, " l"]:
        """Start, words, end, and padding up to ``length``.

        Raises:
            ValueError: a word that is not in the vocabulary, more words than fit.
        """
        numbers = {word: i for i, word in enumerate(self.words)}
        unknown = [word for word in text.split() if word not in numbers]
        if unknown:
            raise ValueError(f"text={text!r} has words that are not in the vocabulary: {', '.join(unknown)}")
        out = [self.START, *(numbers[word] for word in text.split()), self.END]
        if length is not None and len(out) > length:
            raise ValueError(f"length={length} must be {len(out)} or more for {text!r}")
        return torch.tensor(out + [self.PADDING] * ((length or len(out)) - len(out)))

    def decode(self, tokens: Int[Tensor, " l"]) -> str:
        """The words up to the end, without start and padding."""
        numbers = tokens.tolist()
        if self.END in numbers:
            numbers = numbers[: numbers.index(self.END)]
        return " ".join(self.words[i] for i in numbers if i not in (self.PADDING, self.START))
