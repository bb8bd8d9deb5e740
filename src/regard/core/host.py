"""What the core asks of a library whose models it watches; the answers are in ``regard.hosts``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from torch import nn

from regard.core.tokens import Tokens

if TYPE_CHECKING:
    from regard.core.call import Call
    from regard.core.swap import Plan


class Host:
    """One library: how its sites are met, what their tokens mean, how a layer is put in. The defaults know nothing."""

    name = "torch"

    def enter(self) -> None:
        """Called when the first watch that meets this library begins; :meth:`leave` when the last one ends."""

    def leave(self) -> None:
        """Put back whatever :meth:`enter` changed."""

    def branch(self, model: nn.Module) -> str | None:
        """Guidance branch that runs now, where the library says so."""
        return None

    def kind(self, model: nn.Module, name: str, call: Call) -> str | None:
        """Kind of the site, where the library knows better than the shapes."""
        return None

    def tokens(
        self, model: nn.Module, name: str, call: Call, sample: tuple[int, ...]
    ) -> tuple[Tokens | None, Tokens | None]:
        """What the query and key tokens of the call at site ``name`` mean; ``sample`` is the shape of the model's first input."""
        return None, None

    def plan(self, model: nn.Module, name: str) -> Plan | None:
        """How the module ``name`` is replaced; None when its projections cannot be read."""
        return None


HOSTS: dict[str, Host] = {}
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "diffusers", "regard")


def host_of(module: nn.Module) -> Host:
    """The host of ``module``'s library; an unknown library counts as plain torch."""
    library = type(module).__module__.partition(".")[0]
    if library not in HOSTS:
        name = {"regard": "own", "torchvision": "torch"}.get(library, library)
        if library in LIBRARIES:
            importlib.import_module(f"regard.hosts.{name}")
        else:
            importlib.import_module("regard.hosts.torch")
            HOSTS[library] = HOSTS["torch"]
    return HOSTS[library]


def hosts_of(model: nn.Module) -> list[Host]:
    """Every host that some module of ``model`` belongs to, the model's own first."""
    found: dict[int, Host] = {}
    for module in model.modules():
        host = host_of(module)
        found.setdefault(id(host), host)
    return list(found.values())
