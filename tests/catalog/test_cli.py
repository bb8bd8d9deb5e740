"""The commands papers, show and cite."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from regard.catalog import registry
from regard.catalog.cite import bibtex
from regard.catalog.papers import find, get, neighbours, papers
from regard.cli import app


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def listed(*arguments: str) -> list[str]:
    return [line.split("\t")[0] for line in run("papers", *arguments).splitlines()]


def test_papers_in_a_pipe_are_whole_lines() -> None:
    lines = run("papers").splitlines()
    assert len(lines) == 231
    for line, paper in zip(lines, papers(), strict=True):
        built = "built" if paper.built else ""
        assert line.split("\t") == [paper.slug, str(paper.year), paper.kind, paper.domain, built, paper.title]


def test_papers_filters() -> None:
    assert listed("--kind", "explainer") == [p.slug for p in papers(kind="explainer")]
    both = listed("--kind", "explainer", "--kind", "study", "--domain", "cnn", "--domain", "vlm")
    assert both == [p.slug for p in papers(kind=["explainer", "study"], domain=["cnn", "vlm"])]
    assert listed("--year", "2015", "--year", "2016") == [p.slug for p in papers(year=[2015, 2016])]
    facets = ("--facet", "distribution=relu", "--facet", "distribution=l1", "--facet", "causal_ok=true")
    assert listed(*facets) == [p.slug for p in find(distribution=["relu", "l1"], causal_ok=True)]
    assert listed("write-head") == ["multi-query-attention"]
    assert listed("no title has this") == []


def test_papers_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "modules", lambda: {"cbam": ("regard.layers.cnn.cbam", "layer")})
    assert listed("--built") == ["cbam"]
    assert len(listed("--not-built")) == 230
    assert "regard.layers.cnn.cbam" in run("show", "cbam")


def test_papers_json_is_json_and_complete() -> None:
    read = json.loads(run("papers", "--json"))
    assert len(read) == 231
    assert read == json.loads(json.dumps([p.as_dict() for p in papers()]))
    assert read[0]["facets"]["sequences"] == "co"
    assert json.loads(run("papers", "no title has this", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "cbm"), "regard: slug='cbm' is not in the catalogue; nearest: cbam"),
        (("cite", "rela", "cbm"), "regard: slug='cbm' is not in the catalogue; nearest: cbam"),
        (("papers", "--kind", "layr"), "regard: kind='layr' is not one of layer"),
        (("papers", "--facet", "distribtion=relu"), "is not something to filter by; nearest: distribution"),
        (("papers", "--facet", "relu"), "regard: --facet 'relu' must be name=value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    said = run(*arguments, code=2)
    assert message in said
    assert len(said.splitlines()) == 1


def test_show() -> None:
    said = run("show", "faster_neighborhood_attention")
    paper = get("faster-neighborhood-attention")
    for part in (paper.title, paper.arxiv, "Ali Hassani", "SHI-Labs/NATTEN", "builds on", "exact_same_function"):
        assert part in said
    assert all(other.slug in said for other in neighbours(paper.slug))


def test_show_says_what_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "modules", dict)
    assert "not built yet" in run("show", "cbam")


def test_show_json() -> None:
    read = json.loads(run("show", "cbam", "--json"))
    assert read.pop("neighbours") == [p.slug for p in neighbours("cbam")]
    assert read == json.loads(json.dumps(get("cbam").as_dict()))


def test_cite() -> None:
    assert run("cite", "rela", "cbam") == f"{bibtex(get('rela'))}\n\n{bibtex(get('cbam'))}\n"


@pytest.mark.parametrize(("arguments", "code"), [(["papers", "--built"], 0), (["show", "cbm"], 2), (["--help"], 0)])
def test_exit_codes_of_the_program(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from regard.cli import app; app()", *arguments], capture_output=True, text=True
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
