"""Conformance for anybody's method: ``regard.check``."""

from __future__ import annotations

import dataclasses
import difflib
import io
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.catalog import registry
from regard.catalog.registry import Kind, Method, Tags
from regard.checks import (  # noqa: F401
    accelerator,
    controller,
    declared,
    explainer,
    grids,
    house,
    layer,
    model,
    objective,
    runtime,
    sites,
    study,
    tokens,
)
from regard.checks.contract import CHECKS, Check, Skip
from regard.checks.samples import arguments_of

Outcome = Literal["passed", "failed", "skipped", "expected failure"]
STYLE = {"passed": "green", "failed": "bold red", "skipped": "dim", "expected failure": "yellow"}


class Result(NamedTuple):
    check: str
    outcome: Outcome
    reason: str
    seconds: float


class CheckReport(list[Result]):
    """What each check said about one method."""

    def __init__(self, name: str, results: Iterable[Result] = ()) -> None:
        super().__init__(results)
        self.name = name

    @property
    def failures(self) -> list[Result]:
        return [r for r in self if r.outcome == "failed"]

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something passed."""
        return not self.failures and any(r.outcome == "passed" for r in self)

    def raise_for_failures(self) -> None:
        """Raise AssertionError that lists every failure."""
        if self.failures:
            lines = "\n".join(f"  {r.check}: {r.reason}" for r in self.failures)
            raise AssertionError(f"{self.name} fails {len(self.failures)} of {len(self)} checks:\n{lines}")

    def __rich__(self) -> Table:
        counts = {o: sum(r.outcome == o for r in self) for o in STYLE}
        title = ", ".join(f"{n} {o}" for o, n in counts.items() if n) or "no checks"
        table = Table("check", "outcome", "seconds", "reason", title=f"{self.name}: {title}")
        for r in sorted(self, key=lambda r: list(STYLE).index(r.outcome), reverse=True):
            table.add_row(r.check, Text(r.outcome, STYLE[r.outcome]), f"{r.seconds:.2f}", Text(r.reason))
        return table

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _as_method(
    subject: str | Method | Callable[..., Any],
    kind: Kind | None,
    example: dict[str, Any] | None,
    tags: Tags | None,
    naive: Callable[..., Any] | None,
    inputs: Callable[[int, int], dict[str, Any]] | None,
) -> Method:
    given = {"kind": kind, "example": example, "tags": tags, "naive": naive, "inputs": inputs}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if isinstance(subject, str):
        subject = registry.get(subject)
    if isinstance(subject, Method):
        return dataclasses.replace(subject, **changes)
    if not callable(subject):
        raise ValueError(f"subject={subject!r} must be a registry name, a Method, or a class or factory")
    kind = kind or "layer"
    if example is None:
        known = arguments_of(subject) if kind == "layer" else frozenset()
        example = {name: value for name, value in {"dim": 32, "num_heads": 4}.items() if name in known}
    name = getattr(subject, "__name__", type(subject).__name__)
    return Method(name, kind, name, subject, tags or Tags(), example, naive, inputs)


def is_ours(method: Method) -> bool:
    """Whether the house's own rules apply: a registered method of this package."""
    return method.target.__module__.startswith("regard.") and method.name in registry._METHODS


def selected(method: Method) -> list[Check]:
    """The checks that apply to ``method``."""
    return [c for c in CHECKS.values() if c.objection(method) is None and (not c.house or is_ours(method))]


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def run_check(check: Check, method: Method) -> Result:
    """One check, with the random state put back; a failure named in ``tags.xfail`` is expected, its absence is not."""
    start = time.perf_counter()
    outcome: Outcome = "passed"
    reason = ""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            check.run(method)
    except Skip as skip:
        outcome, reason = "skipped", str(skip)
    except AssertionError as error:
        outcome, reason = "failed", str(error) or f"assertion at {_where(error)}"
    except Exception as error:
        outcome, reason = "failed", f"{type(error).__name__} at {_where(error)}: {error}"
    expected = method.tags.xfail.get(check.name)
    if expected is not None and outcome == "failed":
        outcome, reason = "expected failure", expected
    elif expected is not None and outcome == "passed":
        outcome, reason = "failed", f"passed, but was expected to fail: {expected}"
    return Result(check.name, outcome, reason, time.perf_counter() - start)


def check(
    subject: str | Method | Callable[..., Any],
    *,
    kind: Kind | None = None,
    example: dict[str, Any] | None = None,
    tags: Tags | None = None,
    naive: Callable[..., Any] | None = None,
    inputs: Callable[[int, int], dict[str, Any]] | None = None,
    only: str | Iterable[str] | None = None,
) -> CheckReport:
    """Run every check that applies to a method, ours or anybody's, and say which others were left out and why.

    Args:
        subject: a registry name, a record, or any class or factory.
        kind: what it is; default the record's, or ``"layer"``.
        example: keyword arguments of a small instance; for a layer they must hold ``dim``. Default the record's, or
            ``dim=32, num_heads=4`` as far as there are such arguments.
        tags: what it supports. What is not declared is not checked; the report says so.
        naive: ``naive(instance, x, ...)``, a slow reference for values and gradients.
        inputs: of a model, ``inputs(batch, seed)`` gives the arguments of a small forward; not needed where that takes
            ``image`` (b, 3, H, W), or ``x`` of the example's ``input_dim``.
        only: names of checks.

    Raises:
        ValueError: an unknown registry name or check, or a subject that cannot be called.

    Example:
        >>> import regard
        >>> from regard.nn import Attention
        >>> regard.check(Attention, tags=regard.Tags(causal=True, mask=True), only="padding_changes_nothing").ok
        True
    """
    method = _as_method(subject, kind, example, tags, naive, inputs)
    wanted = [only] if isinstance(only, str) else list(CHECKS if only is None else only)
    for name in wanted:
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=4, cutoff=0.4)
            raise ValueError(f"only={name!r} is not a check; nearest: {', '.join(near) or ', '.join(CHECKS)}")
    report = CheckReport(method.name)
    for name in wanted:
        one = CHECKS[name]
        if (one.kinds and method.kind not in one.kinds) or (one.house and not is_ours(method)):
            continue
        objection = one.objection(method)
        report.append(Result(name, "skipped", objection, 0.0) if objection else run_check(one, method))
    return report
