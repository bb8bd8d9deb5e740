"""Every attention site of a model, found by one probe call, verified or refused."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.host import host_of
from regard.core.known import Known, knowledge, matches
from regard.core.slices import tolerance
from regard.core.tap import Tap
from regard.core.tokens import Tokens
from regard.core.watch import Watch


@dataclass(frozen=True)
class Site:
    """A place in a model where attention happens.

    ``verified`` says that weights times values recompute the site's own output (``error`` is the relative difference);
    where it is False, ``reason`` says why, and the site gives no weights.
    """

    name: str
    host: str
    kind: str
    form: str
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    queries: int
    keys: int
    tokens_q: Tokens | None
    tokens_k: Tokens | None
    calls: int
    verified: bool
    error: float
    reason: str | None = None


class Sites(list[Site]):
    """The sites of one model in the order in which they run; index by number, name, or name with ``*``."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            found = super().__getitem__(key)
            return Sites(found) if isinstance(key, slice) else found
        for site in self:
            if site.name == key:
                return site
        found = Sites(s for s in self if matches(s.name, s.kind, key))
        if not found:
            near = difflib.get_close_matches(key, [s.name for s in self], n=4, cutoff=0.3)
            raise KeyError(f"no site is called {key!r}; nearest: {', '.join(near) or ', '.join(s.name for s in self)}")
        return found

    def kind(self, kind: str) -> Sites:
        return Sites(s for s in self if s.kind == kind)

    @property
    def verified(self) -> Sites:
        return Sites(s for s in self if s.verified)

    @property
    def refused(self) -> Sites:
        return Sites(s for s in self if not s.verified)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Column, Table

        table = Table(Column("site", overflow="fold"), "kind", "form", "heads", "dim", "queries", "keys", "verified")
        for s in self:
            heads = str(s.heads) if s.kv_heads == s.heads else f"{s.heads}/{s.kv_heads}"
            state = f"{s.error:.0e}" if s.verified else f"refused: {s.reason}"
            row = [heads, str(s.head_dim), str(s.tokens_q or s.queries), str(s.tokens_k or s.keys)]
            table.add_row(s.name, s.kind, s.form, *row, state)
        yield table

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=140, force_terminal=False)
        with console.capture() as text:
            console.print(self)
        return text.get()


class _Probe(Watch):
    """Watches every module once, and keeps the first call of each site and the softmaxes that were refused."""

    def __init__(self, model: nn.Module) -> None:
        self.first: dict[str, tuple[Call, str, int]] = {}
        self.turned_down: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.products: dict[str, set[int]] = {}
        super().__init__(model)

    def saw(self, tap: Tap, call: Call, out: Tensor, seam: str) -> Tensor:
        super().saw(tap, call, out, seam)
        if call.product is not None:
            self.products.setdefault(tap.name, set()).add(call.product)
        if tap.name in self.first:
            first, seam, count = self.first[tap.name]
            self.first[tap.name] = (first, seam, count + 1)
        else:
            self.first[tap.name] = (call, seam, 1)
            # Checked at once: a host may overwrite its cache, or change weights in place, in the next call.
            self.errors[tap.name] = call.error() if call.dropout == 0.0 else 0.0
        return out

    def refused(self, tap: Tap, reason: str) -> None:
        self.turned_down.setdefault(tap.name, reason)


def sites(model: nn.Module, *inputs: Any, run: Callable[[], Any] | None = None, **arguments: Any) -> Sites:
    """Run ``model`` once and list every attention site in it, verified or refused with the reason.

    Args:
        inputs, arguments: what the model is called with.
        run: call this instead, for a model that runs inside a pipeline or ``generate``.

    Raises:
        ValueError: nothing to run the model with.
    """
    model = getattr(model, "_orig_mod", model)
    if run is None and not inputs and not arguments:
        raise ValueError("sites() runs the model once: give its inputs, or run=lambda: pipeline(...)")
    facts = knowledge(model)
    before, facts.sites = facts.sites, {}
    try:
        with _Probe(model) as probe, torch.no_grad():
            run() if run is not None else model(*inputs, **arguments)
    except BaseException:
        facts.sites = before
        raise
    found: dict[str, Site] = {}
    for name in [n for n, _ in model.named_modules() if n in probe.first or n in probe.turned_down]:
        module = model.get_submodule(name)
        host = host_of(module)
        if name not in probe.first:
            reason = probe.turned_down[name]
            found[name] = Site(
                name, host.name, "self", "opaque", 0, 0, 0, False, 0, 0, None, None, 0, False, float("nan"), reason
            )
            continue
        call, seam, count = probe.first[name]
        error = probe.errors[name]
        fits = error <= tolerance(call.q.dtype)
        misfit = None if fits else f"weights times values differ from its output by {error:.1e}"
        products = frozenset(probe.products.get(name, ()))
        facts.sites[name] = Known(seam, call.kind, misfit, products)  # type: ignore[arg-type]
        said_q, said_k = facts.tokens(name, call.kind, call.q.shape[2], call.k.shape[2])
        found[name] = Site(
            name=name,
            host=host.name,
            kind=call.kind,
            form=getattr(module, "form", "softmax"),
            heads=call.q.shape[1],
            kv_heads=call.k.shape[1],
            head_dim=call.q.shape[-1],
            causal=is_causal(call),
            queries=call.q.shape[2],
            keys=call.k.shape[2],
            tokens_q=said_q or call.tokens_q,
            tokens_k=said_k or call.tokens_k,
            calls=count,
            verified=fits,
            error=error,
            reason=misfit,
        )
    facts.refused = {n: s.reason or "" for n, s in found.items() if not s.verified}
    order = list(probe.first)
    listed = [found[n] for n in order] + [s for n, s in found.items() if n not in probe.first]
    return Sites(listed)


def is_causal(call: Call) -> bool:
    """Whether no query looks at a later key, by mask, bias or flag."""
    allowed = call.allowed()
    l, s = call.q.shape[2], call.k.shape[2]
    if l == 1:
        return False
    future = torch.ones(l, s, dtype=torch.bool, device=call.q.device).triu(s - l + 1)
    if allowed is not None:
        return not bool((allowed & future).any())
    added = call.added()
    if added is None or added.shape[-2] == 1:
        return False
    return bool((added.expand(*added.shape[:-2], l, s)[..., future] < -1e4).all())
