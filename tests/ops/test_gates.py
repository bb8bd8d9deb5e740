"""Pools and gates against loops over pixels."""

from itertools import product
from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from regard.ops import gates

POOLS = {
    "avg": lambda p: sum(p) / len(p),
    "max": max,
    "lp": lambda p: sqrt(sum(x * x for x in p)),
    "lse": lambda p: log(sum(exp(x) for x in p)),
}


def feature_map(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 1, 1), (1, 1, 4, 1)])
@pytest.mark.parametrize("kind", POOLS)
def test_channel_pool(kind: str, shape: tuple[int, ...]) -> None:
    x = feature_map(*shape)
    expected = [[POOLS[kind](channel.flatten().tolist()) for channel in sample] for sample in x]
    torch.testing.assert_close(
        gates.channel_pool(x, kind), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda y: gates.channel_pool(y, kind), x)


def test_channel_pool_is_stable() -> None:
    x = torch.full((1, 1, 2, 3), 1e4)
    assert gates.channel_pool(x, "lse").item() == pytest.approx(1e4 + log(6))
    zero = torch.zeros(1, 1, 2, 3, requires_grad=True)
    assert not torch.autograd.grad(gates.channel_pool(zero, "lp").sum(), zero)[0].any()


def test_ties_share_the_gradient_of_a_maximum() -> None:
    x = torch.tensor([[[[2.0, 1.0], [2.0, 0.0]]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(gates.channel_pool(x, "max").sum(), x)
    assert gradient.tolist() == [[[[0.5, 0.0], [0.5, 0.0]]]]


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_zpool_is_max_then_mean(dim: int) -> None:
    x = feature_map(2, 3, 4, 5)
    out = gates.zpool(x, dim)
    for at in product(*(range(n) for i, n in enumerate(x.shape) if i != dim)):
        line = [(*at[:dim], j, *at[dim:]) for j in range(x.shape[dim])]
        values = [x[i].item() for i in line]
        assert out[line[0]].item() == max(values)
        assert out[line[1]].item() == pytest.approx(sum(values) / len(values), abs=1e-14)
    assert out.shape[dim] == 2
    assert torch.autograd.gradcheck(lambda y: gates.zpool(y, dim), x)


def test_strip_pool_leaves_the_other_axis() -> None:
    x = feature_map(2, 3, 4, 5)
    columns, rows = gates.strip_pool(x, 2), gates.strip_pool(x, 3)
    for b, c, y in product(range(2), range(3), range(4)):
        assert rows[b, c, y].item() == pytest.approx(sum(x[b, c, y].tolist()) / 5, abs=1e-14)
    for b, c, z in product(range(2), range(3), range(5)):
        assert columns[b, c, z].item() == pytest.approx(sum(x[b, c, :, z].tolist()) / 4, abs=1e-14)
    assert torch.equal(gates.strip_pool(x, -1), rows)
    assert torch.autograd.gradcheck(lambda y: gates.strip_pool(y, 2), x)


def test_apply_gate() -> None:
    x, channel, row, pixel = (
        feature_map(2, 3, 4, 5),
        feature_map(2, 3),
        feature_map(2, 3, 4, 1),
        feature_map(2, 1, 4, 5),
    )
    out = gates.apply_gate(x, channel, row, pixel)
    for b, c, y, z in product(range(2), range(3), range(4), range(5)):
        expected = x[b, c, y, z] * channel[b, c] * row[b, c, y, 0] * pixel[b, 0, y, z]
        torch.testing.assert_close(out[b, c, y, z], expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(gates.apply_gate, (x, channel, row, pixel))
    assert gates.apply_gate(x) is x


def test_bad_input_is_named() -> None:
    x = feature_map(2, 3, 4, 5)
    for bad, names in [
        (lambda: gates.channel_pool(x, "median"), "kind='median'"),
        (lambda: gates.strip_pool(x, 1), "axis=1"),
        (lambda: gates.apply_gate(x, x[:, :, 0]), "gate"),
        (lambda: gates.apply_gate(x[:, :1], x), "gate"),
    ]:
        with pytest.raises(ValueError, match=names):
            bad()
