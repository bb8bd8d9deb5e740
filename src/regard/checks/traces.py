"""What a call, a reader or a method leaves on a model: tensors, hooks, attributes, patched classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def holdings(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the modules hold, registered or not, by path."""
    found: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)
        elif isinstance(value, list | tuple):
            for key, inner in enumerate(value):
                walk(f"{path}[{key}]", inner)

    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key != "_modules":
                walk(f"{name}.{key}".lstrip("."), value)
    return found


def hooks(module: nn.Module) -> int:
    """Hooks on this one module."""
    return sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))


def keeps_nothing(module: nn.Module, call: Callable[[int], Any]) -> None:
    """Raise AssertionError when ``call(seed)`` changes what the module holds, keeps data, a graph or a hook."""

    def copied() -> dict[str, Tensor]:
        return {path: tensor.detach().clone() for path, tensor in holdings(module).items()}

    hooked, before = _all_hooks(module), copied()
    call(1)
    first = copied()
    call(9)
    second = copied()
    assert before.keys() <= first.keys(), f"a call dropped {sorted(before.keys() - first.keys())}"
    assert first.keys() == second.keys(), f"a second call added or dropped {sorted(first.keys() ^ second.keys())}"
    for old, new, when in ((before, first, "first"), (first, second, "second")):
        for path, tensor in old.items():
            assert torch.equal(new[path], tensor), f"{path} changed in the {when} call"
    attached = [path for path, tensor in holdings(module).items() if tensor.grad_fn is not None]
    assert not attached, f"{attached} hold on to the graph of a call"
    left = _all_hooks(module) - hooked
    assert not left, f"{left} hooks were left behind"


def _all_hooks(module: nn.Module) -> int:
    return sum(hooks(m) for m in module.modules())


def traces(model: nn.Module) -> dict[str, Any]:
    """What a visitor could leave behind: hooks, own attributes, gradients, the mode, parameters, a patched class."""
    found: dict[str, Any] = {}
    for name, m in model.named_modules():
        found[f"{name}: hooks"] = hooks(m)
        found[f"{name}: attributes"] = sorted(vars(m))
        found[f"{name}: training"] = m.training
        found[f"{type(m).__name__}: forward"] = type(m).forward
    for name, p in model.named_parameters():
        found[f"{name}: gradient"] = p.grad is not None
        found[f"{name}: requires_grad"] = p.requires_grad
        found[f"{name}: sum"] = p.detach().double().sum().item()
    return found


def unchanged(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"after {when}, changed: {changed}"


class Fails(nn.Module):
    """A part of a model that fails when it is reached."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise KeyError("half way")


def survives_failure(model: nn.Module, part: str, visit: Callable[[], Any]) -> None:
    """Raise AssertionError when ``visit()`` swallows the failure of module ``part``, or leaves traces after it."""
    parent, _, child = part.rpartition(".")
    setattr(model.get_submodule(parent), child, Fails())
    before = traces(model)
    try:
        visit()
    except KeyError:
        pass
    else:
        raise AssertionError("the model raised, and the error was swallowed")
    unchanged(before, traces(model), "a model that failed")
