"""Applying a method to a running model: its edits, site by site and step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from regard.catalog import registry
from regard.core.call import Call
from regard.core.edit import Edit
from regard.core.step import Step
from regard.core.tap import Tap
from regard.core.watch import Watch


@dataclass(frozen=True)
class SiteView:
    """The site that runs now, as a method sees it: ``kind`` is ``self``, ``cross``, ``joint``, ``pool`` or ``channel``."""

    name: str
    kind: str
    call: Call


class Edits(Protocol):
    """A controller or accelerator that changes attention; a method ``seen(site, step)`` is told of each call after it ran."""

    def edits(self, site: SiteView, step: Step) -> Iterable[Edit]: ...


class Applied(Watch):
    """A method at work on a model until it is undone."""

    def __init__(self, model: nn.Module, method: Edits, where: str | Sequence[str] = "*") -> None:
        self.method = method
        super().__init__(model, where)
        self.edits = True

    def view(self, name: str, call: Call) -> SiteView:
        return SiteView(name, call.kind, call)

    def edits_now(self, name: str, call: Call) -> Sequence[Edit]:
        step = self.step()
        return [e for e in self.method.edits(self.view(name, call), step) if e.applies(step.branch)]

    def saw(self, tap: Tap, call: Call, out: Tensor, seam: str) -> Tensor:
        seen = getattr(self.method, "seen", None)
        if seen is not None:
            seen(self.view(tap.name, call), call.step)
        return super().saw(tap, call, out, seam)


def apply(model: nn.Module, method: Any, *, where: str | Sequence[str] = "*", **arguments: Any) -> Any:
    """Put an accelerator or a controller to work on ``model``; a handle and a context manager.

    Args:
        method: registry name, or an object with ``edits(site, step)`` or ``attach(model)``.
        where: sites it may touch.
        arguments: passed to the method's constructor when it is given by name.

    Raises:
        ValueError: no such method (with the nearest names), or one that is not applied to models.
    """
    if isinstance(method, str):
        record = registry.get(method)
        if record.kind not in ("accelerator", "controller"):
            raise ValueError(f"method={method!r} is a {record.kind}; apply() takes accelerators and controllers")
        method = record.create(**arguments)
    elif arguments:
        raise ValueError(f"arguments {sorted(arguments)} go with a method given by name")
    model = getattr(model, "_orig_mod", model)
    if hasattr(method, "attach"):
        return method.attach(model)
    if not hasattr(method, "edits"):
        raise ValueError(f"{type(method).__name__} has neither edits(site, step) nor attach(model)")
    return Applied(model, method, where)
