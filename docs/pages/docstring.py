"""Docstrings as this project writes them, turned into Markdown: named sections, TeX, roles, lists, simple tables."""

from __future__ import annotations

import ast
import builtins
import html
import inspect
import re
from collections.abc import Callable
from typing import Any

SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Cost", "Example", "Differs", "Reference")
_SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):[ \t]*", re.MULTILINE)
_INLINE = re.compile(r"``(?P<code>.+?)``|:math:`(?P<math>.+?)`|:\w+:`~?(?P<role>.+?)`", re.DOTALL)
_MATH = re.compile(r"^\.\. math::")
_RULE = re.compile(r"^=+( +=+)+$")
_ITEM = re.compile(r"^(\*{0,2}\w[\w*, /.]*?):\s+(.*)$")


def sections(doc: str | None) -> dict[str, str]:
    """Section name -> text without its indent; the text before the first section is under ""."""
    parts = _SECTION.split(inspect.cleandoc(doc or ""))
    found = {"": parts[0].strip()}
    for name, text in zip(parts[1::2], parts[2::2]):
        first, _, rest = text.partition("\n")
        found[name] = f"{first}\n{inspect.cleandoc(f'{chr(10)}{rest}')}".strip()
    return found


def first_sentence(doc: str | None) -> str:
    """The paragraph that a docstring begins with, on one line."""
    return inline(" ".join(sections(doc)[""].partition("\n\n")[0].split()))


def code(text: str) -> str:
    """``text`` as inline code that stays as it is inside a table too."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def tex(text: str, display: bool = False) -> str:
    """TeX for the script of the page; several lines become one aligned block, an empty line a space between statements."""
    text = " ".join(re.sub(r"\n\s*\n", r" \\qquad ", text.strip()).split())
    if display and re.search(r"&|\\\\", text) and r"\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    tag = "div" if display else "span"
    return f'<{tag} class="math">{html.escape(text, quote=False)}</{tag}>'


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~^$])", lambda m: f"&#{ord(m[1])};", text)


def inline(text: str) -> str:
    """Code, roles and formulas within a line; every other character means itself."""
    out, at = [], 0
    for found in _INLINE.finditer(text):
        out.append(_plain(text[at : found.start()]))
        if found["math"]:
            out.append(tex(found["math"].replace("\n", " ")))
        else:
            out.append(code((found["code"] or found["role"].rpartition(".")[2]).replace("\n", " ")))
        at = found.end()
    return "".join([*out, _plain(text[at:])])


def _table(lines: list[str]) -> list[str]:
    """A simple table: columns begin where the rules do."""
    starts = [m.start() for m in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    rows = [[line[a:b].strip() for a, b in zip(starts, ends)] for line in lines if not _RULE.match(line)]
    cells = ["| " + " | ".join(map(inline, row)) + " |" for row in rows]
    return [cells[0], "|" + " --- |" * len(starts), *cells[1:]]


def body(text: str) -> str:
    """Paragraphs, lists, formulas and tables as Markdown."""
    out: list[str] = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        line = lines[i]
        if _MATH.match(line):
            block = [_MATH.sub("", line)]
            while i + 1 < len(lines) and (not lines[i + 1].strip() or lines[i + 1][0].isspace()):
                i += 1
                block.append(lines[i])
            out += ["", tex("\n".join(block), display=True), ""]
        elif _RULE.match(line):
            last = max(j for j in range(i, len(lines)) if _RULE.match(lines[j]))
            out += ["", *_table(lines[i : last + 1]), ""]
            i = last
        elif not line.strip():
            out.append("")
        else:
            block = [line.strip()]
            while i + 1 < len(lines) and lines[i + 1].strip() and not re.match(r"\s*- |\.\. |=+ ", lines[i + 1]):
                i += 1
                block.append(lines[i].strip())
            item = block[0].startswith("- ")
            joined = " ".join(block).removeprefix("- ") if item else " ".join(block)
            out.append(f"- {inline(joined)}" if item else inline(joined))
        # A list needs a line of its own before it.
        i += 1
    return re.sub(r"(?m)^(?!- )(.+)\n(?=- )", r"\1\n\n", "\n".join(out)).strip()


def items(text: str) -> str:
    """``name: text`` entries as a list, each with the lines that are indented below it."""
    entries: list[list[str]] = []
    for line in text.splitlines():
        if found := _ITEM.match(line):
            entries.append([f"{code(found[1])}: ", found[2]])
        elif entries:
            entries[-1].append(line.strip())
        elif line.strip():
            entries.append(["", line.strip()])
    return "\n".join(f"- {name}{inline(' '.join(rest))}" for name, *rest in entries)


def _imports(source: str, target: Callable[..., Any]) -> list[str]:
    """What has to be imported so that ``source`` runs by itself and not in the module of ``target``."""
    tree = ast.parse(source)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    made = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    made |= {(a.asname or a.name).split(".")[0] for n in ast.walk(tree) if hasattr(n, "names") for a in n.names}
    module = inspect.getmodule(target)
    plain: list[str] = []
    own: dict[str, list[str]] = {}
    for name in sorted({n.id for n in names} - made - set(vars(builtins))):
        value = vars(module).get(name)
        if inspect.ismodule(value):
            plain.append(f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}"))
        elif value is not None:
            own.setdefault(getattr(value, "__module__", module.__name__), []).append(name)
    return plain + [f"from {where} import {', '.join(found)}" for where, found in own.items()]


def example(text: str, target: Callable[..., Any]) -> str:
    """A doctest with the imports that make it run by itself."""
    source = "\n".join(line[4:] for line in text.splitlines() if line.startswith((">>> ", "... ")))
    prelude = [f">>> {line}" for line in _imports(source, target)]
    return "\n".join([*prelude, text])
