"""The claim runs, and what shortcuts are compared with is at least as large."""

import pytest
import torch

from regard.bench.cost import flops, parameters
from regard.claims import layerwise_shortcuts as claim
from regard.models.language._decoder import DecoderLM


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows] == [False] * 4 + [True]
    assert [row.metric for row in rows if row.baseline is not None] == [
        "nats per byte",
        "nats per byte, beside equal parameters",
        "nats per byte, beside equal FLOPs",
    ]


def test_text() -> None:
    train, test = claim.text()
    assert len(train) > 5 * len(test) > 500_000
    crops = claim.crops(train, 3, 20, torch.Generator().manual_seed(0))
    assert crops.shape == (3, 21)
    text = bytes(train.tolist())
    assert all(bytes(crop.tolist()) in text for crop in crops)


@pytest.mark.parametrize("measure", [parameters, lambda model: flops(model, torch.zeros(1, 8, dtype=torch.long)).total])
def test_widened(measure) -> None:
    def build(mlp_dim: int) -> DecoderLM:
        return DecoderLM(256, 16, 4, depth=6, context=8, mlp_dim=mlp_dim, dropout=0.0)

    least = measure(build(100))
    width = claim.widened(build, least, measure, 64)
    assert width == 104
    assert measure(build(width)) >= least
