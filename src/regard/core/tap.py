"""The tap: a function mode that stands around one module's own forward while somebody watches it.

A forward hook enters and leaves it, so that it sees what this module computes and nothing else; a global mode would miss
the recomputation of activation checkpointing. What a function means is decided by ``SEAMS``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.core.call import Call
from regard.core.edit import EAGER, QUANTITIES, Edit
from regard.core.fold import Fold
from regard.core.host import host_of
from regard.core.kept import Held, kept
from regard.core.kinds import streams_of
from regard.core.lower import run_eager

if TYPE_CHECKING:
    from regard.core.watch import Watch

Handler = Callable[["Tap", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
SEAMS: dict[Callable[..., Any], Handler] = {}
ATTRIBUTE = "_regard_taps"
HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads", "n_head", "nhead")


def in_backward() -> bool:
    """Whether this runs inside a backward pass: a recomputation under activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


class _Stack(threading.local):
    """Taps that stand around each other in this thread, innermost last."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []


_STACK = _Stack()


class Tap(TorchFunctionMode):
    """Everything that watches one module in one thread, in the order in which it came."""

    def __init__(self, module: nn.Module, name: str, exact: bool) -> None:
        super().__init__()
        self.module, self.name, self.exact = module, name, exact
        self.thread = threading.get_ident()
        self.watches: list[Watch] = []
        self.quiet = False
        self.forget()
        self._hooks: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Start of a forward: nothing is half seen."""
        self.count = 0
        self.products: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self.pending: tuple[Tensor, Call, Fold] | None = None
        self.softmaxes: list[str] = []
        self.mixes = False
        self.streams: list[tuple[int, ...]] = []
        self.batch = 0
        self.held: Held | None = None
        self.kept: Tensor | None = None

    # -- installing -------------------------------------------------------------------------------------------------

    def install(self, hooked: bool) -> None:
        """Put the tap on its module; without hooks when the host calls it by itself."""
        here = self.module.__dict__.setdefault(ATTRIBUTE, [])
        if self not in here:
            here.append(self)
        if hooked and not self._hooks:
            self._hooks = (
                self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.module.register_forward_hook(self._leave, always_call=True),
            )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        taps = self.module.__dict__.get(ATTRIBUTE, [])
        if self in taps:
            taps.remove(self)
        if not taps:
            self.module.__dict__.pop(ATTRIBUTE, None)

    def here(self) -> bool:
        """Whether the running thread is the one that watches, or a backward pass that recomputes for it."""
        if torch.compiler.is_compiling() or threading.get_ident() == self.thread:
            return True
        return in_backward() and len(self.module.__dict__.get(ATTRIBUTE, [])) == 1

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.here():
            return
        self.forget()
        self.batch = next((a.shape[0] for a in args if isinstance(a, Tensor) and a.ndim >= 3), 0)
        self.held = host_of(module).cache(module, kwargs)
        self.streams = [] if all(w.exact for w in self.watches) else streams_of(args, kwargs)
        if not torch.compiler.is_compiling():
            _STACK.taps.append(self)
        self.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.here():
            return
        if not torch.compiler.is_compiling():
            if not _STACK.taps or _STACK.taps[-1] is not self:
                return  # Another hook failed before this tap was entered.
            _STACK.taps.pop()
        self.__exit__(None, None, None)
        if self.kept is not None and self.held is not None:
            self.held.keep(self.kept)
        if not self.exact and self.softmaxes and self.mixes:
            for watch in self.watches:
                watch.refused(self, self.softmaxes[-1])
        self.forget()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = SEAMS.get(func)
        if handler is None or self.quiet or not (torch.compiler.is_compiling() or _STACK.taps[-1] is self):
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)

    def fold(self, q: Tensor) -> Fold:
        """Where the heads of this module's queries ``q`` are."""
        return Fold(
            q, next((n for name in HEADS if isinstance(n := getattr(self.module, name, None), int)), None), self.batch
        )

    def number(self) -> int:
        """Number of the matrix product that runs now among those of this module and the modules in it."""
        number = self.count
        for tap in (self,) if torch.compiler.is_compiling() else _STACK.taps:
            tap.count += 1
        return number

    # -- one call ---------------------------------------------------------------------------------------------------

    def edits(self, call: Call) -> list[Edit]:
        """Edits that apply to the call now running, in the order of application."""
        found = [e for w in self.watches if w.wants(call) for e in w.edits_now(self.name, call)]
        if len(found) > 1:
            found.sort(key=lambda e: (QUANTITIES.index(e.quantity), e.order or 0))
        return found

    def editing(self) -> bool:
        return any(w.edits for w in self.watches)

    def begin(self, call: Call) -> list[Edit]:
        call.site = self.name
        if self.watches:
            call.step = self.watches[0].step()
            call.kind = self.watches[0].kind(self, call)
            for watch in self.watches:
                watch.name_tokens(self.name, call)
        return self.edits(call)

    def run(self, call: Call, native: Callable[[Call], Tensor], seam: str) -> Tensor:
        """The call with every edit, recorded by everybody who watches; untouched when nobody edits."""
        edits = self.begin(call)
        for e in edits:
            if e.quantity not in EAGER:
                e.before(call)
        if any(e.quantity in EAGER for e in edits):
            if call.unsure:  # The matrix takes the place of the host's own computation only where that is the same.
                call.mixed = native(call)
                call.verify()
            out = run_eager(call, edits)
        else:
            out = native(call)
        return self.finish(call, out, edits, seam)

    def finish(self, call: Call, out: Tensor, edits: list[Edit], seam: str) -> Tensor:
        call.mixed = out
        if call.unscaled is not None:
            call.v = call.unscaled
        for e in edits:
            if e.quantity in ("heads", "out"):
                out = e.after(out, call)
        call.out = out
        for watch in self.watches:
            if watch.wants(call):
                out = watch.saw(self, call, out, seam)
        for e in edits:
            if e.quantity == "cache":
                self.kept = kept(e, call, self.held)
        return out


def taps_of(module: nn.Module) -> Tap | None:
    """The tap on ``module`` that belongs to the running thread."""
    for tap in module.__dict__.get(ATTRIBUTE, ()):
        if tap.here():
            return tap
    return None
