"""The claim runs, and what it measures with is right."""

import torch

from regard.claims import cbam


def test_smoke() -> None:
    rows = cbam.run("smoke", 1)
    assert len(rows) == 3
    assert all(row.passed is not None for row in rows)


def test_area_under_curve() -> None:
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    positive = torch.tensor([False, False, True, True])
    assert cbam.area_under_curve(scores, positive) == 0.75
