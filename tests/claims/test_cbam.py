"""The claim runs, and what it measures with is right."""

import torch

from regard.claims import cbam
from regard.worlds.digits import digits


def test_smoke() -> None:
    rows = cbam.run("smoke", 1)
    assert len(rows) == 3
    assert all(row.passed is not None for row in rows)


def test_area_under_curve() -> None:
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    positive = torch.tensor([False, False, True, True])
    assert cbam.area_under_curve(scores, positive) == 0.75


def test_masks_are_the_strokes_of_the_digits() -> None:
    world = digits("test")
    images, labels, masks = cbam.coloured(world, torch.arange(50), torch.Generator().manual_seed(0))
    assert images.shape == (50, 3, 28, 28)
    assert torch.equal(labels, world.labels[:50])
    for image, mask in zip(images, masks, strict=True):
        colour = image[:, mask].mean(1)
        assert 1.6 < colour.norm() < 2.4
        assert image[:, ~mask].mean(1).norm() < 1.0
