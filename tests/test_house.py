"""Imports go down the house only, and the catalogue needs no torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import regard

SOURCE = Path(regard.__file__).parent
FLOORS = [
    {"catalog", "ops"},
    {"core"},
    {"hosts", "nn"},
    {"layers"},
    {"models"},
    {"explainers", "accelerators", "controllers", "objectives", "worlds", "train"},
    {"studies", "claims", "bench", "checks"},
    {"view", "cli"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
HOST_LIBRARIES = {"timm", "transformers", "diffusers"}


def _top_level_imports(path: Path) -> set[str]:
    """Modules imported when the file is imported (function bodies are lazy and may look up a floor for a verb)."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        todo.extend(ast.iter_child_nodes(node))
    return found


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p.parent != SOURCE or p.name == "cli.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in _top_level_imports(path):
        parts = name.split(".")
        if parts[0] == "regard" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[room], f"{path} imports {name}, which stands above it"
            if parts[1] == "claims":
                assert room == "claims", f"{path} imports {name}; only reproduce does"
        if parts[0] in HOST_LIBRARIES:
            assert room == "hosts", f"{path} imports {name}; only hosts knows other libraries"


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_is_light() -> None:
    assert "torch" not in _loaded_after("import regard; regard.papers; regard.create")


def test_listing_papers_needs_no_torch() -> None:
    statement = "from typer.testing import CliRunner; from regard.cli import app; CliRunner().invoke(app, ['papers'])"
    assert "torch" not in _loaded_after(statement)


@pytest.mark.skipif(os.environ.get("REGARD_TYPECHECK") == "0", reason="shapes are not checked in this run")
def test_shapes_are_checked_where_they_are_named() -> None:
    from regard.ops import scores
    from regard.worlds.rooms.solids import Solid
    from regard.worlds.shapes.scene import known

    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    assert scores.dot(q, k).shape == (2, 3, 5)
    for bad in ((q.int(), k), (q, torch.zeros(3, 5, 4))):  # Shapes by a name for them, and in the signature itself.
        with pytest.raises(TypeCheckError):
            scores.dot(*bad)
    with pytest.raises(TypeCheckError, match="typechecking parameter 'w'"):
        scores.general(q, k, torch.zeros(4))
    assert not hasattr(known, "__wrapped__")
    assert not hasattr(Solid.local, "__wrapped__")
