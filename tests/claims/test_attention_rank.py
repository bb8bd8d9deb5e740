"""The claim runs, and every low-rank model is at least as large as the full-rank head."""

import torch

from regard.claims import attention_rank as claim
from regard.studies.attention_rank import RankHeads, farthest, nearest


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 16
    assert [row.passed for row in rows if row.metric.startswith("exact")] == [True] * 4


def test_low_rank_is_given_more() -> None:
    scores, everything = [], []
    for rank, heads in claim.MODELS:
        model = RankHeads(16, heads, rank)
        scores.append(model.q.numel() + model.k.numel())
        everything.append(sum(p.numel() for p in model.parameters()))
    assert scores == [512, 512, 512, 512, 2048, 2048]
    assert min(everything[1:]) > everything[0]


def test_tasks() -> None:
    world = torch.Generator().manual_seed(0)
    (x, y), label = claim.neighbours(3, 5, 4)(world)
    assert x.shape == (3, 5, 4)
    assert torch.equal(label, nearest(x, y))
    (x,), label = claim.opposites(3, 5, 4)(world)
    assert torch.equal(label, farthest(x))


def test_training_learns() -> None:
    task = claim.neighbours(64, 2, 3)
    build = lambda: RankHeads(3, 1, 3)  # noqa: E731
    assert claim.trained(build, task, task, 0, 200) < 0.5 * claim.trained(build, task, task, 0, 1)
