"""The house's own rules: a good file passes them, and each kind of slip is found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regard.catalog import Method, Tags, papers
from regard.checks import house
from regard.checks.contract import CHECKS
from regard.checks.run import run_check

GOOD = '''
from regard.nn import Attention

class Sample(Attention):
    r"""Attention that does nothing new.

    It replaces nothing.

    .. math:: y = x

    Args:
        dim: channels.

    Shape: x (b, n, dim) -> (b, n, dim).

    Cost: none.

    Example:
        >>> Sample(8, num_heads=2).num_heads
        2

    Differs: nothing known.

    Reference: Sample et al., A sample, 2020, arXiv:2001.00001
    """

    def __init__(self, dim: int, num_heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads, dropout=dropout)
'''


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a record from the source of a file called ``sample_paper.py``."""
    rows = {"sample-paper": SimpleNamespace(arxiv="2001.00001")}
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_sample_paper.py").touch()
    (tmp_path / "src" / "regard").mkdir(parents=True)
    monkeypatch.setattr(papers, "get", lambda slug: rows[slug])
    monkeypatch.setattr(house, "modules", lambda: {"sample-paper": ("made.sample_paper", "layer")})
    monkeypatch.setattr(house, "ROOT", tmp_path / "src" / "regard")

    def build(source: str = GOOD, *, file: str = "sample_paper.py", **record: Any) -> Method:
        path = tmp_path / file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"made.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        given = {"name": "sample-paper", "kind": "layer", "paper": "sample-paper", "tags": Tags(mask=True)} | record
        return Method(target=module.Sample, example={"dim": 8, "num_heads": 2}, **given)

    return build


# facets_as_measured needs a paper of the catalogue: test_declared.py has it.
HOUSE = {name: c for name, c in CHECKS.items() if c.house and name != "facets_as_measured"}
SLIPS: list[tuple[str, str, str, str]] = [
    # a part of the good file, what it becomes, the check, what it says
    ("does nothing new.", "does nothing new", "docstring_sections", "full stop"),
    ("    Cost: none.\n", "", "docstring_sections", "lacks ['Cost']"),
    ("Differs: nothing known.", "Differs:", "docstring_sections", "lacks ['Differs']"),
    ("Cost: none.\n", "Reference: x\n\n    Cost: none.\n", "docstring_sections", "order"),
    (".. math:: y = x", "y = x", "docstring_sections", ".. math::"),
    ("        2\n", "        3\n", "docstring_example_runs", "Expected:"),
    (">>> Sample(8, num_heads=2).num_heads", "Sample(8)", "docstring_example_runs", "no '>>>'"),
    ("2001.00001", "2001.00002", "arxiv_id", "['2001.00002'], the catalogue has 2001.00001"),
    ("num_heads: int = 2, dropout: float = 0.0", "dropout: float = 0.0, num_heads: int = 2", "argument_names", "order"),
    (
        "dropout: float = 0.0)",
        "dropout: float = 0.0, attn_drop: float = 0.0)",
        "argument_names",
        "called ['dropout'] here",
    ),
    ("dropout: float = 0.0)", "dropout: float = 0.0, no_bias: bool = False)", "argument_names", "expected what is on"),
    ("class Sample", "#\n" * 300 + "class Sample", "file_is_short", "allowed 300"),
    (
        "    def __init__",
        "    def forward(self, x, context=None):\n        return super().forward(x, context)\n\n    def __init__",
        "forward_follows_the_protocol",
        "promise ['mask']",
    ),
    (
        "    def __init__",
        "    def forward(self, x, mask=None):\n        return super().forward(x, mask=mask)\n\n    def __init__",
        "forward_follows_the_protocol",
        "by position",
    ),
    (
        "    def __init__",
        "    def forward(self, x, context=None, *, mask=None):\n"
        "        return self.out(x @ x.mT @ x) if x.ndim == 3 else {}[x.ndim]\n\n    def __init__",
        "errors_are_value_errors",
        "raised KeyError, expected ValueError",
    ),
]
RECORDS: list[tuple[dict[str, Any], str, str]] = [
    ({"file": "other_paper.py"}, "file_is_named_after_the_method", "is in other_paper.py"),
    ({"paper": "another"}, "file_is_named_after_the_method", "paper='another'"),
    ({"paper": "another"}, "paper_is_in_the_catalogue", "another"),
    ({"file": "other_paper.py"}, "has_a_test_file", "no test_other_paper.py"),
    ({"tags": Tags(xfail={"gradchek": "x"})}, "expected_failures_are_checks", "is no check"),
    ({"tags": Tags(xfail={"mask_forms": "x"})}, "expected_failures_are_checks", "does not apply"),
    ({"tags": Tags(xfail={"gradcheck": " "})}, "expected_failures_are_checks", "no reason"),
]


@pytest.mark.parametrize("name", HOUSE)
def test_good_file_passes(made: Any, name: str) -> None:
    assert run_check(HOUSE[name], made())[:3] == (name, "passed", "")


@pytest.mark.parametrize(("old", "new", "name", "says"), SLIPS)
def test_slips_are_found(made: Any, old: str, new: str, name: str, says: str) -> None:
    assert old in GOOD
    result = run_check(HOUSE[name], made(GOOD.replace(old, new, 1)))
    assert result.outcome == "failed", result
    assert says in result.reason


@pytest.mark.parametrize(("record", "name", "says"), RECORDS)
def test_wrong_records_are_found(made: Any, record: dict[str, Any], name: str, says: str) -> None:
    result = run_check(HOUSE[name], made(**record))
    assert result.outcome == "failed", result
    assert says in result.reason


def test_every_house_check_rejects_something() -> None:
    assert {name for _, _, name, _ in SLIPS} | {name for _, name, _ in RECORDS} == HOUSE.keys()


def test_variants_need_no_sections_of_their_own(made: Any) -> None:
    source = GOOD.replace("    Cost: none.\n", "")
    assert run_check(HOUSE["docstring_sections"], made(source, name="sample-paper-tiny")).outcome == "skipped"
