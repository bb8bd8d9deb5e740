"""The verbs, the objects that they give back and the blocks that methods are made of, from their docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from pages.docstring import SECTIONS, body, code, first_sentence, inline, items, sections
from pages.method import signature

import regard

OBJECTS = (
    "regard.catalog.papers:Papers",
    "regard.catalog.papers:Paper",
    "regard.catalog.registry:Method",
    "regard.core.site:Sites",
    "regard.core.site:Site",
    "regard.core.capture:Capture",
    "regard.core.call:Call",
    "regard.core.step:Step",
    "regard.core.watch:Watch",
    "regard.core.swap:Swap",
    "regard.core.maps:Map",
    "regard.view.comparison:Comparison",
    "regard.claims.claim:ClaimResult",
    "regard.claims.claim:Row",
    "regard.checks.run:CheckReport",
    "regard.bench.run:Bench",
    "regard.bench.run:Measured",
)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _text(doc: str | None) -> list[str]:
    """A docstring with its sections as bold words."""
    found = sections(doc)
    lines = [body(found[""]), ""]
    for name in SECTIONS:
        if name not in found:
            continue
        if name in ("Args", "Attributes", "Raises"):
            lines += [f"**{name}**", "", items(found[name]), ""]
        elif name == "Example":
            lines += ["**Example**", "", f"```pycon\n{found[name]}\n```", ""]
        else:
            lines += [f"**{name}.** {body(found[name])}", ""]
    return lines


def _members(owner: type) -> list[str]:
    """Public methods and properties that ``owner`` itself defines, as a table."""
    rows = []
    for name, value in vars(owner).items():
        value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        value = value.fget if isinstance(value, property) else value
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        how = name if isinstance(vars(owner)[name], property) else f"{name}{_arguments(value)}"
        rows.append(f"| {code(how)} | {first_sentence(value.__doc__)} |")
    return ["| | |", "| --- | --- |", *rows, ""] if rows else []


def _arguments(function: Any) -> str:
    """Names and defaults without types."""
    found = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in found if p.name not in ("self", "cls")]
    return str(inspect.Signature(bare))


def _entry(name: str, value: Any) -> list[str]:
    lines = [f"## {name}", ""]
    if callable(value):
        lines += [f"```python\n{signature(value)}\n```", ""]
    lines += _text(value.__doc__)
    return lines + (_members(value) if inspect.isclass(value) else [])


def verbs() -> str:
    lines = [
        "# Verbs",
        "",
        "Everything that `import regard as rg` gives. Each loads what it needs when it is first used.",
        "",
    ]
    for name in regard.__all__:
        if name != "__version__":
            lines += _entry(name, getattr(regard, name))
    return "\n".join(lines)


def objects() -> str:
    lines = ["# Objects", "", "What the verbs give back.", ""]
    for name in OBJECTS:
        value = _load(name)
        lines += _entry(value.__name__, value)
    return "\n".join(lines)


def blocks() -> str:
    """Public functions and classes of ``regard.ops`` and ``regard.nn``, one line each."""
    lines = [
        "# Blocks",
        "",
        "What methods are made of. Axes are (b, h, l, d) for queries and (b, g, s, d) for keys.",
        "",
    ]
    for package in ("regard.nn", "regard.ops"):
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            if info.ispkg:
                continue
            module = importlib.import_module(info.name)
            own = [
                v
                for n, v in vars(module).items()
                if not n.startswith("_") and getattr(v, "__module__", "") == info.name
            ]
            rows = [v for v in own if inspect.isfunction(v) or inspect.isclass(v)]
            if rows:
                lines += [
                    f"## {info.name}",
                    "",
                    inline(" ".join((module.__doc__ or "").split())),
                    "",
                    "| | |",
                    "| --- | --- |",
                ]
                lines += [f"| {code(v.__name__)} | {first_sentence(v.__doc__)} |" for v in rows] + [""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    return {"reference/verbs.md": verbs(), "reference/objects.md": objects(), "reference/blocks.md": blocks()}
