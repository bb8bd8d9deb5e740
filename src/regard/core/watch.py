"""A watch: what stands on a model between two moments, and is gone afterwards to the bit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.core import seams as _seams  # noqa: F401  fills SEAMS
from regard.core.call import Call
from regard.core.edit import Edit, EditConflict
from regard.core.host import Host, Sample, host_of, hosts_of
from regard.core.kinds import kind_of
from regard.core.known import Known, Seam, knowledge, matches, names
from regard.core.step import Step, chosen
from regard.core.tap import ATTRIBUTE, Tap, in_backward

_PLAIN = (
    nn.Softmax,
    nn.Dropout,
    nn.Identity,
    nn.Linear,
    nn.LayerNorm,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
    nn.Embedding,
)
_GUESTS: dict[int, int] = {}


class Watch:
    """Taps on the sites of ``model`` that ``where`` names, until :meth:`undo`; also a context manager.

    Handles may be undone in any order; each takes away exactly what it brought.
    """

    def __init__(
        self,
        model: nn.Module,
        where: str | Sequence[str] = "*",
        *,
        edits: Sequence[Edit] = (),
        steps: slice | range | int | None = None,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.where, self.steps = where, steps
        self.all_edits = tuple(edits)
        self.edits = bool(edits)
        chosen(steps, 0)
        # Kept here: compiled code that looked it up would guard on every model of the process, and break when one goes.
        self.knowledge = knowledge(self.model)
        self.exact = bool(self.knowledge.sites)
        self.index = -1
        self.sample = Sample()
        self.active = True
        wanted = names(self.model, where)
        self._check_conflicts(wanted)
        modules = _family(self.model, wanted) if self.exact else dict(self.model.named_modules(remove_duplicate=False))
        self.hosts: list[Host] = hosts_of(modules.values())
        self.taps: list[Tap] = []
        for host in self.hosts:
            _GUESTS[id(host)] = _GUESTS.get(id(host), 0) + 1
            if _GUESTS[id(host)] == 1:
                host.enter()
        done: set[int] = set()
        around = [
            n
            for n, m in modules.items()
            if any(isinstance(m, h.around) for h in self.hosts)
            and any(w.startswith(f"{n}.".lstrip(".")) for w in wanted)
        ]
        for name in [*around, *wanted]:
            module = modules[name]
            if id(module) in done or isinstance(module, _PLAIN):
                continue
            done.add(id(module))
            self._tap(module, name)
        self._counter = self.model.register_forward_pre_hook(self._next, with_kwargs=True)
        _GUARDS.begin()

    # -- what a tap asks --------------------------------------------------------------------------------------------

    def edits_now(self, name: str, call: Call) -> Sequence[Edit]:
        """Edits for the call of site ``name`` that runs now."""
        if not self.all_edits:
            return ()
        if self.steps is not None:
            if torch.compiler.is_compiling():
                raise ValueError(
                    "steps= counts calls of the model, which a compiled graph does not: edit without steps="
                )
            if not chosen(self.steps, max(self.index, 0)):
                return ()
        branch = self.branch()
        return [e for e in self.all_edits if e.applies(branch)]

    def branch(self) -> str | None:
        for host in self.hosts:
            branch = host.branch(self.model)
            if branch is not None:
                return branch
        return None

    def step(self) -> Step:
        return Step(max(self.index, 0), self.branch())

    def known(self, name: str) -> Known | None:
        return self.knowledge.sites.get(name)

    def kind(self, tap: Tap, call: Call) -> str:
        known = self.known(tap.name)
        if known is not None:
            return known.kind
        return host_of(tap.module).kind(self.model, tap.name, call) or kind_of(tap.streams, call)

    def wants(self, call: Call) -> bool:
        """Whether ``where`` means this call: before the first probe kinds are known only when a site runs."""
        return self.exact or matches(call.site, call.kind, self.where)

    def name_tokens(self, name: str, call: Call) -> None:
        """Give the call the names that the user, or else the host, has for its tokens."""
        if torch.compiler.is_compiling() and not any(e.quantity in ("scale_keys", "bias") for e in self.all_edits):
            return
        q, k = self.knowledge.tokens(name, call.kind, call.q.shape[2], call.k.shape[2])
        if q is None or k is None:
            for host in self.hosts:
                theirs = host.tokens(self.model, name, call, self.sample)
                q, k = q or theirs[0], k or theirs[1]
        call.tokens_q = call.tokens_q or q
        call.tokens_k = call.tokens_k or k

    def saw(self, tap: Tap, call: Call, out: Tensor, seam: str) -> Tensor:
        """A call has run; a capture keeps it. Returns the output that the host goes on with."""
        return out

    def refused(self, tap: Tap, reason: str) -> None:
        """A softmax was seen that is not attention as we know it."""

    # -- installing and undoing -------------------------------------------------------------------------------------

    def _tap(self, module: nn.Module, name: str) -> None:
        for tap in module.__dict__.get(ATTRIBUTE, ()):
            if tap.thread == threading.get_ident():
                break
        else:
            tap = Tap(module, name, self.exact)
            known = self.known(name)
            seam: Seam | None = known.seam if known else None
            tap.install(hooked=not (self.exact and seam in ("interface", "own")))
        if any(e.quantity == "cache" for e in self.all_edits):
            tap.install(hooked=True)
        tap.watches.append(self)
        self.taps.append(tap)

    def _next(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            _GUARDS.counting(self, args, kwargs)

    def _count(self, args: Any, kwargs: Any) -> None:
        if in_backward():
            return
        if self.branch() in (None, "cond"):
            self.index += 1
        self.sample.see(args, kwargs, first=self.index == 0)

    def undo(self) -> None:
        """Take everything away again; a second call does nothing."""
        if not self.active:
            return
        self.active = False
        _GUARDS.end()
        self._counter.remove()
        for tap in self.taps:
            tap.watches.remove(self)
            if not tap.watches:
                tap.remove()
        for host in self.hosts:
            _GUESTS[id(host)] -= 1
            if _GUESTS[id(host)] == 0:
                host.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _check_conflicts(self, wanted: list[str]) -> None:
        if not self.all_edits:
            return
        others = [
            (watch, e)
            for module in self.model.modules()
            for tap in module.__dict__.get(ATTRIBUTE, ())
            for watch in tap.watches
            for e in watch.all_edits
            if tap.name in wanted or not watch.exact
        ]
        for i, mine in enumerate(self.all_edits):
            rivals = [*self.all_edits[i + 1 :], *(e for w, e in others if _overlap(self.steps, w.steps))]
            for other in rivals:
                if mine.branch and other.branch and mine.branch != other.branch:
                    continue
                if mine.conflicts(other):
                    raise EditConflict(
                        f"two edits touch {', '.join(sorted(mine.touches & other.touches))} at the same sites and steps "
                        f"({mine.quantity} and {other.quantity}): say which comes first with order="
                    )


def _family(model: nn.Module, wanted: list[str]) -> dict[str, nn.Module]:
    """The modules of these names and those that hold them, outermost first: a walk of the whole model takes longer."""
    found = {"": model}
    for name in wanted:
        parent, path = model, ""
        for part in name.split(".") if name else ():
            path = f"{path}.{part}" if path else part
            if path not in found:
                found[path] = parent.get_submodule(part)
            parent = found[path]
    return found


def _overlap(a: slice | range | int | None, b: slice | range | int | None) -> bool:
    if a is None or b is None:
        return True
    last = max((s.stop or 0) if isinstance(s, slice | range) else s + 1 for s in (a, b))
    starts = max((s.start or 0) if isinstance(s, slice | range) else s for s in (a, b))
    return any(chosen(a, i) and chosen(b, i) for i in range(max(last, starts) + 2))


class _Guards(threading.local):
    """Makes compiled models notice that they are watched.

    Compiled code does not look at hooks, but it does look at the stack of function modes: a mode of a class of its own on
    that stack means a graph of its own. One is pushed only where something has been compiled already; a graph compiled
    during a watch without one is thrown away at the end.
    """

    def __init__(self) -> None:
        self.watches = 0
        self.counting: Callable[..., None] = Watch._count
        self.mode: TorchFunctionMode | None = None
        self.frames = 0
        self.reset_at = 0

    def begin(self) -> None:
        self.watches += 1
        self._renew()

    def end(self) -> None:
        self.watches -= 1
        compiled = _compiled_frames() != self.frames
        bare = self.mode is None
        self._renew()
        # Graphs of ended watches never run again, but they count towards the recompile limit.
        if compiled and (bare or _compiled_frames() - self.reset_at >= 6):
            torch.compiler.reset()
            self.reset_at = _compiled_frames()

    def _renew(self) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None
        self.frames = _compiled_frames()
        if self.watches and self.frames:
            # Counted in Python: where the hook is part of a compiled graph it does nothing, and it is never one of its own.
            sys.modules["torch._dynamo.eval_frame"].skip_code(Watch._next.__code__)
            self.counting = torch.compiler.disable(Watch._count)
            self.mode = type("Watched", (TorchFunctionMode,), {"__torch_function__": _pass})()
            self.mode.__enter__()


_GUARDS = _Guards()


def _pass(self: Any, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return func(*args, **(kwargs or {}))


def _compiled_frames() -> int:
    """How often anything was compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
