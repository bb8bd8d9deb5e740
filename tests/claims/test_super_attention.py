"""The claim runs, and its sequences have no token twice."""

import torch

from regard.claims import super_attention as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 10
    assert sum(row.passed is not None for row in rows) == 6
    assert [row.passed for row in rows if row.metric.startswith("weights")] == [True, True]


def test_distinct() -> None:
    tokens = claim.distinct(50, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, claim.LENGTH)
    assert all(len(set(row)) == claim.LENGTH for row in tokens.tolist())
    assert tokens.unique().tolist() == list(range(claim.VOCABULARY))
