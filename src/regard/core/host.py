"""What the core asks of a library whose models it watches; the answers are in ``regard.hosts``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from regard.core.tokens import Tokens

if TYPE_CHECKING:
    from regard.core.call import Call
    from regard.core.kept import Held
    from regard.core.swap import Plan


@dataclass
class Sample:
    """The model's input in the call that runs: shape of its first tensor, and its token ids, after those of earlier steps."""

    shape: tuple[int, ...] = ()
    ids: Tensor | None = None
    prompt: int = 0

    def see(self, args: Iterable[Any], kwargs: Mapping[str, Any], first: bool) -> None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        self.shape = tuple(tensors[0].shape) if tensors else ()
        ids = kwargs.get("input_ids", next((t for t in tensors if t.ndim == 2 and t.dtype == torch.long), None))
        if ids is None or first or self.ids is None or ids.shape[1] > 1 or len(ids) != len(self.ids):
            self.ids, self.prompt = ids, 0 if ids is None else ids.shape[1]
        else:
            self.ids = torch.cat([self.ids, ids], 1)


class Handle(Protocol):
    """Something installed: a context manager whose ``undo`` takes it away to the bit."""

    def undo(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


class Host:
    """One library: how its sites are met, what their tokens mean, how a layer is put in. The defaults know nothing."""

    name = "torch"
    around: tuple[type[nn.Module], ...] = ()
    """Modules that must know that they are watched when a site inside them is, though they are no sites."""

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

    def tokens(self, model: nn.Module, name: str, call: Call, sample: Sample) -> tuple[Tokens | None, Tokens | None]:
        """What the query and key tokens of the call at site ``name`` mean; ``sample`` is the model's input."""
        return None, None

    def cache(self, module: nn.Module, kwargs: dict[str, Any]) -> Held | None:
        """The keys and values to which this call of the attention ``module`` adds its own."""
        return None

    def prune(self, model: nn.Module, after: int, keep: Callable[[Call, Tensor, Tensor], Tensor]) -> Handle:
        """A handle that drops tokens from decoder layer ``after`` on: ``keep(call, image, valid)`` says which stay."""
        raise ValueError(f"{type(model).__name__}: regard cannot drop tokens from the layers of a {self.name} model")

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


def hosts_of(modules: Iterable[nn.Module]) -> list[Host]:
    """Every host that one of the modules belongs to, the first one's first."""
    found: dict[int, Host] = {}
    for module in modules:
        host = host_of(module)
        found.setdefault(id(host), host)
    return list(found.values())
