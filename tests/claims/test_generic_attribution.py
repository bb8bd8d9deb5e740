"""The claim runs, its scenes are what they say, and overlap is measured on both sides."""

import torch

from regard.claims import generic_attribution as claim
from regard.worlds.digits import digits


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows] == [False, True, True]


def test_scenes() -> None:
    world, index = digits("test"), torch.arange(40)
    images, labels, masks = claim.scenes(world, index, torch.Generator().manual_seed(0))
    assert images.shape == (40, 1, 28, 56)
    assert torch.equal(labels, world.labels[index])
    left = masks[:, :, :28].flatten(1).any(1)
    assert 5 < left.sum() < 35
    assert not (left & masks[:, :, 28:].flatten(1).any(1)).any()
    sizes = (world.pixels[index] > 100).flatten(1).sum(1)
    assert torch.equal(masks.flatten(1).sum(1), sizes)
    assert images[:, 0][masks].mean() > 1.4
    assert abs(images[:, 0][~masks].median()) < 0.2


def test_mean_iou() -> None:
    maps = torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[[True, True], [False, False]]])
    assert claim.mean_iou(maps, maps > 1) == 1.0
    assert abs(claim.mean_iou(maps, mask) - (1 / 2 + 2 / 3) / 2) < 1e-6
