"""The claim runs, and its images are what they say."""

import torch

from regard.claims import triplet_attention as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 4
    assert rows[-1].passed


def test_patch_has_its_colour_and_lies_in_its_quarter() -> None:
    images, hue, quarter = claim.codes(200, 24, torch.Generator().manual_seed(0))
    for image, code, part in zip(images, hue, quarter, strict=True):
        likeness = torch.cosine_similarity(image, claim.PALETTE[code][:, None, None], dim=0) > 1 - 1e-5
        rows = likeness.nonzero()[:, 0]
        assert len(rows) >= 25
        assert ((rows >= 6 * part) & (rows < 6 * part + 7)).sum() >= 25
    assert len(torch.stack([hue, quarter]).unique(dim=1).T) == 16
