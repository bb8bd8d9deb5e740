"""BibTeX: keys, escapes, and every paper of the catalogue."""

import re
from dataclasses import replace

import pytest

from regard.catalog.cite import bibtex
from regard.catalog.papers import Paper, get, papers


def fields(entry: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, flags=re.MULTILINE))


def key(paper: Paper) -> str:
    return re.match(r"@article\{([^,]+),\n", bibtex(paper)).group(1)


def test_fields() -> None:
    assert fields(bibtex(get("rela"))) == {
        "title": "{Sparse Attention with Linear Units}",
        "author": "Biao Zhang and Ivan Titov and Rico Sennrich",
        "year": "2021",
        "journal": "arXiv preprint arXiv:2104.07012",
        "eprint": "2104.07012",
        "archivePrefix": "arXiv",
    }


def test_an_unknown_author_is_left_out() -> None:
    paper = replace(get("rela"), authors=())
    assert "author" not in fields(bibtex(paper))
    assert key(paper) == "rela2021"


def test_a_paper_that_is_not_on_arxiv() -> None:
    assert set(fields(bibtex(replace(get("rela"), arxiv=None)))) == {"title", "author", "year"}


@pytest.mark.parametrize(
    ("slug", "expected"),
    [
        ("multi-query-attention", "shazeer2019"),
        ("levit", "graham2021"),
        ("convit", "dascoli2021"),
        ("4d-neural-fields", "vanhoorick2022"),
        ("vsa", "vsa2022"),
        ("segvit", "segvit2022"),
    ],
)
def test_key_is_family_name_and_year_or_slug_where_two_would_be_the_same(slug: str, expected: str) -> None:
    assert key(get(slug)) == expected


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("50 % of a & b_c #1 for $2 {x}", r"50 \% of a \& b\_c \#1 for \$2 \{x\}"),
        ("a~b^c\\d", r"a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d"),
        ("Occ²Net in O(n²) – Jérôme, João, Süß, Ça, Dvořák", None),
    ],
)
def test_escapes(title: str, expected: str | None) -> None:
    written = fields(bibtex(replace(get("rela"), title=title)))["title"]
    if expected is None:
        expected = r"""Occ$^2$Net in O(n$^2$) -- J{\'e}r{\^o}me, Jo{\~a}o, S{\"u}ß, {\c C}a, Dvo{\v r}{\'a}k"""
    assert written == f"{{{expected}}}"


def test_every_paper_can_be_cited() -> None:
    entries = {paper.slug: bibtex(paper) for paper in papers()}
    keys = [re.match(r"@article\{([a-z0-9-]+),\n", entry).group(1) for entry in entries.values()]
    assert len(set(keys)) == 231
    for slug, entry in entries.items():
        assert entry.isascii(), slug
        bare = re.sub(r"\\[{}]", "", entry)
        assert bare.count("{") == bare.count("}"), slug
        assert fields(entry)["eprint"] == get(slug).arxiv


def test_authors_that_must_be_known() -> None:
    known = """attention-survey multi-query-attention rela selective-self-attention moba flatten nat hilo biformer
        maxvit cbam triplet-attention slot-attention perceiver attention-flow generic-attribution normgrad fastv
        prompt-to-prompt headmask layernorm-expressivity native-sparse-attention"""
    assert [slug for slug in known.split() if not get(slug).authors] == []
