"""The claim runs."""

import torch

from regard.claims import dual_attention_transformer as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 7
    assert [row.passed is not None for row in rows] == [True, False, False] * 2 + [False]
    assert all(20 < row.ours < 80 for row in rows[2:6:3])


def test_one_object_comes_twice_or_none() -> None:
    objects, labels = claim.draw(200, 0)
    pairs = (torch.cdist(objects, objects) < 1e-3).sum((1, 2)) - claim.OBJECTS
    assert torch.equal(pairs, 2 * labels)
    assert 60 < labels.sum() < 140
