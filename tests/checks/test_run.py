"""The verb: what it takes, what it reports, and that it leaves no trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import regard
from regard.catalog import Method, Tags, registry
from regard.checks.contract import CHECKS, Skip, contract
from regard.checks.run import CheckReport, Result, run_check, selected
from regard.nn import Attention

MASKED = Tags(mask=True, causal=True)


@pytest.fixture
def record() -> Any:
    registry.method("throw-away", kind="layer", tags=MASKED, example={"dim": 16, "num_heads": 2})(Attention)
    yield registry.get("throw-away")
    del registry._METHODS["throw-away"]


def _outcomes(report: CheckReport) -> dict[str, str]:
    return {r.check: r.outcome for r in report}


def test_name_record_class_and_factory_are_taken(record: Method) -> None:
    only = ["padding_changes_nothing", "output_shape"]
    for subject in ("throw-away", record, Attention, lambda dim: Attention(dim, 2)):
        report = regard.check(subject, tags=MASKED, only=only)
        assert _outcomes(report) == dict.fromkeys(only, "passed"), report


def test_record_can_be_overridden(record: Method) -> None:
    assert regard.check(record, only="mask_forms")[0].outcome == "passed"
    assert regard.check(record, tags=Tags(), only="mask_forms")[0].outcome == "skipped"


def test_what_is_not_declared_is_listed_as_skipped() -> None:
    (result,) = regard.check(Attention, only="no_look_into_the_future")
    assert result.outcome == "skipped"
    assert result.reason == "tags.causal is False"


def test_house_rules_are_not_for_others(record: Method) -> None:
    house = {name for name, c in CHECKS.items() if c.house}
    assert house
    assert not house & {c.name for c in selected(Method("x", "layer", "x", Attention, Tags(), {"dim": 8}))}
    assert house - {c.name for c in selected(record)} == set()


def test_wrong_requests_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"only='padding'.*padding_changes_nothing"):
        regard.check(Attention, only="padding")
    with pytest.raises(ValueError, match="name='no-such-thing'"):
        regard.check("no-such-thing")
    with pytest.raises(ValueError, match="subject=3"):
        regard.check(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown.*colour|colour.*unknown"):
        contract("layer", colour="red")
    with pytest.raises(ValueError, match="defined twice"):
        contract()(CHECKS["constructs"].run)


def _method(xfail: dict[str, str]) -> Method:
    return Method("x", "layer", "x", Attention, Tags(xfail=xfail), {"dim": 32})


def _check(outcome: str) -> Any:
    def check_made_up(method: Method) -> None:
        if outcome == "fail":
            raise AssertionError("got 1, expected 2")
        if outcome == "crash":
            raise RuntimeError("boom")
        if outcome == "skip":
            raise Skip("not here")

    return dataclasses.replace(CHECKS["constructs"], run=check_made_up)


@pytest.mark.parametrize(
    ("behaviour", "xfail", "outcome", "reason"),
    [
        ("pass", {}, "passed", ""),
        ("fail", {}, "failed", "got 1, expected 2"),
        ("crash", {}, "failed", "RuntimeError at test_run.py"),
        ("skip", {}, "skipped", "not here"),
        ("fail", {"made_up": "known"}, "expected failure", "known"),
        ("crash", {"made_up": "known"}, "expected failure", "known"),
        ("pass", {"made_up": "known"}, "failed", "passed, but was expected to fail: known"),
        ("fail", {"other": "known"}, "failed", "got 1, expected 2"),
    ],
)
def test_outcomes(behaviour: str, xfail: dict[str, str], outcome: str, reason: str) -> None:
    result = run_check(_check(behaviour), _method(xfail))
    assert result.outcome == outcome
    assert result.reason.startswith(reason)
    assert result.seconds >= 0


def test_report() -> None:
    good, bad = Result("a", "passed", "", 0.1), Result("b", "failed", "got [1], expected [2]", 0.2)
    assert CheckReport("m", [good]).ok
    assert not CheckReport("m", [good, bad]).ok
    assert not CheckReport("m", [Result("c", "skipped", "why", 0.0)]).ok, "nothing ran, nothing is known"
    report = CheckReport("m", [good, bad])
    assert report.failures == [bad]
    assert "m: 1 passed, 1 failed" in repr(report)
    assert "got [1], expected [2]" in repr(report)
    CheckReport("m", [good]).raise_for_failures()
    with pytest.raises(AssertionError, match=r"m fails 1 of 2 checks:\n  b: got \[1\]"):
        report.raise_for_failures()


def test_no_trace_is_left() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        report = regard.check(Attention, tags=MASKED)
        assert not torch.is_grad_enabled()
    report.raise_for_failures()
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is True
    assert torch.get_default_dtype() == torch.float32


def test_no_check_depends_on_the_order() -> None:
    first = _outcomes(regard.check(Attention, tags=MASKED))
    backwards = regard.check(Attention, tags=MASKED, only=list(first)[::-1])
    assert _outcomes(backwards) == first
