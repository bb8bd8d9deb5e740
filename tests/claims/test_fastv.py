"""Image tokens kept by chance are as many as FastV keeps; and the claim runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from regard.accelerators.fastv import FastV
from regard.claims import fastv as claim
from regard.core.call import Call
from regard.train.pretrained import trained
from regard.train.recipes import load


def test_chance_keeps_as_many_and_all_text() -> None:
    q, k, v = torch.randn(3, 2, 2, 12, 4)
    call = Call(q, k, v, causal=True)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 1:9] = image[1, 2:10] = True
    valid = torch.ones_like(image)
    ours, chance = (make(keep=0.5).kept(call, image, valid) for make in (FastV, claim.Chance))
    assert ours.shape == chance.shape == (2, 8)
    for row, where in zip(chance, image):
        assert set((~where).nonzero().flatten().tolist()) <= set(row.tolist())
        assert row.diff().min() > 0
    assert torch.equal(chance, claim.Chance(keep=0.5).kept(call, image, valid))
    assert not torch.equal(ours, chance)


def test_questions_and_what_they_are_about() -> None:
    task = load("shapes-vlm", {"tower": ""}).task()
    asked, kinds = claim.asked_of(task, 12, 300)
    assert len(asked) == len(kinds)
    assert "small place" in kinds
    assert "description" not in kinds
    for (_, (one,)), kind in zip(asked, kinds):
        assert one.kind == kind.removeprefix("small ")
        assert len(one.answer.split()) <= 2


@pytest.mark.skipif("shapes-vlm" not in trained(), reason="shapes-vlm is not trained: regard train shapes-vlm")
def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows[:6]] == [False] * 5 + [True]
    assert all(0 <= row.ours <= 100 for row in rows[5:])
