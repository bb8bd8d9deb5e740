"""The claim runs; its scenes and its index are right."""

import torch
from sklearn.metrics import adjusted_rand_score

from regard.claims import slot_attention as claim


def test_smoke() -> None:
    assert len(claim.run("smoke", 1)) == 3


def test_rand_index() -> None:
    for _ in range(20):
        a, b = torch.randint(4, (60,)), torch.randint(3, (60,))
        assert abs(claim.rand_index(a, b) - adjusted_rand_score(b, a)) < 1e-12
    same = torch.tensor([0, 0, 1, 2])
    assert claim.rand_index(torch.tensor([2, 2, 0, 1]), same) == 1.0


def test_scenes() -> None:
    images, labels = claim.scenes(64, 2, 4, torch.Generator().manual_seed(0))
    counts = [len(set(label.unique().tolist()) - {0}) for label in labels]
    assert set(counts) == {2, 3, 4}
    for image, label in zip(images, labels, strict=True):
        for number in label.unique():
            colours = image[:, label == number].unique(dim=1)
            assert colours.shape[1] == 1
        assert ((label > 0).float().mean() < 0.5).item()
        sizes = torch.bincount(label.flatten())[1:]
        assert (sizes[sizes > 0] >= 12).all(), "an object is cut off"


def test_things_stand_apart_and_anywhere() -> None:
    _, labels = claim.scenes(64, 5, 6, torch.Generator().manual_seed(0))
    centres = [torch.stack([(one == n).nonzero().float().mean(0) for n in one.unique()[1:]]) for one in labels]
    assert min(torch.pdist(c).min().item() for c in centres) > 5.0
    assert torch.cat(centres).floor().unique(dim=0).shape[0] > 150
    assert sum(len(c) >= 5 for c in centres) > 0.9 * len(centres)


def test_plain_attention_sums_to_one_over_inputs() -> None:
    layer = claim.PlainAttention(8, num_slots=3)
    _, weights = layer.trace(torch.randn(2, 5, 8))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 3))
