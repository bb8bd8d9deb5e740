"""The probe against layers whose properties are known by hand."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from regard.checks.probe import LENGTHS, is_causal, probe, reach_of, state_of
from regard.checks.weights import NotMeasured, summarise, weights_of
from regard.layers.sequence.rela import ReLAGated
from regard.layers.sparse.moba import MoBA
from regard.nn import Attention


class OverQueries(nn.Module):
    """Attention with its softmax over the wrong axis of a square matrix."""

    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(6, 12), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return (q @ k.transpose(1, 2)).softmax(1) @ self.v(x)


class Gate(nn.Module):
    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


class BatchMean(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((0, 1), keepdim=True)


class Noise(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


def test_attention_exactly() -> None:
    report = probe(Attention(dim=16, num_heads=2).double())
    assert report.weights is not None
    assert report.weights.source == "capture"
    assert report.weights.normalised_over == ("keys",)
    assert report.weights.zeros == 0 < report.weights.minimum
    assert report.weights.kept == report.tokens == 32
    assert report.reach == 1
    assert not report.causal
    assert report.equivariance < 1e-12
    assert report.batch == 0
    assert report.deterministic
    assert report.linearity is not None
    assert report.linearity < 1e-12
    assert report.flops == tuple(8 * n * 16**2 + 4 * n**2 * 16 for n in LENGTHS)
    logs = [(math.log(n), math.log(f)) for n, f in zip(LENGTHS, report.flops)]
    assert (logs[1][1] - logs[0][1]) / math.log(2) < report.exponent < (logs[3][1] - logs[2][1]) / math.log(2)
    assert report.state == tuple(2 * n * 16 * 8 for n in LENGTHS)
    assert report.missing == {}


def test_causal_attention() -> None:
    report = probe(Attention(dim=16, num_heads=2, causal=True), tokens=9)
    assert report.causal
    assert report.reach == 10 / 18
    assert report.weights is not None
    assert report.weights.zeros == pytest.approx(8 / 18)
    assert report.equivariance > 1e-3


def test_softmax_over_queries_is_told_from_one_over_keys() -> None:
    report = probe(OverQueries())
    assert report.weights is not None
    assert (report.weights.source, report.weights.normalised_over) == ("softmax", ("queries",))
    low, high = report.weights.over_keys
    assert low < 0.99 < 1.01 < high


def test_gates() -> None:
    report = probe(Gate())
    assert report.weights is not None
    assert (report.weights.source, report.weights.normalised_over) == ("sigmoid", ())
    assert report.weights.minimum > 0
    assert report.weights.maximum < 1
    assert report.reach == pytest.approx(1 / 32)
    assert is_causal(torch.eye(4, dtype=torch.bool))
    assert report.exponent == pytest.approx(1)
    assert report.state is None
    assert report.missing["state"] == "it has no cache"


def test_other_rows_and_chance_are_noticed() -> None:
    assert probe(Gate()).batch == 0
    assert probe(BatchMean()).batch > 1e-3
    assert probe(Gate()).deterministic
    assert not probe(Noise()).deterministic


def test_zeros_of_rela_are_those_of_its_scores() -> None:
    layer, x = ReLAGated(dim=16, num_heads=2).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    q, k, _ = layer.project(x, x)
    scores = layer.scores(q, k)
    found = weights_of(layer, x, {})
    assert found.zeros == (scores <= 0).double().mean()
    assert found.blind == (scores <= 0).all(-1).double().mean()
    assert found.unseen == (scores <= 0).all(-2).double().mean()
    assert found.over_keys == (scores.relu().sum(-1).min(), scores.relu().sum(-1).max())
    assert found.normalised_over == ()


def test_unit_values_stand_in_for_a_site_that_cannot_be_read() -> None:
    layer = MoBA(dim=16, num_heads=2, block_size=4, topk=2).double()
    found = weights_of(layer, torch.randn(2, 16, 16, dtype=torch.float64), {})
    assert found.source == "unit values"
    assert found.normalised_over == ("keys",)
    # The last token reads its own block of four and one more; the first of all itself alone.
    assert found.kept == 8
    assert found.zeros > 1 - 8 / 16


def test_no_weights_no_cache() -> None:
    with pytest.raises(NotMeasured, match="makes no weights"):
        weights_of(nn.Linear(4, 4), torch.randn(2, 5, 4), {})
    with pytest.raises(NotMeasured, match="no cache"):
        state_of(nn.Linear(4, 4), torch.randn(1, 5, 4), {})


def test_reach_is_where_the_jacobian_is_not_zero() -> None:
    kernel = nn.Conv1d(3, 3, 3, padding=1)

    class Slide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernel(x.transpose(1, 2)).transpose(1, 2)

    x = torch.randn(2, 7, 3)
    jacobian = torch.autograd.functional.jacobian(lambda y: Slide()(y[None])[0], x[0])
    expected = jacobian.ne(0).any(1).any(-1)
    assert torch.equal(reach_of(Slide(), x, {}), expected)
    assert expected.sum() == 3 * 7 - 2


def test_an_image_is_its_places() -> None:
    report = probe(nn.Conv2d(3, 3, 3, padding=1), inputs=lambda n: (torch.randn(2, 3, n // 8, 8), {}))
    assert report.reach == pytest.approx((3 * 4 - 2) * (3 * 8 - 2) / 32**2)
    assert report.flops == tuple(2 * n * 9 * 3 * 3 for n in LENGTHS)


def test_the_layer_is_left_alone() -> None:
    layer = Attention(dim=16, num_heads=2, dropout=0.5).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert probe(layer).deterministic
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())


def test_report_is_a_table() -> None:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(probe(Gate()))
    text = console.export_text()
    assert "not measured: it has no cache" in text
    assert "exponent" in text


def test_sums_by_hand() -> None:
    w = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    found = summarise([w], "hand")
    assert found.over_keys == (1, 1)
    assert found.over_queries == (0, 1.5)
    assert (found.minimum, found.maximum, found.zeros) == (0, 1, 0.5)
    assert (found.blind, found.unseen, found.kept) == (0, pytest.approx(1 / 3), 2)
    turned = summarise([w.T], "hand")
    assert turned.normalised_over == ("queries",)
    assert turned.blind == found.unseen


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_turning_weights_exchanges_the_axes(l: int, s: int, seed: int) -> None:
    w = torch.randn(2, l, s, generator=torch.Generator().manual_seed(seed)).relu()
    found, turned = summarise([w]), summarise([w.transpose(1, 2)])
    assert found.over_keys == turned.over_queries
    assert (found.blind, found.unseen, found.zeros) == (turned.unseen, turned.blind, turned.zeros)
    assert summarise([w, w]) == found
    assert summarise([w.softmax(-1)]).normalised_over[:1] == ("keys",)


@pytest.mark.parametrize("lengths", [(32, 64), (64, 32, 128), (32, 32, 64), (0, 1, 2)])
def test_bad_lengths(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lengths=\(.*\) must be three positive numbers"):
        probe(Gate(), lengths)


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="Linear has no dim: give inputs"):
        probe(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="weights is empty"):
        summarise([])
