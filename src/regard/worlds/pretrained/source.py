"""A package that holds a trained model, and what is loaded from it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


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
            raise ImportError(f"missing {', '.join(missing)}: pip install --no-deps {' '.join(missing)}")
        again = f"pip install --no-deps --force-reinstall {self.name}=={self.version}"
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{spec and spec.origin} is no folder, expected {self.name} {self.version}: {again}")
        place = Path(spec.submodule_search_locations[0])
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
        processor: makes its inputs: a tokenizer, or what the model's own page says; None if it takes images as they are.
        source: the package that it came from.
    """

    model: nn.Module
    processor: Any
    source: Package


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model its trained values; those that it has no place for, further heads, are left aside.

    Raises:
        ValueError: a parameter that ``state`` has no value for.
    """
    lacking = [name for name, _ in model.named_parameters() if name not in state]
    if lacking:
        raise ValueError(f"state holds nothing for {', '.join(lacking)}, expected a value for every parameter")
    own = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
