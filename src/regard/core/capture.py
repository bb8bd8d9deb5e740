"""Reading: what ran at the watched sites, from a forward that stays fused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call, OpaqueSite
from regard.core.known import Known, Seam, matches
from regard.core.tap import Tap, in_backward
from regard.core.watch import Watch


class Capture(Watch):
    """Calls of the watched sites: ``cap["blocks.7.attn"]`` is the call of a site that ran once, ``cap.calls(name)`` all of them.

    ``cap["blocks.*"]`` is a list of the last call of each matching site.
    """

    def __init__(self, model: nn.Module, where: str | Sequence[str] = "*", *, grad: bool = False) -> None:
        self.grad = grad
        self.raw: dict[str, Any] = {}
        self._calls: dict[str, list[Call]] = {}
        self._order: list[Call] = []
        super().__init__(model, where)

    def saw(self, tap: Tap, call: Call, out: Tensor, seam: str) -> Tensor:
        if torch.compiler.is_compiling():
            return self._saw_compiled(tap.name, call, out)
        super().saw(tap, call, out, seam)
        if in_backward():
            return self._recomputed(tap.name, call, out)
        self._learn(tap, call, seam)
        if not call.q.is_inference():
            call.versions = tuple(t._version for t in (call.q, call.k, call.v))
        self._calls.setdefault(tap.name, []).append(call)
        self._order.append(call)
        if self.grad and out.requires_grad and not call.graded:
            out = call.out = _hooked(call, out, call)
        return out

    def _saw_compiled(self, name: str, call: Call, out: Tensor) -> Tensor:
        if self.grad:
            raise ValueError(
                "grad=True keeps gradients through hooks, which compiled code does not run: capture the eager model"
            )
        self.raw[name] = (call, call.mixed, out)
        return out

    def _recomputed(self, name: str, again: Call, out: Tensor) -> Tensor:
        """The forward ran without a graph and runs again in the backward pass: only this run gets the gradient."""
        if not (self.grad and out.requires_grad) or again.mixed is None:
            return out
        for call in self._calls.get(name, []):
            # A module that ran several times is told apart by what it gave.
            if not (call.graded or call.mixed is None) and torch.equal(call.mixed, again.mixed):
                return _hooked(again, out, call)
        return out

    def _learn(self, tap: Tap, call: Call, seam: str) -> None:
        sites = self.knowledge.sites
        if self.exact and tap.name not in sites:
            sites[tap.name] = Known(_seam(seam), qk=frozenset([] if call.product is None else [call.product]))

    def _settle(self) -> None:
        """Calls recorded inside compiled code become ordinary ones."""
        for name, (call, mixed, out) in self.raw.items():
            call.mixed, call.out, call.site = mixed, out, name
            self._calls[name] = [call]

    def calls(self, name: str) -> list[Call]:
        """Every call of one site, in the order in which they ran."""
        self._settle()
        if name not in self._calls:
            raise self._missing(name)
        return self._calls[name]

    def sequence(self) -> list[Call]:
        """Every call of every site, in the order in which they ran; ``call.site`` says where."""
        self._settle()
        return self._order or [calls[-1] for calls in self._calls.values()]

    def __getitem__(self, name: str) -> Any:
        self._settle()
        if name in self._calls:
            calls = self._calls[name]
            if len(calls) > 1:
                raise KeyError(f"{name!r} ran {len(calls)} times; take one of cap.calls({name!r})")
            return calls[0]
        known = self.knowledge.sites
        found = [
            calls[-1]
            for site, calls in self._calls.items()
            if matches(site, known[site].kind if site in known else "", name)
        ]
        if not found:
            raise self._missing(name)
        return found

    def _missing(self, name: str) -> Exception:
        reason = self.knowledge.refused.get(name)
        if reason is not None:
            return OpaqueSite(f"{name} is opaque: {reason}")
        return KeyError(f"{name!r} names no site that was called; called: {', '.join(self._calls) or 'nothing'}")

    def __iter__(self) -> Iterator[str]:
        self._settle()
        return iter(self._calls)

    def __len__(self) -> int:
        self._settle()
        return len(self._calls)

    def items(self) -> Iterator[tuple[str, Call]]:
        """(site, its last call) in the order in which the sites first ran."""
        self._settle()
        return ((name, calls[-1]) for name, calls in self._calls.items())


def _seam(seam: str) -> Seam:
    return "interface" if seam == "interface" else "own" if seam == "own" else "function"


def _hooked(call: Call, out: Tensor, keeper: Call) -> Tensor:
    """Weights times values of ``call`` tell ``keeper`` their gradient; edits of heads and out come after them."""

    def keep(grad: Tensor) -> None:
        keeper.out_grad = grad.detach() if keeper.out_grad is None else keeper.out_grad + grad.detach()

    keeper.graded = True
    edited = call.mixed is not out
    # A view of its own: what the host does with the tensor afterwards is not part of the gradient.
    mixed = out.view_as(out) if call.mixed is None or not edited else call.mixed
    if mixed.requires_grad:
        mixed.register_hook(keep)
    return out if edited else mixed


def capture(model: nn.Module, where: str | Sequence[str] = "*", *, grad: bool = False) -> Capture:
    """Record every call of the sites that ``where`` names while the ``with`` block runs.

    Args:
        where: names of sites with ``*``, or a kind: ``"self"``, ``"cross"``, ``"joint"``.
        grad: also keep the gradient of each site's output, so that ``weights_grad`` can be asked after ``backward()``.

    Raises:
        ValueError: ``where`` names nothing; the nearest names are listed.
    """
    return Capture(model, where, grad=grad)
