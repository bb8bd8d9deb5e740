"""English and program text: the same everywhere, disjoint splits, windows that are windows, words that decode."""

import hashlib
import platform
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.text import Words, documents, english, python_source, sha256, to_bytes, to_text, windows
from regard.worlds.world import SPLITS

KNOWN = {
    "train": "0f538c535fbf0b56c23d14fd03016440292725a87b4485e29f16a915b3ce04ef",
    "val": "339cd6b6cafa8165313e19d5c5b29ef85c073e47c4e56103739ae17aad6f82a7",
    "test": "fd189bb7cb49d5b741aab931a210cf1bbc9d1ab28337e0d5edf78bed94ff1bcb",
}
THIS = (platform.python_implementation(), platform.python_version())


@pytest.mark.skipif(THIS != ("CPython", "3.11.7"), reason="the fingerprints are those of CPython 3.11.7")
@pytest.mark.parametrize("split", SPLITS)
def test_the_fingerprint_is_known(split: str) -> None:
    assert sha256(english(split)) == KNOWN[split]


def test_enough_text_in_ascii_most_of_it_to_train_on() -> None:
    parts = {split: english(split) for split in SPLITS}
    total = sum(map(len, parts.values()))
    assert total >= 500_000
    assert 0.75 < len(parts["train"]) / total < 0.85
    assert all(part.min() > 0 and part.max() < 128 for part in parts.values())


def test_splits_share_no_paragraph_and_keep_them_all_in_order() -> None:
    lines = {split: to_text(english(split)).splitlines() for split in SPLITS}
    everything = [paragraph for paragraphs in documents().values() for paragraph in paragraphs]
    assert len(set(everything)) == len(everything) == sum(map(len, lines.values()))
    assert set(everything) == set().union(*lines.values())
    sides = {line: split for split in SPLITS for line in lines[split]}
    for paragraphs in documents().values():
        order = [SPLITS.index(sides[paragraph]) for paragraph in paragraphs]
        assert order == sorted(order)
        assert order[0] == 0


def test_it_is_english() -> None:
    """The commonest words are those of any English text, and no prompt, rule or underline of the sources is left."""
    text = to_text(english())
    common = [word for word, _ in Counter(text.lower().split()).most_common(12)]
    assert {"the", "a", "is", "of", "to", "and", "in"} <= set(common)
    assert not any(sign in text for sign in (">>>", "::=", "****", "\t", "  "))


def test_a_known_sentence_is_there() -> None:
    assert "An identifier occurring as an atom is a name." in to_text(english())


def test_program_text_is_the_modules_end_to_end() -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    data = python_source()
    first, last = (folder / f"{name}.py" for name in ("argparse", "typing"))
    assert bytes(data[:2000].tolist()) == first.read_bytes()[:2000]
    assert bytes(data[-2000:].tolist()) == last.read_bytes()[-2000:]
    assert sha256(data) == hashlib.sha256(bytes(data.tolist())).hexdigest()


@settings(deadline=None)
@given(length=st.integers(1, 20), batch=st.integers(1, 5), seed=st.integers(0, 1000))
def test_windows_are_contiguous_and_follow_the_generator(length: int, batch: int, seed: int) -> None:
    data = torch.arange(100, 120)
    first, again = (windows(data, length, batch, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (batch, length)
    assert (first.diff(dim=1) == 1).all()


def test_windows_reach_both_ends() -> None:
    found = windows(torch.arange(6), 4, 200, torch.Generator().manual_seed(0))
    assert found[:, 0].unique().tolist() == [0, 1, 2]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_words_decode_to_any_text(text: str) -> None:
    words = Words("one two two, three three three.", size=258)
    assert words.words == (" three", " two")
    assert words.decode(words.encode(text)) == text
    assert to_text(to_bytes(text)) == text


def test_words_are_tokens_and_the_rest_bytes() -> None:
    words = Words("a cat, a cat", size=300)
    assert words.words == (" cat", " a")
    assert words.encode("a cat, x").tolist() == [97, 256, 44, 32, 120]
    assert len(words) == 258
    assert len(Words(to_text(english()), 1000)) == 1000


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split='all' must be one of 'train'"):
        english("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data has 3 tokens, length=4"):
        windows(torch.arange(3), 4, 1, torch.Generator())
    with pytest.raises(ValueError, match="batch=0"):
        windows(torch.arange(3), 1, 0, torch.Generator())
    with pytest.raises(ValueError, match="size=255"):
        Words("", 255)
