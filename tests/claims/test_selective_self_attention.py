"""The claim runs, and its worlds are what they say."""

import torch

from regard.claims import selective_self_attention as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 5
    assert all(row.passed is not None for row in rows)


def test_graph_pairs() -> None:
    embeddings, target = claim.graph(0)
    torch.testing.assert_close(target.sum(-1), torch.ones(64))
    assert (target[:32] > 0).sum(-1).tolist() == [1] * 32
    assert (target[32:] > 0).sum(-1).tolist() == [12] * 32
    assert (target[32:][target[:32] > 0] > 0).all()
    assert (embeddings[:32] - embeddings[32:]).norm(dim=-1).max() < 0.5
