"""The catalogue as a whole, the labels set by hand, and searching it."""

import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.catalog import registry
from regard.catalog.facets import FLAGS, MULTIPLE, SINGLE
from regard.catalog.papers import FILE, FILTERS, distance, find, get, neighbours, papers, table, validate

ROWS: dict[str, dict[str, Any]] = tomllib.loads(FILE.read_text(encoding="utf-8"))


def slugs(found: list) -> list[str]:
    return [paper.slug for paper in found]


def test_all_231_papers_once() -> None:
    heads = re.findall(r"^\[(.+)\]$", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(heads) == len(set(heads)) == 231
    assert slugs(papers()) == heads
    assert Counter(paper.kind for paper in papers()) == {
        "model": 83,
        "layer": 55,
        "controller": 33,
        "accelerator": 17,
        "objective": 16,
        "study": 15,
        "explainer": 12,
    }


def test_the_file_is_valid() -> None:
    assert validate() == []


FIXTURES: dict[str, dict[str, Any]] = {
    "stacked-attention": {
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "soft",
        "alignment": ["additive"],
        "distribution": "softmax",
    },
    "show-attend-tell": {"sequences": "distinctive", "levels": "single", "positions": "soft", "stochastic": True},
    "multi-query-attention": {
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "alignment": ["scaled_dot"],
        "distribution": "softmax",
        "cost": "N2",
        "state": "kv_reduced",
    },
    "moba": {"sequences": "self", "positions": "hard", "support": "topk", "cost": "NK"},
    "cbam": {
        "sequences": "self",
        "axis": ["space", "channel"],
        "distribution": "sigmoid",
        "aggregate": "gated_elementwise",
    },
    "slot-attention": {"sequences": "distinctive", "distribution": "softmax", "touches": ["query", "weight"]},
    "random-feature-attention-study": {
        "sequences": "distinctive",
        "distribution": "relu",
        "aggregate": "unnormalised_sum",
    },
    "rela": {"distribution": "relu"},
    "dynamic-convolution": {"aggregate": "conv"},
    "faster-neighborhood-attention": {"exactness": "exact_same_function"},
    "flash-window-attention": {"exactness": "exact_same_function"},
}


@pytest.mark.parametrize("slug", FIXTURES)
def test_labels_set_by_hand(slug: str) -> None:
    facets = get(slug).facets
    for key, value in FIXTURES[slug].items():
        assert getattr(facets, key) == (tuple(value) if isinstance(value, list) else value), key
        assert slug in slugs(find(**{key: value}))


def test_one_rule_for_all() -> None:
    for paper in papers():
        f = paper.facets
        for key, values in MULTIPLE.items():
            order = list(values)
            assert list(getattr(f, key)) == sorted(getattr(f, key), key=order.index), f"{paper.slug}: order of {key}"
        if {"vit", "llm", "vlm", "diffusion_transformer"} & set(f.architecture):
            assert "transformer" in f.architecture, paper.slug
        assert not {"vlm", "llm"} <= set(f.architecture), f"{paper.slug}: a vlm holds an llm"
        assert paper.domain in f.application, paper.slug
        if paper.kind == "explainer":
            assert f.interpretation != "none", paper.slug
            assert f.exactness == "exact_same_function", paper.slug
        if paper.kind == "accelerator":
            assert f.interpretation == "none", paper.slug
        if paper.kind == "controller":
            assert f.host, paper.slug
            assert f.interpretation in ("none", "perturbs"), paper.slug
        if f.distribution == "topk_softmax" or f.support in ("topk", "block_dynamic"):
            assert f.positions == "hard", paper.slug


def brute_force(wanted: dict[str, Any]) -> list[str]:
    """Slugs from the bare TOML tables, one comparison at a time."""
    found = []
    for slug, row in ROWS.items():
        ok = True
        for key, value in wanted.items():
            any_of = value if isinstance(value, list) else [value]
            has = row[key] if isinstance(row[key], list) else [row[key]]
            hit = False
            for x in any_of:
                for y in has:
                    hit = hit or (x.lower() in y.lower() if key == "host" else x == y)
            ok = ok and hit
        if ok:
            found.append(slug)
    return found


def values_of(key: str) -> st.SearchStrategy:
    values = set()
    for row in ROWS.values():
        values |= set(row[key] if isinstance(row[key], list) else [row[key]])
    one = st.sampled_from(sorted(values))
    return one | st.lists(one, max_size=4)


@given(st.fixed_dictionaries({}, optional={key: values_of(key) for key in FILTERS}))
def test_find_agrees_with_brute_force(wanted: dict[str, Any]) -> None:
    assert slugs(find(**wanted)) == brute_force(wanted)


@given(st.lists(st.sampled_from(FILTERS), min_size=1, max_size=3, unique=True), st.sampled_from(list(ROWS)))
def test_a_paper_is_found_by_its_own_facets(keys: list[str], slug: str) -> None:
    wanted = {key: ROWS[slug][key] for key in keys}
    found = slugs(find(**wanted))
    assert slug in found
    assert found == brute_force(wanted)


def test_filters() -> None:
    assert all(p.kind == "layer" and p.domain == "vision" for p in papers(kind="layer", domain="vision"))
    assert len(papers(kind="layer")) + len(papers(kind="model")) == len(papers(kind=["layer", "model"]))
    assert {p.year for p in papers(year=range(2015, 2018))} == {2015, 2016, 2017}
    assert slugs(papers("CBAM")) == ["cbam"]
    assert slugs(papers("write-head")) == slugs(papers("Multi-Query")) == ["multi-query-attention"]
    assert slugs(papers("sparse", distribution="relu")) == ["rela"]
    assert papers("no title has this") == []
    assert papers(axis=[]) == []


def test_built_is_what_has_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "modules", lambda: {"cbam": ("regard.layers.cnn.cbam", "layer")})
    assert slugs(papers(built=True)) == ["cbam"]
    assert len(papers(built=False)) == 230
    assert get("cbam").module == "regard.layers.cnn.cbam"
    assert get("rela").module is None
    assert get("cbam").as_dict()["built"] is True


