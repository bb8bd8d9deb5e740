"""The claim runs, and its sentences are what they say."""

import torch

from regard.claims import headmask as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.note for row in rows] == ["random"] * 3 + ["important"] * 3


def test_sentences() -> None:
    source, target = claim.sentences(32, torch.Generator().manual_seed(0))
    assert source.shape == (32, 16)
    for words, translation in zip(source.tolist(), target.tolist(), strict=True):
        assert [w for w in words if w < 10][::-1] == translation
        assert max(words) < claim.START


def test_every_head_can_be_silenced() -> None:
    _, heads = claim.train(None, 0, 1)
    assert len(heads) == 6
    assert sum(heads.values()) == 48
