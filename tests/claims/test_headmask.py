"""The claim runs, and its sentences are what they say."""

import torch
from torch import nn

from regard.claims import headmask as claim
from regard.objectives.headmask import Head, Loss


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
    _, heads = claim.fit(None, 0, 1)
    assert len(heads) == 6
    assert sum(heads.values()) == 48


def test_heads_are_silenced_in_the_first_two_thirds_of_the_steps() -> None:
    asked = []

    class Mask(claim.RandomHeadMask):
        def choose(self, model: nn.Module, loss: Loss, batch: tuple[object, ...]) -> list[Head]:
            asked.append(chosen := super().choose(model, loss, batch))
            return chosen

    claim.fit(lambda heads: Mask(heads, 6), 0, 9)
    assert [len(set(chosen)) for chosen in asked] == [6] * 6
