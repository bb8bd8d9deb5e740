"""What every study must hold: a quick toy run, a typed table, and claims that are true of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from regard.catalog.registry import Method
from regard.checks.contract import contract

SECONDS = 10.0


@lru_cache(maxsize=1)
def _toy(method: Method) -> tuple[Any, Any, float]:
    """The study, the table of its toy run, and the seconds that took."""
    torch.manual_seed(0)
    study = method.create(**method.example)
    start = time.process_time()
    return study, study.run(scale="toy"), time.process_time() - start


@contract("study")
def check_study_is_quick(method: Method) -> None:
    """``run(scale="toy")`` ends within ten seconds."""
    _, _, seconds = _toy(method)
    assert seconds <= SECONDS, f"the toy run took {seconds:.1f} s, allowed {SECONDS:.0f}"


@contract("study")
def check_study_table_is_typed(method: Method) -> None:
    """The table is rows by column name, with one type a column and no number that is not finite."""
    rows = list(_toy(method)[1])
    assert rows, "the table is empty"
    for i, row in enumerate(rows):
        assert isinstance(row, Mapping), f"row {i} is a {type(row).__name__}, expected a mapping from column to value"
        assert row.keys() == rows[0].keys(), f"row {i} has columns {sorted(row)}, row 0 has {sorted(rows[0])}"
        for column, value in row.items():
            first = type(rows[0][column])
            assert first in (bool, int, float, str), f"column {column!r} holds {first.__name__}, expected a plain value"
            assert type(value) is first, f"row {i}, {column!r} is {type(value).__name__}, row 0 has {first.__name__}"
            assert not isinstance(value, float) or math.isfinite(value), f"row {i}, {column!r} is {value}"


@contract("study")
def check_study_claims_hold(method: Method) -> None:
    """``claims``, predicates of the table by name, are true of the toy run; and there are some."""
    study, table, _ = _toy(method)
    assert study.claims, "the study claims nothing"
    wrong = [name for name, holds in study.claims.items() if not holds(table)]
    assert not wrong, f"not true of the toy run: {wrong}"


@contract("study")
def check_is_drawn_and_said(method: Method) -> None:
    """``plot`` draws a figure with something in it, and ``finding`` says what the table shows in one sentence."""
    study, table, _ = _toy(method)
    assert any(axes.has_data() for axes in study.plot(table).axes), "plot drew nothing"
    said = study.finding(table)
    assert said.endswith("."), f"finding is {said!r}, expected a sentence"
    assert any(c.isdigit() for c in said), f"finding is {said!r}, expected figures in it"