@pytest.mark.parametrize(
    ("search", "wanted", "message"),
    [
        (papers, {"tetx": "x"}, "tetx='x' is not something to filter by; nearest: text"),
        (papers, {"distributoin": "relu"}, "nearest: distribution"),
        (papers, {"kind": "layr"}, "kind='layr' is not one of layer"),
        (papers, {"domain": ["vision", "visoin"]}, "domain='visoin' is not one of vision"),
        (papers, {"year": "2020"}, "year='2020' must be a year"),
        (find, {"built": True}, "built=True is not something to filter by"),
        (find, {"axis": "spce"}, "axis='spce' is not one of space"),
        (find, {"causal_ok": "yes"}, "causal_ok='yes' must be true or false"),
        (find, {"host": 3}, "host=3 must be a string"),
    ],
)
def test_wrong_filters_are_refused(search: Any, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(**wanted)


def test_get() -> None:
    assert get("multi_query_attention") is get("multi-query-attention")
    with pytest.raises(ValueError, match="slug='cbm' is not in the catalogue; nearest: cbam"):
        get("cbm")


@pytest.mark.parametrize(
    ("rows", "cols"), [("distribution", "kind"), ("axis", "touches"), ("year", "domain"), ("causal_ok", "cost")]
)
def test_table_counts(rows: str, cols: str) -> None:
    counts = table(rows, cols)
    for row, line in counts.items():
        for col, count in line.items():
            assert count == len(brute_force({rows: row, cols: col}))
    seen = {v for r in ROWS.values() for v in (r[cols] if isinstance(r[cols], list) else [r[cols]])}
    assert all(seen <= set(line) for line in counts.values())
    if cols in SINGLE:
        assert set(next(iter(counts.values()))) == set(SINGLE[cols]), "a value that no paper has is a column of zeros"


def test_table_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="rows='host' is not a facet to count"):
        table("host", "kind")
    with pytest.raises(ValueError, match="cols='knd' is not a facet to count; nearest: kind"):
        table("axis", "knd")


