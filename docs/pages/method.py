"""One page for each paper that is built, from the records and docstrings of its methods."""

from __future__ import annotations

import inspect
import sys
from ast import get_docstring, parse
from itertools import groupby
from pathlib import Path
from typing import Any

from pages import results
from pages.docstring import body, code, example, first_sentence, inline, items, sections
from pages.picture import influence

from regard.catalog.cite import bibtex
from regard.catalog.papers import Paper, get, neighbours
from regard.catalog.registry import FOLDERS, ROOT, Method, methods

PLURAL = {"study": "studies"}


def by_paper() -> dict[str, list[Method]]:
    """Slug -> its methods, the one that is called like the paper first."""
    found: dict[str, list[Method]] = {}
    for method in methods():
        found.setdefault(method.paper, []).append(method)
    order = list(FOLDERS)
    return {
        slug: sorted(group, key=lambda m: (m.name != slug, order.index(m.kind)))
        for slug, group in sorted(found.items())
    }


def _argument(p: inspect.Parameter) -> str:
    """One argument with its type and default."""
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    kind = p.annotation if isinstance(p.annotation, str) else getattr(p.annotation, "__name__", str(p.annotation))
    typed = "" if p.annotation is p.empty else f": {kind}"
    default = p.default.__name__ if inspect.isfunction(p.default) else repr(p.default)
    return f"{stars}{p.name}{typed}" + ("" if p.default is p.empty else f" = {default}")


def signature(target: Any) -> str:
    """How ``target`` is called, on one line where it fits."""
    parts: list[str] = []
    for p in inspect.signature(target).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(_argument(p))
    text = f"{target.__name__}({', '.join(parts)})"
    return text if len(text) <= 90 else "\n".join([f"{target.__name__}(", *(f"    {part}," for part in parts), ")"])


def described(method: Method) -> Any:
    """What carries the sections: the target, or the class that a factory builds."""
    target = inspect.unwrap(method.target)
    if "Differs" in sections(target.__doc__):
        return target
    returned = inspect.signature(target).return_annotation
    if isinstance(returned, str):
        returned = vars(sys.modules[target.__module__]).get(returned, target)
    return returned if inspect.isclass(returned) and returned.__doc__ else target


def _face(target: Any, names: list[Method], level: int, picture: str) -> list[str]:
    """Everything that one docstring says, with headings of ``level``."""
    h = "#" * level
    found = sections(target.__doc__)
    summary, _, text = found[""].partition("\n\n")
    lines = [inline(" ".join(summary.split())), "", picture, "", body(text), ""]
    if "Example" in found:
        lines += [f"{h} Run it", "", f"```pycon\n{example(found['Example'], target)}\n```", ""]
    lines += [f"{h} Arguments", "", f"```python\n{signature(target)}\n```", "", items(found.get("Args", "")), ""]
    others = [m for m in names if inspect.unwrap(m.target) is not target]
    if others:
        lines += ["| by name | |", "| --- | --- |"]
        lines += [f"| {code(m.name)} | {first_sentence(m.target.__doc__)} |" for m in others] + [""]
    if "Raises" in found:
        lines += [f"{h} Refuses", "", items(found["Raises"]), ""]
    for name in ("Shape", "Cost"):
        if name in found:
            lines += [f"{h} {name}", "", body(found[name]), ""]
    if "Differs" in found:
        differs = body(found["Differs"])
        lines += [f"{h} Differs from the paper", "", differs[:1].upper() + differs[1:], ""]
    return lines


def page(paper: Paper, group: list[Method]) -> str:
    kinds = ", ".join(dict.fromkeys(m.kind for m in group))
    title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.title
    lines = [f"# {paper.slug}", "", f"*{title}*, {paper.year} · {kinds} · {paper.domain}", "{ .lead }", ""]
    faces = [(target, list(names)) for target, names in groupby(group, described)]
    for i, (target, names) in enumerate(faces):
        if i:
            lines += [f"## {', '.join(m.name for m in names) if len(names) < 4 else target.__name__}", ""]
        lines += _face(target, names, 3 if i else 2, influence(names[0]))
    if measured := results.measurements(paper.slug):
        lines += ["## Measured", "", measured, ""]
    lines += ["## Claim", "", _setup(paper.slug), "", results.claim(paper.slug), ""]
    reference = next(
        (s["Reference"] for m in group if "Reference" in (s := sections(described(m).__doc__))), paper.title
    )
    lines += ["## Reference", "", inline(" ".join(reference.split())), "", f"```bibtex\n{bibtex(paper)}\n```", ""]
    lines += ["## Code", "", *(f"- [{name}](../{path})" for name, path in code_of(paper.slug).items()), ""]
    near = [f"[{p.slug}]({p.slug}.md)" if p.built else code(p.slug) for p in neighbours(paper.slug)]
    lines += ["## Does most alike", "", ", ".join(near) + " (by the facets of the catalogue).", ""]
    return "\n".join(lines)


def _setup(slug: str) -> str:
    """What the claim measures, in the words of its file."""
    file = ROOT / "claims" / f"{slug.replace('-', '_')}.py"
    return body(get_docstring(parse(file.read_text())) or "") if file.exists() else ""


def code_of(slug: str) -> dict[str, str]:
    """Files of a paper in the repository -> where the site has a copy: method, claim and test."""
    stem, root = slug.replace("-", "_"), ROOT.parent.parent
    files = [*sorted(ROOT.rglob(f"{stem}.py")), *sorted((root / "tests").rglob(f"test_{stem}.py"))]
    names = [file.relative_to(root).as_posix() for file in files]
    return {name: f"code/{name}.txt" for name in names}


def index(papers: dict[str, list[Method]]) -> str:
    lines = [
        "# Methods",
        "",
        f"{len(papers)} papers are built; the [catalogue](../catalogue.md) has the others too.",
        "",
    ]
    for kind in FOLDERS:
        these = {slug: group for slug, group in papers.items() if group[0].kind == kind}
        if these:
            lines += [
                f"## {PLURAL.get(kind, kind + 's').capitalize()}",
                "",
                "| name | | claim |",
                "| --- | --- | --- |",
            ]
            for slug, group in these.items():
                lines.append(
                    f"| [{slug}]({slug}.md) | {first_sentence(described(group[0]).__doc__)} | {results.state(slug)} |"
                )
            lines.append("")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Path in the site -> Markdown."""
    papers = by_paper()
    made = {f"methods/{slug}.md": page(get(slug), group) for slug, group in papers.items()}
    return {"methods/index.md": index(papers), **made}


def copies() -> dict[str, Path]:
    """Path in the site -> file of the repository that is copied there."""
    root = ROOT.parent.parent
    return {path: root / name for slug in by_paper() for name, path in code_of(slug).items()}


def navigation() -> list[Any]:
    """The section Methods: one group a kind."""
    papers = by_paper()
    groups: list[Any] = ["methods/index.md"]
    for kind in FOLDERS:
        these = [{slug: f"methods/{slug}.md"} for slug, group in papers.items() if group[0].kind == kind]
        if these:
            groups.append({PLURAL.get(kind, kind + "s").capitalize(): these})
    return groups
