"""Published models whose weights lie inside packages: found, checked and loaded by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regard.worlds.pretrained.source import Package, Pretrained

NAMES = ("antiberty", "efficientnet-lite0", "lightglue", "minilm", "rxnmapper", "smollm2", "whisper-tiny-en")
"""The models there is a loader for, one file each."""


def package(name: str) -> Package:
    """The package that holds the model called ``name``, installed or not.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} must be one of {', '.join(map(repr, NAMES))}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").PACKAGE


def available() -> list[str]:
    """Names of the models whose packages are installed."""
    return [name for name in NAMES if not package(name).missing()]


def pretrained(name: str) -> Pretrained:
    """The published model called ``name``, in ``eval`` mode, with what prepares its inputs.

    The package is not imported: its files are read where they lie, after their digests were compared with the stored ones.

    Args:
        name: one of :data:`NAMES`.

    Raises:
        ValueError: an unknown name, or a file of the package that is not the one expected.
        ImportError: the package is not installed (with the line that installs it).
    """
    package(name)
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").load()