def test_distance_counts_what_differs() -> None:
    a = get("rela")
    assert distance(a, a) == 0
    assert distance(a, replace(a, title="other", year=2030, domain=get("cbam").domain)) == 0
    assert distance(a, replace(a, kind=get("fastv").kind)) == 1
    b = replace(a, facets=replace(a.facets, distribution="softmax", causal_ok=False, axis=("token", "space", "head")))
    assert distance(a, b) == pytest.approx(2 + 2 / 3)
    assert distance(b, a) == distance(a, b)


@pytest.mark.parametrize("slug", ["cbam", "prompt-to-prompt", "attention-survey"])
def test_neighbours_are_the_nearest(slug: str) -> None:
    near = neighbours(slug, n=230)
    far = [distance(get(slug), paper) for paper in near]
    assert far == sorted(far)
    assert {*slugs(near), slug} == set(ROWS)
    assert slugs(neighbours(slug)) == slugs(near)[:5]


def test_neighbours_make_sense() -> None:
    assert "triplet-attention" in slugs(neighbours("cbam"))
    assert neighbours("cbam", n=0) == []
    with pytest.raises(ValueError, match="n=-1"):
        neighbours("cbam", n=-1)


@pytest.mark.parametrize(
    ("slug", "change", "message"),
    [
        ("rela", {"distribution": "reluu"}, "rela: distribution='reluu' is not one of relu"),
        ("rela", {"cots": "N"}, "rela: cots='N' is not a facet; facets, nearest first: cost"),
        ("rela", {"kind": "layr"}, "rela: kind='layr' is not one of layer"),
        ("rela", {"domain": None}, "rela: domain=None is not one of"),
        ("rela", {"title": " "}, "rela: title=' ' must be a line of text"),
        ("rela", {"year": "2021"}, "rela: title=.* year='2021' must be"),
        ("rela", {"arxiv": "2104.7012x"}, "rela: arxiv='2104.7012x' must be an identifier"),
        ("rela", {"official": "zero"}, "rela: official='zero' must be \"owner/name\""),
        ("rela", {"authors": "Biao Zhang"}, "rela: authors='Biao Zhang' must be a list of names"),
        ("rela", {"depends_on": ["cbm"]}, "rela: depends_on='cbm' is not here; nearest: cbam"),
        ("rela", {"arxiv": ROWS["cbam"]["arxiv"]}, "rela: arxiv='1807.06521' is also that of cbam"),
        ("rela", {"title": ROWS["cbam"]["title"]}, "rela: title=.* is also that of cbam"),
        ("nat", {"depends_on": ["faster-neighborhood-attention"]}, "depends_on goes in a circle: .*nat"),
    ],
)
def test_validate_names_what_is_wrong(slug: str, change: dict[str, Any], message: str) -> None:
    problems = validate({**ROWS, slug: {**ROWS[slug], **change}})
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems[0]


def test_validate_goes_on_after_the_first_problem() -> None:
    bad = {
        **ROWS,
        "rela": {**ROWS["rela"], "cost": "N3"},
        "cbam": {k: v for k, v in ROWS["cbam"].items() if k != "state"},
    }
    assert len(validate(bad)) == 2


def test_papers_show_themselves_as_a_table() -> None:
    found = papers(kind="explainer")
    assert type(found[2:5]) is type(found)
    assert found[0].slug == slugs(found)[0]
    assert found.table().row_count == 12
    shown = repr(found)
    assert all(slug in shown for slug in slugs(found))
    assert max(map(len, shown.splitlines())) <= 120
    assert "12 found" in shown


def test_reading_needs_neither_torch_nor_rich() -> None:
    code = "import sys, regard.catalog.papers as p; p.papers(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "rich", "typer"} & set(done.stdout.split())


def test_flags_are_booleans_and_lists_are_lists() -> None:
    for slug, row in ROWS.items():
        assert all(type(row[key]) is bool for key in FLAGS), slug
        assert all(type(row[key]) is list for key in MULTIPLE), slug
