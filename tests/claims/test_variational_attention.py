"""The claim runs, and its targets leave the uncertainty that they say."""

import math

import torch

from regard.claims import variational_attention as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows] == [False] * 5 + [True] * 8


def test_sentences() -> None:
    source, marked, target = claim.sentences(20_000, torch.Generator().manual_seed(0))
    assert (marked.sum(1) == 2).all()
    pairs = claim.RENAMED[source[marked.bool()]].view(-1, 2)
    first = target == pairs[:, :1]
    assert (first | (target == pairs[:, 1:])).all()
    differ = pairs[:, 0] != pairs[:, 1]
    assert abs(first[differ].double().mean().item() - 0.5) < 0.02
    assert abs(differ.double().mean().item() * math.log(2) - 0.635) < 0.01


def test_a_model_that_knows_reaches_the_floor() -> None:
    model = claim.Copier()
    with torch.no_grad():
        eye = torch.eye(claim.VOCABULARY)
        for p in model.parameters():
            p.zero_()
        model.words.weight[:, : claim.VOCABULARY] = eye
        model.marks.weight[1, -1] = 1.0
        model.w_k.weight[0, -1], model.v[0] = 10.0, 50.0
        model.hidden.weight[: claim.VOCABULARY, claim.DIM : claim.DIM + claim.VOCABULARY] = 10 * eye
        model.head.weight[claim.RENAMED, torch.arange(claim.VOCABULARY)] = 30.0
    assert abs(claim.nats(model, claim.ExactAlignment(), 20_000, 0) - 11 / 12 * math.log(2)) < 0.01
