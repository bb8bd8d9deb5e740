"""Ranks, fits and costs of heads against linear algebra and counting, and the study."""

import pytest
import torch

from regard.bench.cost import flops, parameters
from regard.layers.sequence.low_rank_bottleneck import FixedHeadAttention
from regard.studies.low_rank_bottleneck import LowRankBottleneck, advise, cost, effective_rank, fit_pattern, sweep


def test_effective_rank() -> None:
    low = torch.randn(2, 3, 9, 4, dtype=torch.float64) @ torch.randn(2, 3, 4, 7, dtype=torch.float64)
    assert effective_rank(low).tolist() == [[4] * 3] * 2
    assert effective_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-7]).double()), tol=1e-5) == 2
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_a_head_fits_what_its_size_allows() -> None:
    left = [fit_pattern(8, 16, head_dim, steps=400) for head_dim in (1, 3, 7, 8)]
    divergence, ranks = zip(*left)
    assert divergence[0] > 5 * divergence[1] > 25 * divergence[2]
    assert divergence[3] < 0.01
    assert all(rank <= size for rank, size in zip(ranks, (1, 3, 7, 8)))
    assert fit_pattern(8, 16, 3, steps=400) == left[1]
    assert fit_pattern(8, 16, 3, seed=1, steps=400) != left[1]


def test_few_channels_of_a_token_cannot_be_made_up_for() -> None:
    """With fewer channels than tokens, d < n, not even a head of n channels realizes every pattern."""
    assert fit_pattern(12, 4, 12, steps=400)[0] > 20 * fit_pattern(12, 12, 12, steps=400)[0]


@pytest.mark.parametrize(("dim", "heads", "head_dim", "length"), [(24, 3, 8, 17), (24, 4, 40, 9)])
def test_cost_is_what_is_counted(dim: int, heads: int, head_dim: int, length: int) -> None:
    layer = FixedHeadAttention(dim, heads, head_dim=head_dim, bias=False)
    row = cost(dim, heads, head_dim, length)
    assert row["parameters"] == parameters(layer) - dim
    assert row["flops"] * length == flops(layer, torch.randn(1, length, dim)).total


def test_sweep_has_standard_heads_and_a_width_of_equal_cost() -> None:
    table = sweep([1, 4], [16, 64], [32], 48)
    assert len(table) == 6
    standard = table.where(**{"head size": "standard"})
    assert standard.column("head_dim") == [32, 8]
    assert standard.column("equal_dim") == [32, 32]
    assert standard.column("rank") == [32, 8]
    fixed = table.where(heads=4, head_dim=64)
    assert fixed.column("rank") == [48]
    assert fixed.column("equal_dim") == [round((32 * 4 * 64) ** 0.5)]
    assert 4 * fixed.column("equal_dim")[0] ** 2 == pytest.approx(fixed.column("parameters")[0], rel=0.02)


def test_advice() -> None:
    with pytest.warns(UserWarning, match="head_dim=64 is below the 127"):
        table = advise(512, 8, 128)
    assert table.column("head_dim") == [64, 128]
    assert table.column("parameters") == [4 * 512 * 512, 8 * 512 * 512]
    assert advise(512, 4, 129).column("rank") == [128, 129]


def test_study() -> None:
    study = LowRankBottleneck()
    table = study.run()
    assert table.claims == dict.fromkeys(study.claims, True)
    flat = table.build("broken", [{**row, "divergence": 0.5, "rank": 99} for row in table])
    assert [holds(flat) for holds in study.claims.values()] == [False, False, True, False]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: fit_pattern(0, 4, 4), "n=0"),
        (lambda: fit_pattern(4, 4, 0), "head_dim=0"),
        (lambda: sweep([3], [8], [32], 16), "dims has 32"),
        (lambda: advise(32, 5, 16), "dim=32"),
        (lambda: advise(32, 4, 0), "max_length=0"),
        (lambda: LowRankBottleneck().run("huge"), "scale='huge'"),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
