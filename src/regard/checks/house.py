"""What this package asks of its own methods on top of the contract: docs, names, files."""

from __future__ import annotations

import doctest
import inspect
import re
import sys
from pathlib import Path

import torch
from jaxtyping import TypeCheckError

from regard.catalog.registry import ROOT, Method, modules
from regard.checks.contract import CHECKS, Skip, contract
from regard.checks.grids import wrong_inputs
from regard.checks.samples import build, run

SECTIONS = ("Args", "Shape", "Raises", "Cost", "Example", "Differs", "Reference")
ARGUMENTS = ("dim", "num_heads", "num_kv_heads", "head_dim", "window_size", "dropout")
OTHER_WORDS = {
    **dict.fromkeys(("heads", "n_heads", "n_head", "nhead", "num_attention_heads"), "num_heads"),
    **dict.fromkeys(("embed_dim", "d_model", "hidden_dim", "hidden_size", "channels", "in_channels"), "dim"),
    **dict.fromkeys(("dim_head", "d_head", "head_size"), "head_dim"),
    **dict.fromkeys(("kv_heads", "n_kv_heads", "num_key_value_heads"), "num_kv_heads"),
    **dict.fromkeys(("window", "win_size", "ws"), "window_size"),
    **dict.fromkeys(("drop", "attn_drop", "dropout_p", "p_dropout", "attention_dropout"), "dropout"),
    **dict.fromkeys(("qkv_bias", "use_bias"), "bias"),
    **dict.fromkeys(("is_causal",), "causal"),
}
LINES = 300


def file_of(method: Method) -> Path:
    return Path(str(sys.modules[method.target.__module__].__file__))


def slug_of(method: Method) -> str:
    return file_of(method).stem.replace("_", "-")


def sections(doc: str) -> dict[str, str]:
    """Section name -> text, in the order of the docstring; text before the first section is under ""."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(doc), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2]))


def _doc(method: Method) -> dict[str, str]:
    assert method.target.__doc__, "has no docstring"
    found = sections(method.target.__doc__)
    if method.name != slug_of(method):
        raise Skip(f"a variant of {slug_of(method)}, whose docstring has the sections")
    return found


@contract(house=True)
def check_file_is_named_after_the_method(method: Method) -> None:
    """The file's stem is the registry name (or its beginning), the paper's slug, and stands in its kind's folder."""
    slug = slug_of(method)
    assert method.name == slug or method.name.startswith(f"{slug}-"), f"{method.name!r} is in {file_of(method).name}"
    assert method.paper == slug, f"paper={method.paper!r}, but the file is {file_of(method).name}"
    assert slug in modules(), f"{file_of(method)} is not in a folder of methods"


@contract(house=True)
def check_paper_is_in_the_catalogue(method: Method) -> None:
    """The catalogue has a row of that slug."""
    from regard.catalog import papers

    papers.get(method.paper)


@contract(house=True)
def check_docstring_sections(method: Method) -> None:
    """One sentence, the equation, then the sections in their order, none of them empty."""
    found = _doc(method)
    first = found[""].strip().partition("\n\n")[0]
    assert first.endswith("."), f"the docstring begins {first[:60]!r}, expected one sentence with a full stop"
    wanted = ["Args", "Example", "Differs", "Reference"]
    if method.kind in ("layer", "model"):
        wanted += ["Shape", "Cost"]
    if not inspect.signature(method.target).parameters:
        wanted.remove("Args")
    missing = [name for name in SECTIONS if name in wanted and not found.get(name, "").strip()]
    assert not missing, f"the docstring lacks {missing}; it has {list(found)[1:]}"
    order = [name for name in found if name]
    assert order == sorted(order, key=SECTIONS.index), f"sections are in the order {order}, expected that of {SECTIONS}"
    if method.kind != "study":
        assert ".. math::" in found[""], "no '.. math::' before the sections"


@contract(house=True)
def check_docstring_example_runs(method: Method) -> None:
    """The doctest under ``Example`` passes."""
    text = _doc(method).get("Example", "")
    module = sys.modules[method.target.__module__]
    test = doctest.DocTestParser().get_doctest(text, dict(vars(module)), method.name, str(module.__file__), 0)
    assert test.examples, "no '>>>' under Example"
    torch.manual_seed(0)
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not failed, "".join(said)


@contract(house=True)
def check_arxiv_id(method: Method) -> None:
    """The id under ``Reference`` is the catalogue's."""
    from regard.catalog import papers

    wanted = papers.get(method.paper).arxiv
    if not wanted:
        raise Skip("the catalogue has no arXiv id")
    found = re.findall(r"arXiv:\s*([\w./-]*\w)", _doc(method).get("Reference", ""))
    assert wanted in found, f"Reference names arXiv ids {found}, the catalogue has {wanted}"


@contract(house=True)
def check_argument_names(method: Method) -> None:
    """The house's words, in the house's order; what is on or off is said in the positive."""
    names = list(inspect.signature(method.target).parameters)
    strange = {name: OTHER_WORDS[name] for name in names if name in OTHER_WORDS}
    assert not strange, f"arguments {list(strange)} are called {list(strange.values())} here"
    ours = [name for name in names if name in ARGUMENTS]
    assert ours == sorted(ours, key=ARGUMENTS.index), f"arguments come as {ours}, expected the order of {ARGUMENTS}"
    negative = [name for name in names if re.match(r"(no|not|disable|without|skip)_", name)]
    assert not negative, f"arguments {negative} say what is off, expected what is on"


@contract(house=True)
def check_file_is_short(method: Method) -> None:
    lines = len(file_of(method).read_text().splitlines())
    assert lines <= LINES, f"{file_of(method).name} has {lines} lines, allowed {LINES}"


@contract(house=True)
def check_has_a_test_file(method: Method) -> None:
    """Somewhere under ``tests`` there is a ``test_<slug>.py``."""
    tests = ROOT.parent.parent / "tests"
    if not tests.is_dir():
        raise Skip("installed without its tests")
    wanted = f"test_{file_of(method).stem}.py"
    assert any(tests.rglob(wanted)), f"no {wanted} under tests"


@contract(house=True)
def check_expected_failures_are_checks(method: Method) -> None:
    """``tags.xfail`` names checks that apply to the method, each with a reason."""
    for name, reason in method.tags.xfail.items():
        assert name in CHECKS, f"xfail names {name!r}, which is no check"
        objection = CHECKS[name].objection(method)
        assert objection is None, f"xfail names {name!r}, which does not apply: {objection}"
        assert reason.strip(), f"xfail of {name!r} gives no reason"


@contract("layer", house=True)
def check_errors_are_value_errors(method: Method) -> None:
    """A wrong rank, a wrong or missing grid raise ValueError (or the shape checker's error, while tests run)."""
    layer = build(method)
    for what, (x, options) in wrong_inputs(method, layer).items():
        try:
            run(layer, x, **options)
        except (ValueError, TypeCheckError):
            continue
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}, expected ValueError: {error}") from None


@contract("layer", house=True)
def check_forward_follows_the_protocol(method: Method) -> None:
    """``forward(x, context=None, *, mask=None, grid=None, cache=None)``, or a part of it; more is by keyword."""
    parameters = inspect.signature(build(method).forward).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional in (["x"], ["x", "context"]), f"forward takes {positional} by position, expected x and context"
    promised = {"mask": method.tags.mask, "cache": method.tags.cache, "context": method.tags.cross}
    promised["grid"] = method.tags.input == "grid"
    lacking = [name for name, tagged in promised.items() if tagged and name not in parameters]
    assert not lacking, f"the tags promise {lacking}, but forward has no such argument"
