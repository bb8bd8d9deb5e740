"""What the catalogue declares of layers beside what is measured of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.bench.scaling import fit_power
from regard.catalog.facets import Facets
from regard.catalog.papers import get
from regard.catalog.registry import Method, methods
from regard.checks.contract import contract
from regard.checks.probe import ProbeReport, is_causal, probe, reach_of, state_of
from regard.checks.samples import Size, arguments_of, build, sample, whole, width
from regard.checks.weights import NotMeasured, Weights

TOKENS = 32
AGREES, CONTRADICTS, UNKNOWN = "agrees", "contradicts", "not measured"
# Slopes of log FLOPs over log N for 128 to 512 tokens and some 32 channels, where projections, linear in N, still pull
# that of N2 below 2, and choosing what to keep, quadratic with a small factor, that of NK above 1. Factors are not compared.
SLOPES = {
    "N2": (1.7, 2.1),
    "N2_lower_const": (1.3, 2.1),
    "NK": (0.8, 1.6),
    "NW": (0.8, 1.2),
    "N": (0.6, 1.2),
    "NM": (0.8, 1.2),
    "NlogN": (1.0, 1.4),
}
# Whether rows sum to 1, weights may be negative, and some are exactly zero; of l1 that depends on the signs of the scores.
PROFILES = {
    "softmax": (True, False, False),
    "gumbel": (True, False, False),
    "sinkhorn": (True, False, False),
    "sparsemax": (True, False, True),
    "entmax15": (True, False, True),
    "entmax_alpha": (True, False, True),
    "topk_softmax": (True, False, True),
    "hard_sample": (True, False, True),
    "sigmoid": (False, False, False),
    "relu": (False, False, True),
    "relu_squared": (False, False, True),
    "standardize": (False, True, False),
    "identity": (False, True, False),
}
SPARSE = ("sparsemax", "entmax15", "entmax_alpha", "relu", "relu_squared")


@dataclass(frozen=True)
class Measured:
    """One layer: what is said of its paper, what the probe found, and the same of its causal form where it has one."""

    method: Method
    facets: Facets
    report: ProbeReport
    causal: bool | None
    state: tuple[int, ...] | None

    @property
    def weights(self) -> Weights:
        if self.report.weights is None:
            raise NotMeasured(self.report.missing["weights"])
        return self.report.weights

    @property
    def reach(self) -> float:
        """Share of the pairs with a gradient, of those that a causal layer may have if it is one."""
        n = self.report.tokens
        return self.report.reach * (2 * n / (n + 1) if self.report.causal else 1)

    @property
    def everywhere(self) -> bool:
        return self.reach > 1 - 1e-9

    @property
    def few(self) -> bool:
        """Whether no query gives a weight to as many keys as there are tokens, though its distribution would."""
        if self.facets.distribution in SPARSE:
            raise NotMeasured(f"{self.facets.distribution} makes zeros of its own")
        return self.weights.kept < self.report.tokens


Answer = tuple[bool, str]


def _cost(m: Measured) -> Answer:
    if m.report.exponent is None:
        raise NotMeasured(m.report.missing["exponent"])
    low, high = SLOPES[m.facets.cost]
    return low <= m.report.exponent <= high, f"FLOPs grow like N^{m.report.exponent:.2f}"


def _state(m: Measured) -> Answer:
    if m.state is None:
        return m.facets.state == "none", "no cache"
    growth = fit_power(m.report.lengths, m.state).exponent
    share = m.state[-1] / m.report.lengths[-1] / (2 * width(m.method) * torch.float64.itemsize)
    kinds = ("kv_reduced" if share < 1 else "kv_N",) if abs(growth - 1) < 0.05 else ("kv_window", "constant")
    found = f"bytes grow like N^{growth:.2f}, {share:.2f} of 2 c numbers a token at the end"
    return m.facets.state in kinds and growth < 1.05, found


def _distribution(m: Measured) -> Answer:
    w, declared = m.weights, m.facets.distribution
    found = (
        f"sums to 1 over {' and '.join(w.normalised_over) or 'neither axis'}, {w.zeros:.2f} zeros, from {w.minimum:.2g}"
    )
    if declared not in PROFILES:
        raise NotMeasured("it depends on the signs of the scores")
    sums, negative, zeros = PROFILES[declared]
    fits = sums == bool(w.normalised_over) and negative == (w.minimum < 0)
    # Where only some keys are looked at the others are zero whatever the distribution.
    return fits and (zeros == (w.zeros > 0) or m.facets.support != "full"), found


def _aggregate(m: Measured) -> Answer:
    declared = m.facets.aggregate
    if declared == "conv":
        return not m.everywhere and m.report.equivariance > 1e-6, f"reach {m.reach:.2f}, order matters"
    if declared not in ("convex_sum", "unnormalised_sum", "gated_elementwise"):
        raise NotMeasured("no property of weights or gradients tells it")
    w = m.weights
    if declared == "gated_elementwise":
        if w.source != "sigmoid":
            raise NotMeasured("its gates are not among the weights that can be read")
        return w.minimum > 0 and w.maximum < 1, f"gates from {w.minimum:.2f} to {w.maximum:.2f}"
    if w.normalised_over == ("queries",):
        raise NotMeasured("weights sum to 1 over queries, and are scaled again before values are summed")
    convex = "keys" in w.normalised_over and w.minimum >= 0
    return convex == (declared == "convex_sum"), f"sums from {w.over_keys[0]:.2f} to {w.over_keys[1]:.2f}"


def _support(m: Measured) -> Answer:
    found = f"reach {m.reach:.2f}"
    match m.facets.support:
        case "full":
            return m.everywhere, found
        case "window" | "dilated" | "block_static":
            return not m.everywhere, found
        case "topk" | "block_dynamic" | "hash_or_cluster":
            return m.few, f"at most {m.weights.kept} of {m.report.tokens} keys"
        case "pooled_tokens":
            return m.few and m.everywhere, f"{found}, at most {m.weights.kept} keys"
        case "low_rank":
            slope = math.nan if m.report.exponent is None else m.report.exponent
            return m.everywhere and slope <= 1.2, f"{found}, FLOPs grow like N^{slope:.2f}"
    raise NotMeasured("it depends on what the layer is given")


def _positions(m: Measured) -> Answer:
    if m.facets.positions == "hard":
        if "head" in m.facets.axis:
            raise NotMeasured("what is chosen are heads, not keys")
        return m.few, f"at most {m.weights.kept} of {m.report.tokens} keys"
    return m.everywhere == (m.facets.positions == "soft"), f"reach {m.reach:.2f}"


def _position_info(m: Measured) -> Answer:
    if m.report.causal:
        raise NotMeasured("a causal layer has an order already")
    info, ordered = set(m.facets.position_info), m.report.equivariance > 1e-6
    if info == {"none"} and ordered and (m.method.tags.input != "tokens" or m.facets.support == "window"):
        raise NotMeasured("windows and convolutions have an order of their own")
    return ("none" not in info or len(info) > 1) if ordered else "none" in info, (
        f"permuting tokens {'changes more than' if ordered else 'only permutes'} outputs"
    )


def _causal_ok(m: Measured) -> Answer:
    found = {True: "causal form reads no later token", False: "causal form reads later tokens", None: "no causal form"}
    return m.facets.causal_ok == bool(m.causal), found[m.causal]


def _differentiable(m: Measured) -> Answer:
    return m.facets.differentiable == (m.report.reach > 0), f"gradient at {m.report.reach:.2f} of the pairs"


def _stochastic(m: Measured) -> Answer:
    return (
        m.facets.stochastic != m.report.deterministic,
        f"another seed gives {'the same' if m.report.deterministic else 'else'}",
    )


RULES: dict[str, Callable[[Measured], Answer]] = {
    "distribution": _distribution,
    "aggregate": _aggregate,
    "support": _support,
    "positions": _positions,
    "position_info": _position_info,
    "cost": _cost,
    "state": _state,
    "causal_ok": _causal_ok,
    "differentiable": _differentiable,
    "stochastic": _stochastic,
}


def size_of(method: Method, n: int) -> Size:
    """``n`` tokens, or the grid of that many that is nearest to a square; rounded up to what the layer takes."""
    if method.tags.input == "tokens":
        return whole(method, n)
    side = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return whole(method, side), whole(method, n // side)


def measure(method: Method, lengths: Sequence[int]) -> Measured:
    """Probe a small instance of a registered layer, and its causal form."""

    def inputs(layer: Any) -> Callable[[int], tuple[Tensor, dict[str, Any]]]:
        # Several rows where gradients are looked at: an exact zero in one of them is no lack of reach.
        return lambda n: sample(method, layer, size_of(method, n), batch=8 if n == TOKENS else 1)

    wishes: dict[str, Any] = {"context_length": max(lengths)}
    layer = build(method, **wishes)
    report, causal, form = probe(layer, lengths, tokens=TOKENS, inputs=inputs(layer)), None, layer
    if method.tags.causal:
        form = build(method, causal=True, **wishes) if "causal" in arguments_of(method.target) else layer
        causal = is_causal(reach_of(form, *inputs(form)(TOKENS)))
    try:
        state = tuple(state_of(form, *inputs(form)(n)) for n in lengths)
    except NotMeasured:
        state = None
    return Measured(method, get(method.paper).facets, report, causal, state)


def validate(layers: Iterable[Method] | None = None, lengths: Sequence[int] = (128, 256, 512)) -> list[dict[str, Any]]:
    """What the catalogue declares of layers beside what is measured of them, one row for each layer and facet.

    Args:
        layers: records of layers; default all that are registered.
        lengths: numbers of tokens for cost and state.
    """
    rows: list[dict[str, Any]] = []
    for one in methods("layer") if layers is None else layers:
        found = measure(one, lengths)
        for facet, rule in RULES.items():
            value = getattr(found.facets, facet)
            declared = " ".join(value) if isinstance(value, tuple) else str(value)
            try:
                agrees, measured = rule(found)
                verdict = AGREES if agrees else CONTRADICTS
            except NotMeasured as reason:
                verdict, measured = UNKNOWN, str(reason)
            rows.append(
                {"layer": one.name, "facet": facet, "declared": declared, "verdict": verdict, "measured": measured}
            )
    return rows


@contract("layer", house=True)
def check_facets_as_measured(method: Method) -> None:
    """What the catalogue declares of the layer's paper, its cost and state among it, is what a probe measures."""
    wrong = [row for row in validate([method]) if row["verdict"] == CONTRADICTS]
    assert not wrong, "; ".join(f"{row['facet']} is declared {row['declared']}, but {row['measured']}" for row in wrong)
