"""Fits against known powers, growth against layers whose growth is known."""

import math

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.scaling import fit_power, scaling


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_fit_of_an_exact_power(power: float) -> None:
    n = [49, 196, 400, 784]
    found = fit_power(n, [3 * value**power for value in n])
    assert found.exponent == pytest.approx(power, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert math.exp(found.offset) == pytest.approx(3)


def test_fit_against_numpy_with_its_error() -> None:
    n = np.array([50.0, 100, 300, 700, 2000])
    y = n**1.3 * np.exp([0.1, -0.2, 0.05, 0.2, -0.1])
    (slope, offset), covariance = np.polyfit(np.log(n), np.log(y), 1, cov=True)
    found = fit_power(n.tolist(), y.tolist())
    assert found.exponent == pytest.approx(slope)
    assert found.offset == pytest.approx(offset)
    assert found.error == pytest.approx(covariance[0, 0] ** 0.5)


@pytest.mark.parametrize("points", [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 0, 3])])
def test_fit_refuses(points: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="point"):
        fit_power(*points)


def test_scaling_finds_the_power_of_memory_and_names_what_is_left_out() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad((x @ x.mT).sum(-1, keepdim=True), (0, x.shape[-1] - 1))

    def picky(dim: int, num_heads: int, grid: tuple[int, int]) -> nn.Module:
        if grid[0] % 2:
            raise ValueError("even sides only")
        return nn.Identity()

    done: list[int] = []
    mixers = {"square": lambda *_: Square(), "picky": picky}
    found = scaling(mixers, 2, 1, (15, 20, 30, 40), report=done.append)
    assert done == [225, 400, 900, 1600]
    square = found["square"]
    assert square.tokens == done
    assert square.memory_fit is not None
    assert square.memory_fit.exponent == pytest.approx(2, abs=0.02)
    assert found["picky"].tokens == [400, 900, 1600]
    assert found["picky"].left_out == [(225, "ValueError: even sides only")]
    assert found["picky"].memory_fit is None


def test_scaling_stops_at_what_is_too_slow() -> None:
    found = scaling({"a": lambda *_: nn.Identity()}, 2, 1, (2, 3), limit=0.0)
    assert found["a"].tokens == [4]
    assert found["a"].left_out == [(9, "took over 0 s at 4 tokens")]
