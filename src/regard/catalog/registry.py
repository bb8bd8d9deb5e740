"""Methods by name: a record beside the code, found by listing files, loaded when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
Kind = Literal["layer", "model", "explainer", "accelerator", "controller", "objective", "study"]
FOLDERS: dict[str, str] = {
    "layer": "layers",
    "model": "models",
    "explainer": "explainers",
    "accelerator": "accelerators",
    "controller": "controllers",
    "objective": "objectives",
    "study": "studies",
}


@dataclass(frozen=True)
class Tags:
    """What a method supports; the conformance checks that run follow from it.

    Layers: ``input`` is how ``forward`` is called: ``"tokens"`` (b, n, c), ``"grid"`` (b, n, c) with a required
    ``grid=(H, W)``, or ``"image"`` (b, c, H, W). ``multiple`` is what H and W must be divisible by.
    Accelerators and controllers: ``off`` holds the arguments with which they change nothing, bit for bit; default
    ``keep=1.0`` and ``strength=0.0``. ``xfail`` maps a check's name to the reason why it cannot hold for this method.
    """

    input: Literal["tokens", "grid", "image"] = "tokens"
    cross: bool = False
    causal: bool = False
    mask: bool = False
    cache: bool = False
    grouped: bool = False
    equivariant: bool = False
    rows: bool = True
    multiple: int = 1
    random: bool = False
    swap: bool = True
    off: dict[str, Any] = field(default_factory=dict, hash=False)
    xfail: MappingProxyType[str, str] | dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Method:
    """One runnable method: its registry name, what it is, the paper it comes from and a small example."""

    name: str
    kind: Kind
    paper: str
    target: Callable[..., Any]
    tags: Tags
    example: dict[str, Any] = field(hash=False)
    naive: Callable[..., Any] | None = None
    inputs: Callable[[int, int], dict[str, Any]] | None = None

    def create(self, **arguments: Any) -> Any:
        return self.target(**arguments)


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    kind: Kind,
    paper: str | None = None,
    tags: Tags | None = None,
    example: dict[str, Any] | None = None,
    naive: Callable[..., Any] | None = None,
    inputs: Callable[[int, int], dict[str, Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated class or function under ``name``.

    Args:
        name: registry name; the file's stem with hyphens, or that name and a suffix (``nat``, ``nat-tiny``).
        kind: one of ``FOLDERS``.
        paper: slug in the catalogue; default ``name``.
        tags: what it supports.
        example: keyword arguments of a small working instance.
        naive: a slow, obvious reference ``naive(instance, *inputs)`` that returns what the instance returns.
        inputs: of a model, ``inputs(batch, seed)`` gives the arguments of a small forward; not needed for a model whose
            forward takes ``image`` (b, image_channels, H, W), or ``x`` (b, n, input_dim) with or without a ``grid``.
    """

    def register(target: Callable[..., Any]) -> Callable[..., Any]:
        known = _METHODS.get(name)
        if known is not None and known.target.__module__ != target.__module__:
            raise ValueError(f"name={name!r} is registered twice: {known.target.__module__} and {target.__module__}")
        _METHODS[name] = Method(name, kind, paper or name, target, tags or Tags(), example or {}, naive, inputs)
        return target

    return register


@cache
def modules() -> dict[str, list[str]]:
    """Files that hold a paper's code: slug -> modules, one for each of its faces; reads file names, imports nothing."""
    found: dict[str, list[str]] = {}
    for folder in FOLDERS.values():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.stem.startswith("_"):
                dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.setdefault(path.stem.replace("_", "-"), []).append(f"regard.{dotted}")
    return found


def _modules_of(name: str) -> list[str]:
    files = modules()
    parts = name.split("-")
    stems = ("-".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((files[stem] for stem in stems if stem in files), [])


def get(name: str) -> Method:
    """The method called ``name``; underscores count as hyphens. Raises ValueError with the nearest names."""
    wanted = name.replace("_", "-")
    if wanted not in _METHODS:
        for module in _modules_of(wanted):
            importlib.import_module(module)
    if wanted not in _METHODS:
        known = sorted({*modules(), *_METHODS})
        near = difflib.get_close_matches(wanted, known, n=4, cutoff=0.4)
        raise ValueError(f"name={name!r} is not a method; nearest: {', '.join(near) or ', '.join(known)}")
    return _METHODS[wanted]


def methods(kind: Kind | None = None) -> list[Method]:
    """Every method, optionally of one kind, by name; imports the files that hold them."""
    for module in (m for faces in modules().values() for m in faces):
        importlib.import_module(module)
    return [m for _, m in sorted(_METHODS.items()) if kind is None or m.kind == kind]


def create(name: str, **arguments: Any) -> Any:
    """Build the layer, model, explainer, ... called ``name``."""
    return get(name).create(**arguments)
