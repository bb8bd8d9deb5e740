"""What is said is true: every sentence is held against the geometry of its scene, not against the code that made it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.shapes.facts import RELATIONS, Caption, Found, Phrase, check, related, truth
from regard.worlds.shapes.language import (
    ENDS,
    Vocabulary,
    caption,
    listing,
    plain_relation,
    read_caption,
    read_phrase,
    refer,
    referents,
)
from regard.worlds.shapes.questions import KINDS, absent, attribute, cell, count, existence, questions, relation
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import CLASSES, COLOURS, PATTERNS, TONES, Background, Pattern, Scene, Thing
from regard.worlds.shapes.world import Shapes

WORLD = Shapes(things=(1, 5), overlap=0.25, patterns=PATTERNS, composites=True)
NARROW = Shapes(things=(3, 5), shapes=("circle", "star"), colours=("red", "blue"), overlap=0.2)
indices = st.integers(0, 9_999)
quick = settings(max_examples=40, deadline=None)
ATTRIBUTES = ("colour", "size", "pattern")


def scene_of(*things: Thing, tone: str = "white") -> list[Found]:
    return truth(ShapesSample.of(Scene((64, 64), Background(tone=tone), things)))


def holds(sample: ShapesSample, i: int, word: str, j: int) -> bool:
    """The relation, from the masks."""
    if word in ("in front of", "behind"):
        front, back = (i, j) if word == "in front of" else (j, i)
        return front > back and bool((sample.amodal[front] & sample.amodal[back]).any())
    (xi, yi), (xj, yj) = (sample.scene.things[k].centre for k in (i, j))
    dx, dy = xj - xi, yj - yi
    return {
        "left of": dx > abs(dy),
        "right of": -dx > abs(dy),
        "above": dy > abs(dx),
        "below": -dy > abs(dx),
    }[word]


def described(sample: ShapesSample, i: int, phrase: Phrase) -> bool:
    thing = sample.scene.things[i]
    words = {thing.shape, thing.colour, thing.pattern.kind, "large" if thing.size >= 0.3 * 64 else "small", "thing"}
    return set(str(phrase).split()) <= words


@quick
@given(indices, st.sets(st.sampled_from(ATTRIBUTES)))
def test_captions_are_true(index: int, say: set[str]) -> None:
    sample = WORLD[index]
    found, rng = truth(sample), np.random.default_rng(index)
    made = caption(rng, found, sorted(say), sample.scene.background.tone)
    n = len(found)
    assert len(made.phrases) == n
    assert any(
        all(described(sample, i, p) for i, p in zip(order, made.phrases))
        and all(holds(sample, order[i], word, order[j]) for i, word, j in made.relations)
        for order in itertools.permutations(range(n))
    )
    assert check(made, found, sample.scene.background.tone)


@quick
@given(indices)
def test_captions_are_read_back(index: int) -> None:
    found = truth(WORLD[index])
    made = caption(np.random.default_rng(index), found, ATTRIBUTES, "grey")
    assert read_caption(str(made)) == made
    assert read_caption(str(listing(found, ("colour",)))) == listing(found, ("colour",))


phrases = st.builds(
    Phrase,
    *(st.none() | st.sampled_from(words) for words in (CLASSES, tuple(COLOURS), PATTERNS, ("small", "large"))),
)


joiners = st.lists(st.none() | st.sampled_from(RELATIONS), min_size=4, max_size=4)


@quick
@given(st.lists(phrases, max_size=5), joiners, st.none() | st.sampled_from(tuple(TONES)))
def test_reading_is_the_inverse_of_writing(said: list[Phrase], words: list[str | None], tone: str | None) -> None:
    relations = tuple((i, w, i + 1) for i, w in enumerate(words[: max(0, len(said) - 1)]) if w)
    made = Caption(tuple(said), relations, tone)
    assert read_caption(str(made)) == made
    Vocabulary().encode(str(made))


@quick
@given(indices)
def test_a_wrong_caption_fails_where_it_is_wrong(index: int) -> None:
    sample = WORLD[index]
    found = truth(sample)
    present = {t.kind for t in sample.scene.things}
    wrong = absent(np.random.default_rng(index), found, "random")
    assert wrong is not None
    assert str(wrong) not in present
    verdict = check(Caption((Phrase.of(found[0], "shape"), wrong)), found)
    assert [ok for _, ok in verdict.facts] == [True, False]
    assert verdict.score == 0.5


def test_each_phrase_needs_a_thing_of_its_own() -> None:
    found = scene_of(Thing("circle", "red", (16, 16), 14), Thing("circle", "blue", (48, 16), 14))
    assert check(read_caption("a circle and a red circle"), found)
    assert check(read_caption("a thing and a circle"), found)
    assert not check(read_caption("a red circle and a red circle"), found)
    assert not check(read_caption("a circle and a circle and a circle"), found)
    assert not check(read_caption("a circle on a white background"), found, "grey")
    assert not check(read_caption("a star"), [])
    assert check(Caption(()), found).score == 0


def test_relations_by_hand() -> None:
    found = scene_of(
        Thing("square", "red", (24, 32), 20), Thing("star", "blue", (36, 34), 20), Thing("ring", "green", (25, 8), 14)
    )
    assert str(listing(found)) == "a green ring and a red square and a blue star"
    expected = {(0, "left of", 1), (1, "right of", 0), (2, "above", 0), (0, "below", 2), (2, "above", 1), (1, "below", 2),
                (1, "in front of", 0), (0, "behind", 1)}  # fmt: skip
    for i, j in itertools.permutations(range(3), 2):
        for word in RELATIONS:
            assert related(found, i, word, j) == ((i, word, j) in expected), (i, word, j)
    assert check(read_caption("a blue star in front of a red square"), found)
    assert not check(read_caption("a red square in front of a blue star"), found)
    assert plain_relation(found, 2, 1) == "above"
    with pytest.raises(ValueError, match="relation='near'"):
        related(found, 0, "near", 1)


@quick
@given(indices)
def test_expressions_single_their_target_out(index: int) -> None:
    sample = NARROW[index]
    found = truth(sample)
    for i in range(len(found)):
        text = refer(found, i)
        if text is None:
            continue
        assert referents(text, found) == [i]
        words = text.split()
        if words[1] in ENDS or any(word in text for word in RELATIONS):
            continue
        fitting = [j for j in range(len(found)) if described(sample, j, read_phrase(" ".join(words[1:])))]
        assert fitting == [i]


def test_nearly_everything_can_be_referred_to() -> None:
    texts = [refer(truth(s), i) for s in map(NARROW.__getitem__, range(60)) for i in range(len(s.scene.things))]
    assert sum(text is not None for text in texts) / len(texts) > 0.95
    assert any(text and "most" in text for text in texts)
    assert any(text and "left of" in text for text in texts)


def test_twins_are_told_apart_by_place() -> None:
    found = scene_of(Thing("circle", "red", (12, 12), 14), Thing("circle", "red", (50, 12), 14))
    assert refer(found, 0) == "the leftmost red circle"
    found = scene_of(
        Thing("circle", "red", (12, 12), 14), Thing("circle", "red", (50, 12), 14), Thing("star", "blue", (50, 50), 14)
    )
    assert refer(found, 1) == "the red circle above the blue star"
    assert refer(found, 2) == "the star"
    with pytest.raises(ValueError, match="must begin with 'the'"):
        referents("a star", found)


@quick
@given(indices)
def test_answers_are_true(index: int) -> None:
    sample = WORLD[index]
    found, things = truth(sample), sample.scene.things
    vocabulary = Vocabulary()
    for q in questions(np.random.default_rng(index), found):
        assert q.kind in KINDS
        assert vocabulary.decode(vocabulary.encode(f"{q.text} {q.answer}")) == f"{q.text} {q.answer}"
        words = q.text.removesuffix(" ?").split()
        if q.kind == "existence":
            phrase = read_phrase(" ".join(words[3:]))
            assert (q.answer == "yes") == any(described(sample, i, phrase) for i in range(len(things)))
        elif q.kind == "count":
            *rest, noun = words[2:-2]
            singular = "cross" if noun == "crosses" else noun.removesuffix("s")
            phrase = read_phrase(" ".join([*rest, singular]))
            assert int(q.answer) == sum(described(sample, i, phrase) for i in range(len(things)))
        elif q.kind in ("colour", "shape", "pattern"):
            (i,) = q.about
            assert (
                q.answer
                == {"colour": things[i].colour, "shape": things[i].shape, "pattern": things[i].pattern.kind}[q.kind]
            )
            assert [j for j in range(len(things)) if described(sample, j, read_phrase(" ".join(words[4:])))] == [i]
        elif q.kind == "relation":
            i, j = q.about
            word = next(r for r in RELATIONS if f" {r} the " in q.text.removeprefix(f"is {refer(found, i)}"))
            assert (q.answer == "yes") == holds(sample, i, word, j)
            assert q.text == f"is {refer(found, i)} {word} {refer(found, j)} ?"
        else:
            x, y = things[q.about[0]].centre
            column, row = ("left", "", "right")[int(x / 64 * 3)], ("top", "", "bottom")[int(y / 64 * 3)]
            assert q.answer == (f"{row} {column}".strip() or "centre")


def test_yes_and_no_come_alike() -> None:
    asked = [q for i in range(200) for q in questions(np.random.default_rng(i), truth(WORLD[i]))]
    for kind in ("existence", "relation"):
        share = np.mean([q.answer == "yes" for q in asked if q.kind == kind])
        assert 0.35 < share < 0.65
    assert {q.kind for q in asked} == set(KINDS)


def test_questions_by_hand() -> None:
    found = scene_of(
        Thing("star", "red", (10, 32), 12, pattern=Pattern("striped")), Thing("star", "blue", (54, 56), 14)
    )
    assert existence(Phrase("star", "blue"), found).about == (1,)
    assert count(Phrase("star"), found).text == "how many stars are there ?"
    assert count(Phrase(colour="green"), found).answer == "0"
    asked = attribute(found, 0, "colour")
    assert asked is not None
    assert (asked.text, asked.answer) == ("what colour is the small striped star ?", "red")
    assert attribute(found, 1, "pattern").answer == "solid"  # type: ignore[union-attr]
    assert [cell(f) for f in found] == ["left", "bottom right"]
    assert relation(np.random.default_rng(0), found[:1], True) is None
    twins = scene_of(Thing("star", "red", (10, 10), 12), Thing("star", "blue", (12, 40), 12))
    assert attribute(twins, 0, "colour") is None


def test_absent_kinds_of_a_bias() -> None:
    rng, bias = np.random.default_rng(0), (("red star", "blue ring", 0.9), ("pink ring", "green star", 0.9))
    found = scene_of(Thing("star", "red", (10, 32), 12))
    assert str(absent(rng, found, "adversarial", bias)) == "blue ring"
    assert {str(absent(rng, found, "popular", bias)) for _ in range(20)} == {"blue ring", "green star"}
    both = scene_of(Thing("star", "red", (10, 32), 12), Thing("ring", "blue", (40, 32), 12))
    assert absent(rng, both, "adversarial", bias) is None


def test_vocabulary() -> None:
    vocabulary = Vocabulary()
    assert len(set(vocabulary.words)) == len(vocabulary)
    tokens = vocabulary.encode("a red circle", 8)
    assert tokens.tolist()[0] == vocabulary.START
    assert tokens.tolist()[4:] == [vocabulary.END] + [vocabulary.PADDING] * 3
    assert tokens.dtype == torch.int64
    assert vocabulary.decode(tokens) == "a red circle"
    with pytest.raises(ValueError, match="length=4 must be 5"):
        vocabulary.encode("a red circle", 4)
    with pytest.raises(ValueError, match="vocabulary: mauve"):
        vocabulary.encode("a mauve circle")


@pytest.mark.parametrize(
    "text", ["red circle", "a circle red", "a red", "a red circle by a star", "a star on a mauve background"]
)
def test_sentences_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|must be one of"):
        read_caption(text)
