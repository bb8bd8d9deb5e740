"""Counts against formulas, memory against known allocations."""

import pytest
import torch
from torch import Tensor, nn

from regard.bench import cost
from regard.bench.cost import Timing, flops, interleave, measure, parameters, peak_memory
from regard.models.slot import SlotNetwork, mixer
from regard.nn import Attention


def test_parameters_leaves_out_what_is_frozen() -> None:
    model = nn.Linear(3, 5)
    assert parameters(model) == 20
    model.bias.requires_grad_(False)
    assert parameters(model) == 15


@pytest.mark.parametrize("n", [1, 7, 64])
def test_fused_attention_is_counted(n: int) -> None:
    b, h, d = 2, 4, 8
    c = h * d
    found = flops(Attention(c, h), torch.randn(b, n, c))
    projections, products = 4 * 2 * b * n * c * c, 2 * 2 * b * h * n * n * d
    assert found.total == projections + products


def test_open_attention_counts_the_same_and_says_what_is_missed() -> None:
    class Open(Attention):
        def normalize(self, scores: Tensor, mask: Tensor | None) -> Tensor:
            return scores.softmax(-1)

    x = torch.randn(1, 9, 16)
    found = flops(Open(16, 2), x)
    assert found.total == flops(Attention(16, 2), x).total
    assert found.missed["_softmax"] == 2 * 9 * 9
    assert "view" not in found.missed


def test_convolution_is_counted() -> None:
    found = flops(nn.Conv2d(3, 8, 3, padding=1), torch.randn(1, 3, 6, 5))
    assert found.total == 2 * 8 * 3 * 9 * 30
    assert found.missed == {}


def test_peak_memory_of_known_allocations() -> None:
    def call() -> Tensor:
        a = torch.ones(1000, 100)
        b = torch.ones(500, 100)
        del a
        return b + 1

    assert peak_memory(call) == 4 * (100_000 + 50_000)
    assert peak_memory(lambda: None) == 0


def test_peak_memory_sees_what_is_kept_for_backward() -> None:
    x = torch.randn(50, 200, requires_grad=True)

    def call() -> None:
        y = x
        for _ in range(4):
            y = y.exp()
        y.sum().backward()
        x.grad = None

    assert 4 * x.nbytes <= peak_memory(call) <= 7 * x.nbytes


def test_interleave_takes_turns_and_rotates() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleave(calls, rounds=3, warmup=1)
    assert order == [*"abc", *"abc", *"bca", *"cab"]
    assert all(0 <= t.low <= t.median <= t.high for t in found.values())
    assert interleave({}, rounds=3) == {}
    with pytest.raises(ValueError, match="rounds=2"):
        interleave(calls, rounds=2)


def test_interleave_reports_median_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.001, 0.002, 0.003, 0.004, 0.1])
    monkeypatch.setattr(cost, "_seconds", lambda call, device: next(taken))
    assert interleave({"a": lambda: None}, rounds=5)["a"] == Timing(*(pytest.approx(v) for v in (3.0, 2.0, 4.0)))


def test_measure_a_network() -> None:
    networks = {n: SlotNetwork(mixer(n), 3, (8, 8), dim=8, depth=(1,), patch=2) for n in ("attention", "identity")}
    before = networks["attention"].position.detach().clone()
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    found = measure(networks, x, y, rounds=3)
    more, less = found["attention"], found["identity"]
    assert more.parameters - less.parameters == 4 * (8 * 8 + 8)
    assert more.flops.total - less.flops.total == 4 * 2 * 16 * 8 * 8 + 2 * 2 * 16 * 16 * 8
    assert more.step_memory > more.forward_memory > 0
    assert more.step_memory > less.step_memory
    assert not torch.equal(before, networks["attention"].position)
