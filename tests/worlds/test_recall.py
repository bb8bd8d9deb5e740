"""Recall, copying, needles: a dictionary and a search answer every question; rooms are as big as they are said to be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from regard.worlds.recall import EMPTY, IGNORE, MARK, Copy, Needle, Recall, Sequences
from regard.worlds.world import SPLITS

SEEDS = st.integers(0, 2**32)


@st.composite
def recalls(draw: st.DrawFn) -> Recall:
    pairs, passes = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    length = 2 * (pairs * (passes + 1) + draw(st.integers(0, 20)))
    vocab = draw(st.integers(2 * pairs + 2, 100))
    power = draw(st.floats(0.01, 2.0))
    return Recall(
        seed=draw(SEEDS),
        vocab=vocab,
        length=length,
        pairs=pairs,
        passes=passes,
        power=power,
        filled=draw(st.booleans()),
    )


@settings(deadline=None)
@given(recalls())
def test_a_dictionary_answers_every_question(world: Recall) -> None:
    tokens, targets = (part.tolist() for part in world[0])
    said = 2 * world.pairs * world.passes
    assert len(tokens) == len(targets) == world.length
    known = dict(zip(tokens[:said:2], tokens[1:said:2]))
    assert len(known) == len(set(known.values())) == world.pairs
    assert all(1 <= key < world.vocab // 2 <= value < world.vocab for key, value in known.items())
    assert tokens[:said] == tokens[: 2 * world.pairs] * world.passes
    asked = [i for i in range(world.length) if targets[i] != IGNORE]
    assert sorted(tokens[i] for i in asked) == sorted(known)
    assert all(i >= said and i % 2 == 0 and targets[i] == known[tokens[i]] for i in asked)
    others = [tokens[i] for i in range(said, world.length) if i not in asked]
    assert not known.keys() & set(others)
    assert all(0 < other < world.vocab if world.filled else other == EMPTY for other in others)


def test_most_questions_come_soon_and_power_one_spreads_them() -> None:
    """One question, so that nothing is left out: the share of each gap g is that of g^(power - 1), within 4 deviations."""
    for power in (0.01, 1.0):
        world = Recall(pairs=1, length=22, power=power)
        asked = (world.batch(range(4000)).targets != IGNORE).double().mean(0)[2::2]
        chances = torch.arange(1, 11).double() ** (power - 1)
        chances /= chances.sum()
        assert ((asked - chances).abs() < 4 * (chances * (1 - chances) / 4000).sqrt()).all()


@settings(deadline=None)
@given(seed=SEEDS, vocab=st.integers(3, 50), size=st.integers(1, 30), gap=st.integers(0, 10))
def test_the_copy_is_the_original(seed: int, vocab: int, size: int, gap: int) -> None:
    tokens, targets = Copy(seed=seed, vocab=vocab, size=size, gap=gap)[0]
    assert len(tokens) == len(targets) == 2 * size + gap
    said = tokens[:size]
    assert said.min() >= 2
    assert said.max() < vocab
    assert (tokens[size : size + gap] == EMPTY).all()
    assert tokens[size + gap] == MARK
    assert torch.equal(targets[-size:], said)
    assert (targets[:-size] == IGNORE).all()
    assert torch.equal(tokens[size + gap + 1 :], targets[-size:-1])


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 4), needles=st.integers(1, 6), spare=st.integers(0, 30))
def test_a_search_finds_the_needle(data: st.DataObject, size: int, needles: int, spare: int) -> None:
    depth = data.draw(st.none() | st.floats(0.0, 1.0))
    length = 2 * (size + 1) + (needles - 1) * (2 * size + 1) + spare
    vocab = data.draw(st.integers(2 * needles + 4, 60))
    world = Needle(seed=data.draw(SEEDS), vocab=vocab, length=length, size=size, needles=needles, depth=depth)
    tokens, targets = (part.tolist() for part in world[0])
    hay = length - size - 1
    starts = [i for i in range(hay) if tokens[i] < vocab // 2]
    assert len({tokens[i] for i in starts}) == len(starts) == needles
    assert all(later - start > size for start, later in zip(starts, [*starts[1:], hay]))
    assert tokens[hay] == MARK
    start = tokens.index(tokens[hay + 1])
    assert targets == [IGNORE] * (length - size) + tokens[start + 1 : start + 1 + size]
    assert tokens[hay + 1 :] == tokens[start : start + size]
    assert depth is None or start == round(depth * (hay - size - 1))


def test_batches_are_the_samples_and_a_loader_makes_the_same() -> None:
    world = Recall(vocab=64, length=32, count=6)
    batch = world.batch(torch.tensor([5, 0, 1]))
    for row, i in enumerate((5, 0, 1)):
        assert torch.equal(batch.tokens[row], world[i].tokens)
        assert torch.equal(batch.targets[row], world[i].targets)
    loaded = next(iter(DataLoader(world, batch_size=6)))
    assert torch.equal(loaded.tokens, world.batch(range(6)).tokens)


WORLDS = [Recall(count=50), Copy(count=50), Needle(needles=3, count=50)]


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: type(w).__name__)
def test_splits_share_no_sample(world: Sequences) -> None:
    splits = [{str(replace(world, split=s)[i].tokens.tolist()) for i in range(50)} for s in SPLITS]
    assert len(set.union(*splits)) == 150


def test_panels_show_the_answers() -> None:
    sample = Recall(pairs=1, length=4, vocab=8)[0]
    panels = Recall().panels(sample)
    key, value = sample.tokens[:2].tolist()
    assert panels == {"tokens": f"{key} {value} {key} 0", "asked": f"{key} at 2 -> {value}"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recall(pairs=4, length=14), r"length=14 must be 16 or more for 4 pairs"),
        (lambda: Recall(pairs=4, length=22, passes=2), "length=22 must be 24"),
        (lambda: Recall(length=65), "length=65 must be even"),
        (lambda: Recall(pairs=4, vocab=9), "vocab=9 must be 10 or more for 4 different keys"),
        (lambda: Recall(pairs=0), "pairs=0"),
        (lambda: Recall(power=0.0), r"power=0\.0 must be positive"),
        (lambda: Copy(vocab=2), "vocab=2 must be 3"),
        (lambda: Copy(size=0), "size=0"),
        (lambda: Copy(gap=-1), "gap=-1"),
        (lambda: Needle(vocab=7, needles=2), "vocab=7 must be 8 or more for 2 different keys"),
        (lambda: Needle(length=6, needles=2), r"length=6 must be 7 or more for needles=2, size=1"),
        (lambda: Needle(size=0), "size=0"),
        (lambda: Needle(depth=1.5), r"depth=1\.5 must lie between"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_tightest_rooms_do() -> None:
    Recall(pairs=4, length=16, vocab=10)[0]
    Copy(vocab=3, size=1)[0]
    Needle(vocab=8, needles=2, length=7)[0]
