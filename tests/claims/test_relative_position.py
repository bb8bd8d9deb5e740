"""The claim runs, and what it asks for is in its sequences."""

import pytest
import torch

from regard.claims import relative_position as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 14
    assert sum(row.passed is not None for row in rows) == 13


def test_tokens_to_the_left() -> None:
    tokens, targets, answers = claim.to_the_left(4, 9, torch.Generator().manual_seed(0))
    assert torch.equal(targets[:, 3:], tokens[:, :-3])
    assert answers.sum(-1).tolist() == [6] * 4


@pytest.mark.parametrize("length", [claim.TRAINED, claim.LONGER])
def test_tokens_between_markers(length: int) -> None:
    tokens, targets, answers = claim.between_markers(500, length, torch.Generator().manual_seed(0))
    enclosed = (tokens[:, :-2] == claim.OPEN) & (tokens[:, 2:] == claim.CLOSE)
    assert (enclosed.sum(-1) == 1).all()
    assert torch.equal(tokens[:, 1:-1][enclosed][:, None].expand(-1, length), targets)
    assert ((tokens == claim.OPEN).sum(-1) == 2).all()
    assert ((tokens == claim.CLOSE).sum(-1) == 2).all()
    assert answers.all()
    assert (targets < claim.VOCABULARY).all()
