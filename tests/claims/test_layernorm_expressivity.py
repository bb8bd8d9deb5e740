"""The claim runs, and its sequences have the majority that they say."""

import torch

from regard.claims import layernorm_expressivity as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows] == [False, False, False, True]


def test_majority() -> None:
    counts = claim.majority(64, torch.Generator().manual_seed(0))
    assert counts.shape == (64, 20)
    assert (counts.sum(1) == 50).all()
    for row in counts.tolist():
        first, second, *_ = sorted(row, reverse=True)
        assert first - second >= 6


def test_counts_stand_for_the_sequence() -> None:
    model = claim.Encoder(project=True, radius=None)
    tokens = torch.randint(20, (50,))
    counts = torch.bincount(tokens, minlength=20)[None].float()
    x = model.embed[tokens]
    h = model.norm(x)
    weights = (model.q(h) @ model.k(h).T / 8**0.5).softmax(-1)
    x = x + model.out(weights @ model.v(h))
    x = x + model.mlp(model.norm(x))
    torch.testing.assert_close(model(counts)[0, tokens], x @ model.embed.T, atol=1e-5, rtol=1e-5)
