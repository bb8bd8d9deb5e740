"""What is concluded from figures made up for the purpose."""

import math

import pytest

from regard.bench.cost import Cost, Flops, Timing
from regard.view.comparison import Comparison, Row, gap, within

N = 100


def row(layer: str, right: list[int], ms: float | None) -> Row:
    runs = [{"accuracy": [0.1, r / N], "correct": "1" * r + "0" * (N - r)} for r in right]
    time = Timing(ms, ms, ms) if ms else None
    return Row(layer, "baseline", runs=runs, cost=Cost(1, Flops(1, {}), time, time, 1, 1) if time else None)


def made(*rows: Row) -> Comparison:
    return Comparison({}, list(rows))


def test_gap_is_paired() -> None:
    better, worse = row("a", [90], 1), row("b", [80], 1)
    difference, error = gap(better, worse)
    assert difference == pytest.approx(0.1)
    # ten images of a hundred differ, all in one direction: the deviation of the differences is that of a share of 0.1
    assert error == pytest.approx(math.sqrt(0.1 * 0.9 * N / (N - 1) / N))


def test_gap_adds_the_spread_over_seeds() -> None:
    alone = gap(row("a", [90], 1), row("b", [80], 1))[1]
    a, b = row("a", [85, 95], 1), row("b", [80, 80], 1)
    assert gap(a, b)[0] == pytest.approx(0.1)
    differences = [0.0] * 80 + [1.0] * 5 + [0.5] * 10 + [0.0] * 5
    mean = sum(differences) / N
    images = sum((d - mean) ** 2 for d in differences) / (N - 1) / N
    assert gap(a, b)[1] == pytest.approx(math.sqrt(images + 0.005 / 2))
    assert gap(a, b)[1] > alone


def test_front() -> None:
    found = made(row("slow", [95], 9), row("good", [90], 5), row("poor", [80], 6), row("fast", [70], 1))
    assert found.front() == {"slow", "good", "fast"}


def test_choice_is_the_fastest_within_one_error() -> None:
    found = made(row("best", [95], 9), row("close", [94], 3), row("far", [70], 1))
    assert [r.layer for r in found.close()] == ["best", "close"]
    chosen = found.choice()
    assert chosen is not None
    assert chosen.layer == "close"
    assert found.advice().startswith("Use close: best is the most accurate (95.0 %), but close (94.0 %, 1.0")
    assert "3.0 times as fast" in found.advice()


def test_no_layer_is_preferred_for_its_larger_error() -> None:
    """The last is within its own wide error of the best; what is more accurate and faster than it is not."""
    found = made(row("best", [95, 95], 9), row("steady", [93, 93], 2), row("wide", [87, 97], 3))
    assert not within(found.rows[0], found.rows[1])
    assert [r.layer for r in found.close()] == ["best", "steady", "wide"]
    assert found.advice().startswith("Use steady: best is the most accurate (95.0 %), but steady (93.0 %, 2.0")
    assert "is ahead of wide, which is within one standard error of it, and 4.5 times as fast" in found.advice()


def test_advice_when_the_best_is_alone_and_when_it_is_also_fastest() -> None:
    assert (
        made(row("best", [95], 9), row("far", [70], 1)).advice()
        == "Use best, the most accurate (95.0 %) and ahead of the others."
    )
    assert "the fastest of the 2 within" in made(row("best", [95], 2), row("close", [94], 3)).advice()
    between = made(row("best", [95, 95], 2), row("steady", [93, 93], 9), row("wide", [87, 97], 3))
    assert "the fastest of the 2 within" in between.advice()


def test_advice_names_an_attention_layer_if_it_is_not_the_choice() -> None:
    advice = made(row("convolution", [95], 1), row("hilo", [80], 2)).advice()
    assert advice.startswith("Use convolution")
    assert "Among the attention layers: use hilo" in advice


def test_without_results() -> None:
    found = made(Row("a", "vision", "failed", "out of luck"))
    assert found.advice() == "No layer finished a run."
    assert found.choice() is None
    (record,) = found.summary()
    assert record["accuracy"] is None
    assert record["reason"] == "out of luck"


def test_without_costs() -> None:
    assert made(row("a", [90], None)).advice().endswith("Nothing was measured.")
