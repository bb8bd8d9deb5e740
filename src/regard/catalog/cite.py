"""A paper as a BibTeX entry."""

from __future__ import annotations

import unicodedata

from regard.catalog.papers import Paper, papers

_TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "–": "--",
    "—": "---",
}
_ACCENTS = {
    "\N{COMBINING GRAVE ACCENT}": "`",
    "\N{COMBINING ACUTE ACCENT}": "'",
    "\N{COMBINING CIRCUMFLEX ACCENT}": "^",
    "\N{COMBINING TILDE}": "~",
    "\N{COMBINING DIAERESIS}": '"',
    "\N{COMBINING CEDILLA}": "c ",
    "\N{COMBINING CARON}": "v ",
}


def _tex(text: str) -> str:
    """Plain text for TeX: its special characters escaped, accents and superscripts written out; the rest as it is."""

    def one(c: str) -> str:
        if c in _TEX:
            return _TEX[c]
        if unicodedata.decomposition(c).startswith("<super>"):
            return f"$^{unicodedata.normalize('NFKD', c)}$"
        base, mark = unicodedata.normalize("NFD", c)[:1], unicodedata.normalize("NFD", c)[1:]
        return f"{{\\{_ACCENTS[mark]}{base}}}" if mark in _ACCENTS else c

    return "".join(map(one, text))


def _first_author(paper: Paper) -> str:
    """Family name of the first author in small ASCII letters; empty where no author is recorded."""
    if not paper.authors:
        return ""
    name = paper.authors[0]
    family = name.split(",")[0] if "," in name else name.split()[-1]
    return "".join(c for c in unicodedata.normalize("NFKD", family).lower() if c.isascii() and c.isalpha())


def _key(paper: Paper) -> str:
    """Family name and year; slug and year where no author is recorded or another paper has the same name and year."""
    family = _first_author(paper)
    same = [p for p in papers(year=paper.year) if p.slug != paper.slug and _first_author(p) == family]
    return f"{paper.slug if same or not family else family}{paper.year}"


def bibtex(paper: Paper) -> str:
    """``paper`` as an ``@article`` entry; without an author field where the authors are not recorded.

    Example:
        >>> from regard.catalog.papers import get
        >>> print(bibtex(get("multi-query-attention")))
        @article{shazeer2019,
          title = {{Fast Transformer Decoding: One Write-Head is All You Need}},
          author = {Noam Shazeer},
          year = {2019},
          journal = {arXiv preprint arXiv:1911.02150},
          eprint = {1911.02150},
          archivePrefix = {arXiv},
        }
    """
    fields = {"title": f"{{{_tex(paper.title)}}}"}
    if paper.authors:
        fields["author"] = " and ".join(map(_tex, paper.authors))
    fields["year"] = str(paper.year)
    if paper.arxiv:
        fields |= {"journal": f"arXiv preprint arXiv:{paper.arxiv}", "eprint": paper.arxiv, "archivePrefix": "arXiv"}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@article{{{_key(paper)},", *lines, "}"])
