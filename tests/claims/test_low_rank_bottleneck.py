"""The claim runs, its questions can be answered, and its control is as large as what it is compared with."""

import pytest
import torch

from regard.bench.cost import parameters
from regard.claims import low_rank_bottleneck as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 17
    assert sum(row.passed is not None for row in rows) == 5


def test_recall() -> None:
    keys, values, answers = claim.recall(8, torch.Generator().manual_seed(0))
    assert keys.shape == values.shape == (8, 64)
    stored, asked = keys.split(32, 1)
    found = (asked[:, :, None] == stored[:, None]).long()
    assert (found.sum(-1) == 1).all()
    torch.testing.assert_close(values.gather(1, found.argmax(-1)) - 1, answers)
    assert (values[:, 32:] == 0).all()


def test_control_has_as_many_parameters() -> None:
    fixed, equal = claim.Memory(64, 16, 64), claim.Memory(claim.EQUAL, 16, claim.EQUAL // 16)
    assert parameters(equal) == pytest.approx(parameters(fixed), rel=0.1)
