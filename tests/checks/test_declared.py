"""Facets that are right are found right, and wrong ones are named."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from regard.catalog import Method, Tags, get
from regard.catalog.facets import MULTIPLE, SINGLE, Distribution
from regard.checks.declared import (
    AGREES,
    CONTRADICTS,
    PROFILES,
    RULES,
    SLOPES,
    Measured,
    check_facets_as_measured,
    measure,
    size_of,
    validate,
)
from regard.checks.weights import NotMeasured, summarise
from regard.nn import Attention
from regard.ops.normalizers import NORMALIZERS

LENGTHS = (128, 256, 512)


@cache
def measured(name: str) -> Measured:
    return measure(get(name), LENGTHS)


def answer(name: str, facet: str, value: Any) -> bool:
    """What the rule says when ``facet`` of the layer were ``value``."""
    kind = SINGLE.get(facet) or MULTIPLE.get(facet)
    if kind is not None:
        value = tuple(map(kind, value)) if isinstance(value, tuple) else kind(value)
    found = measured(name)
    return RULES[facet](replace(found, facets=replace(found.facets, **{facet: value})))[0]


def test_most_facets_of_a_layer_can_be_measured() -> None:
    rows = validate([get("rela")])
    assert [row["facet"] for row in rows] == list(RULES)
    assert sum(row["verdict"] == AGREES for row in rows) >= 9


def test_the_check_names_what_is_declared_wrong() -> None:
    check_facets_as_measured(get("rela"))
    with pytest.raises(AssertionError, match="distribution is declared relu, but sums to 1 over keys"):
        check_facets_as_measured(replace(get("multi-query-attention"), paper="rela"))
    with pytest.raises(AssertionError, match="cost is declared N, but FLOPs grow like"):
        check_facets_as_measured(replace(get("multi-query-attention"), paper="flatten"))


@pytest.mark.parametrize(
    ("name", "facet", "right", "wrong"),
    [
        ("multi-query-attention", "distribution", "softmax", ["relu", "sigmoid", "sparsemax", "standardize"]),
        ("rela", "distribution", "relu", ["softmax", "sigmoid", "sparsemax", "standardize"]),
        ("normalized-attention", "distribution", "standardize", ["softmax", "relu", "sigmoid"]),
        ("cbam", "distribution", "sigmoid", ["softmax", "relu", "standardize"]),
        ("slot-attention", "distribution", "softmax", ["relu", "sigmoid"]),
        ("multi-query-attention", "aggregate", "convex_sum", ["unnormalised_sum"]),
        ("rela", "aggregate", "unnormalised_sum", ["convex_sum", "conv"]),
        ("dynamic-convolution", "aggregate", "conv", []),
        ("cbam", "aggregate", "gated_elementwise", ["convex_sum"]),
        ("rela", "support", "full", ["window", "dilated"]),
        ("nat", "support", "window", ["full", "low_rank", "pooled_tokens"]),
        ("moba", "support", "topk", ["full", "low_rank"]),
        ("hilo", "support", "pooled_tokens", ["window"]),
        ("flatten", "support", "low_rank", ["window"]),
        ("multi-query-attention", "support", "full", ["topk", "window", "pooled_tokens"]),
        ("multi-query-attention", "positions", "soft", ["local", "hard"]),
        ("maxvit", "positions", "local", ["soft"]),
        ("moba", "positions", "hard", ["soft"]),
        ("rela", "position_info", ("none",), [("absolute",), ("rotary",)]),
        ("coca", "position_info", ("rotary",), [("none",)]),
        ("relative-position", "position_info", ("relative_qk",), [("none",)]),
        ("multi-query-attention", "cost", "N2", ["NW", "NK", "N", "NM", "NlogN"]),
        ("moba", "cost", "NK", ["N2", "N", "NW"]),
        ("hilo", "cost", "N2_lower_const", ["N2", "N"]),
        ("flatten", "cost", "N", ["N2", "N2_lower_const"]),
        ("nat", "cost", "NW", ["N2", "N2_lower_const"]),
        ("slot-attention", "cost", "NM", ["N2", "NlogN"]),
        ("multi-query-attention", "state", "kv_reduced", ["kv_N", "kv_window", "constant", "none"]),
        ("rela", "state", "kv_N", ["kv_reduced", "kv_window", "constant", "none"]),
        ("dynamic-convolution", "state", "kv_window", ["kv_N", "kv_reduced", "none"]),
        ("cbam", "state", "none", ["kv_N", "constant"]),
        ("rela", "causal_ok", True, [False]),
        ("moba", "causal_ok", True, [False]),
        ("cbam", "causal_ok", False, [True]),
        ("rela", "differentiable", True, [False]),
        ("rela", "stochastic", False, [True]),
        ("slot-attention", "stochastic", True, [False]),
    ],
)
def test_the_right_value_and_wrong_ones(name: str, facet: str, right: Any, wrong: list[Any]) -> None:
    assert answer(name, facet, right)
    assert [value for value in wrong if answer(name, facet, value)] == []


@pytest.mark.parametrize(
    ("name", "facet", "value", "reason"),
    [
        ("flatten", "distribution", "l1", "makes no weights"),
        ("dual-attention-transformer", "distribution", "softmax", "opaque"),
        ("rela", "distribution", "l1", "signs of the scores"),
        ("slot-attention", "aggregate", "convex_sum", "over queries, and are scaled again"),
        ("moh", "aggregate", "gated_elementwise", "gates are not among the weights"),
        ("rela", "aggregate", "max", "no property"),
        ("moh", "positions", "hard", "heads, not keys"),
        ("rela", "support", "topk", "relu makes zeros of its own"),
        ("rela", "support", "graph", "what the layer is given"),
        ("cbam", "position_info", ("none",), "order of their own"),
        ("moba", "position_info", ("rotary",), "has an order already"),
    ],
)
def test_what_cannot_be_measured_says_why(name: str, facet: str, value: Any, reason: str) -> None:
    with pytest.raises(NotMeasured, match=reason):
        answer(name, facet, value)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_those_of_the_distribution_functions(name: str) -> None:
    scores = 2 * torch.randn(3, 40, 40, dtype=torch.float64)
    given = {"topk_softmax": {"k": 5}, "sinkhorn": {"iterations": 5}}.get(name, {})
    found = summarise([NORMALIZERS[name](scores, **given)])
    assert (bool(found.normalised_over), found.minimum < 0, found.zeros > 0) == PROFILES[name]
    assert "queries" not in found.normalised_over


def test_every_value_of_the_catalogue_is_known() -> None:
    assert {*PROFILES, "l1"} == set(NORMALIZERS) == set(Distribution)
    assert set(SLOPES) == set(SINGLE["cost"])


def test_a_causal_layer_reaches_all_of_its_past() -> None:
    def target(dim: int, num_heads: int) -> Attention:
        return Attention(dim, num_heads, causal=True)

    one = Method("past", "layer", "rela", target, Tags(causal=True), {"dim": 16, "num_heads": 2})
    verdicts = {row["facet"]: row["verdict"] for row in validate([one])}
    assert verdicts["support"] == verdicts["positions"] == verdicts["causal_ok"] == AGREES
    assert verdicts["distribution"] == verdicts["aggregate"] == CONTRADICTS
    assert verdicts["position_info"] == "not measured"


def test_sizes() -> None:
    assert size_of(get("rela"), 32) == 32
    assert size_of(get("nat"), 32) == (4, 8)
    assert size_of(get("cbam"), 64) == (8, 8)


def test_a_contradiction_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.checks import declared

    rela = declared.get("rela")
    wrong = replace(rela, facets=replace(rela.facets, cost=SINGLE["cost"]("N"), state=SINGLE["state"]("none")))
    monkeypatch.setattr(declared, "get", lambda slug: wrong)
    found = {row["facet"]: row for row in validate([get("rela")], LENGTHS) if row["verdict"] == CONTRADICTS}
    assert set(found) == {"cost", "state"}
    assert found["cost"]["declared"] == "N"
    assert found["cost"]["measured"].startswith("FLOPs grow like N^1.7")
    assert found["state"]["measured"].startswith("bytes grow like N^1.00, 1.00 of 2 c")
