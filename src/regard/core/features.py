"""Outputs of named modules and their gradients: what explainers of convolutional networks need."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn


class Features:
    """While the ``with`` block runs, the last output of each module in ``layers`` and, after ``backward()``, its gradient.

    Raises ValueError for a module that does not exist, with the nearest names.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for name in layers:
            if name not in modules:
                near = difflib.get_close_matches(name, list(modules), n=4, cutoff=0.3)
                raise ValueError(
                    f"layer={name!r} is not a module of {type(model).__name__}; nearest: {', '.join(near)}"
                )
        self.layers = tuple(layers)
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._modules = {name: modules[name] for name in layers}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [m.register_forward_hook(self._keep(n)) for n, m in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer={name!r} returns a {type(output).__name__}, not a tensor")
            self.outputs[name] = output.detach().clone()
            if not output.requires_grad:
                return None
            # A view of its own: a following in-place activation must change neither the value nor its gradient.
            output = output.clone()
            output.register_hook(lambda grad: self.gradients.__setitem__(name, grad.detach()))
            return output.clone()

        return hook
