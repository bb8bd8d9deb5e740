"""The catalogue as a page that can be filtered, and the counts that the README shows."""

from __future__ import annotations

import html
from collections.abc import Iterable

from regard.catalog.papers import Paper, Papers, papers


def counts(base: str = "docs/") -> str:
    """What is built of each kind, as Markdown; links are relative to a file that ``base`` leads from."""
    everything = papers()
    lines = [f"**{len(everything)}** papers, **{sum(p.built for p in everything)}** built.", ""]
    lines += ["| kind | papers | built | |", "| --- | --: | --: | --- |"]
    for kind in dict.fromkeys(p.kind for p in everything):
        these = papers(kind=kind)
        built = [p.slug for p in these if p.built]
        lines.append(f"| {kind} | {len(these)} | {len(built)} | {', '.join(built)} |")
    return "\n".join(lines)


def _options(name: str, values: Iterable[str]) -> str:
    choices = "".join(f'<option value="{v}">{v}</option>' for v in sorted(values))
    return f'<label>{name} <select name="{name}"><option value="">all</option>{choices}</select></label>'


def _row(paper: Paper) -> str:
    built = "yes" if paper.built else "no"
    name = f'<a href="methods/{paper.slug}.html">{paper.slug}</a>' if paper.built else paper.slug
    title = html.escape(paper.title)
    if paper.arxiv:
        title = f'<a href="https://arxiv.org/abs/{paper.arxiv}">{title}</a>'
    words = html.escape(" ".join([paper.slug, paper.title, *paper.authors]).lower(), quote=True)
    facts = f'data-kind="{paper.kind}" data-domain="{paper.domain}" data-built="{built}" data-text="{words}"'
    mark = '<span class="built">built</span>' if paper.built else ""
    cells = (f"<code>{name}</code> {mark}", title, paper.year, paper.kind, paper.domain)
    return f"<tr {facts}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def page(everything: Papers) -> str:
    """All rows, with a form that a few lines of script put to work."""
    form = (
        '<form id="filter" hidden><label>text <input name="text" type="search"></label>'
        + _options("kind", {p.kind for p in everything})
        + _options("domain", {p.domain for p in everything})
        + _options("built", ("yes", "no"))
        + '<output aria-live="polite"></output></form>'
    )
    head = "".join(f"<th>{name}</th>" for name in ("name", "title", "year", "kind", "domain"))
    rows = "\n".join(map(_row, everything))
    return (
        f"# Catalogue\n\n{len(everything)} papers, {sum(p.built for p in everything)} of them with code here. "
        "On the command line: `regard papers`, and `regard show` for the facets of one.\n\n"
        f'{form}\n\n<div class="wide" data-search-exclude><table id="catalogue"><thead><tr>{head}</tr></thead><tbody>\n{rows}\n'
        '</tbody></table></div>\n\n<script src="assets/catalogue.js"></script>\n'
    )
