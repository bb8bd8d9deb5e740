"""The claim runs, its digits can be found, and both models are stretched alike."""

import torch

from regard.claims import coca as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 7
    assert sum(row.passed is not None for row in rows) == 3


def test_passkeys() -> None:
    data = torch.arange(10_000) % 97
    tokens = claim.passkeys(data, 200, 64, torch.Generator().manual_seed(0))
    assert tokens.shape == (200, 65)
    assert ((tokens == claim.MARKER).sum(-1) == 2).all()
    place = (tokens == claim.MARKER).int().argmax(-1)
    assert torch.equal(tokens[torch.arange(200), place + 1], tokens[:, -1])
    assert (tokens[:, -2] == claim.MARKER).all()
    assert place.max() < 60
    assert set(tokens[:, -1].tolist()) == set(range(48, 58))


def test_both_are_stretched_alike() -> None:
    for length in (64, claim.TRAINED, 512):
        rotary, collinear = claim.Block(False), claim.Block(True)
        for block in (rotary, collinear):
            block.place(length)
        angles = collinear.attention.angles(torch.ones(1), length)
        torch.testing.assert_close(angles[0], rotary.attention.rotary.rates)
    assert sum(p.numel() for p in rotary.parameters()) == sum(p.numel() for p in collinear.parameters())
