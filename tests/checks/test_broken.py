"""The checks bite: each broken layer is rejected by the check that is there for it, for the right reason."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import regard
from regard.catalog import Tags
from regard.checks.contract import CHECKS
from regard.nn import Attention

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"regard_{name}_layers", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle finds classes through their module
    spec.loader.exec_module(module)
    return module


broken, foreign = _load("broken"), _load("foreign")

EVERYTHING = Tags(cross=True, causal=True, mask=True, cache=True, grouped=True, equivariant=True)
BARE = Tags(cross=True, mask=True, cache=True)
GRID, IMAGE = Tags(input="grid"), Tags(input="image")

HEALTHY: list[tuple[Any, Tags, Any]] = [
    (Attention, EVERYTHING, None),
    (foreign.Foreign, Tags(equivariant=True), foreign.foreign_naive),
    (foreign.OnGrid, GRID, None),
    (foreign.Gate, IMAGE, None),
]
# class, tags, the check that must reject it, a part of what it says
BROKEN: list[tuple[Any, Tags, str, str]] = [
    (broken.SoftLeak, EVERYTHING, "no_look_into_the_future", "gradient from a token after it"),
    (broken.HardLeak, EVERYTHING, "no_look_into_the_future", "later tokens changed"),
    (broken.IgnoresMask, EVERYTHING, "masked_keys_have_no_influence", "masked ones changed"),
    (broken.IgnoresMaskOfContext, EVERYTHING, "masked_context_has_no_influence", "masked context changed"),
    (broken.CastsMask, EVERYTHING, "mask_forms", "float mask was taken"),
    (broken.CountsPadding, EVERYTHING, "padding_changes_nothing", "padded sequence"),
    (broken.NaNWhenMasked, BARE, "fully_masked_rows", "not finite"),
    (broken.UniformWhenMasked, BARE, "fully_masked_rows", "may look nowhere"),
    (broken.WrongScale, EVERYTHING, "softmax_reference", "softmax(q k / sqrt(8)) v"),
    (foreign.ForeignWrongScale, Tags(), "equals_naive", "output"),
    (foreign.ForeignDetached, Tags(), "equals_naive", "gradient of x"),
    (broken.MixesRows, EVERYTHING, "rows_are_independent", "row 0 was changed"),
    (broken.DeadParameter, EVERYTHING, "parameters_have_gradients", "(None) for ['temperature']"),
    (broken.ZeroGradient, EVERYTHING, "parameters_have_gradients", "zero everywhere for ['temperature']"),
    (foreign.GuessesSides, GRID, "sides_are_not_guessed", "RuntimeError"),
    (foreign.NearestSides, GRID, "grid_is_read", "give one result"),
    (foreign.NearestSides, GRID, "wrong_input_is_refused", "grid="),
    (foreign.TransposedGate, IMAGE, "output_shape", "shape"),
    (broken.InPlace, EVERYTHING, "inputs_not_changed", "x was written to"),
    (broken.DropsInEval, EVERYTHING, "eval_is_deterministic", "second call"),
    (broken.DropsInEval, EVERYTHING, "dropout_only_in_training", "dropout=0.5 in eval"),
    (broken.NeverDrops, BARE, "dropout_only_in_training", "does nothing in training"),
    (broken.Float32Out, EVERYTHING, "dtype_followed", "torch.float64 in, torch.float32 out"),
    (broken.Float32Inside, EVERYTHING, "gradcheck", "finite differences say"),
    (broken.WrongGradient, EVERYTHING, "gradcheck", "finite differences say"),
    (broken.RepeatsHeads, EVERYTHING, "grouped_heads_are_repeated_heads", "2 key heads"),
    (broken.RepeatsHeads, EVERYTHING, "heads_do_not_leak", "do not read key head 1"),
    (broken.TalkingHeads, EVERYTHING, "heads_do_not_leak", "do not read key head 1"),
    (broken.CacheOffByOne, EVERYTHING, "cached_equals_uncached", "cached in chunks of [1, 1"),
    (broken.ReadsEmptyCache, EVERYTHING, "cached_equals_uncached", "cached in chunks"),
    (broken.GrowingBuffer, EVERYTHING, "nothing_left_behind", "seen changed in the first call"),
    (broken.KeepsWeights, EVERYTHING, "nothing_left_behind", "weights changed in the second call"),
    (foreign.FloorsHeads, Tags(), "odd_head_count", "rows of qkv.weight are never used"),
    (broken.HiddenProjection, BARE, "restored", "after state dict"),
    (broken.RandomShape, BARE, "state_dict_round_trip", "RuntimeError"),
    (broken.HoldsLambda, BARE, "copies", "lambda"),
    (broken.SharesParameters, BARE, "constructs", "share 2 parameters"),
    (broken.TableOnCPU, BARE, "meta_construction", "table was made on cpu"),
    (broken.PositionsOnCPU, BARE, "device_followed", "cuda"),
    (broken.ReadsEmptyMemory, BARE, "uninitialised_memory_is_not_read", "NaN-filled memory"),
    (broken.CountsCalls, BARE, "checkpointed", "checkpoint("),
    (broken.Positional, EVERYTHING, "permutation_equivariant", "permuted tokens"),
    (broken.IgnoresContext, EVERYTHING, "context_is_read", "context gets no gradient"),
    (foreign.AnyRank, Tags(), "wrong_input_is_refused", "x without a batch axis"),
    (foreign.AnyRank, Tags(), "nothing_is_ignored", "mask was given and ignored"),
    (broken.IgnoresItsAttention, EVERYTHING, "sites_verified", "does not depend on it"),
    (broken.MergesHalves, BARE, "sites_verified", "verified by calls with queries [(2, 4, 9), (2, 4, 9)]"),
    (broken.CountsCalls, BARE, "sites_verified", "after it was read"),
    (broken.DeadParameter, EVERYTHING, "swap_trains", "no gradient reaches"),
    (broken.BackwardGradient, EVERYTHING, "swap_trains", "after steps of"),
    (foreign.GuessesSides, GRID, "swap_trains", "RuntimeError"),
    (broken.BreaksTheGraph, EVERYTHING, "compiled", "data-dependent"),
]


def _naive(layer: Any) -> Any:
    return foreign.foreign_naive if issubclass(layer, foreign.Foreign) else None


@pytest.mark.parametrize(("layer", "tags", "naive"), HEALTHY, ids=lambda v: getattr(v, "__name__", None))
def test_healthy_layers_pass(layer: Any, tags: Tags, naive: Any) -> None:
    report = regard.check(layer, tags=tags, naive=naive)
    report.raise_for_failures()
    assert report.ok
    skipped = {r.check for r in report if r.outcome == "skipped"}
    ran = {r.check for r in report if r.outcome == "passed"}
    assert len(ran) >= 18, f"only {ran} ran"
    if layer is Attention:
        assert skipped == {"equals_naive", "grid_is_read", "sides_are_not_guessed", "compiled"}


HERE_AND_NOW = [row for row in BROKEN if row[2] != "compiled"]


@pytest.mark.parametrize(("layer", "tags", "check", "says"), HERE_AND_NOW, ids=lambda v: getattr(v, "__name__", None))
def test_broken_layers_are_rejected(layer: Any, tags: Tags, check: str, says: str) -> None:
    (result,) = regard.check(layer, tags=tags, naive=_naive(layer), only=check)
    assert result.outcome == "failed", result
    assert says in result.reason


def test_every_layer_check_rejects_something() -> None:
    bitten = {check for _, _, check, _ in BROKEN}
    for_layers = {name for name, c in CHECKS.items() if not c.house and (not c.kinds or "layer" in c.kinds)}
    assert bitten == for_layers


def test_graph_breaks_are_rejected_where_shapes_are_not_checked() -> None:
    lines = [
        "import sys, runpy, regard",
        "from regard.nn import Attention",
        "broken = runpy.run_path(sys.argv[1], run_name='broken')",
        "for layer in (Attention, broken['BreaksTheGraph']):",
        "    (result,) = regard.check(layer, only='compiled')",
        "    print(result.outcome, result.reason.split(chr(10))[0])",
    ]
    command = [sys.executable, "-c", "\n".join(lines), str(HERE / "broken.py")]
    environment = {**os.environ, "REGARD_TYPECHECK": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    healthy, rejected = done.stdout.splitlines()
    assert healthy.strip() == "passed"
    assert rejected.startswith("failed"), rejected
    assert "data-dependent" in rejected
