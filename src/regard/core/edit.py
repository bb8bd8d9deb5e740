"""Changes to attention while the host runs: declare the quantity, the cheapest exact form is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.lower import fitting, index_grid, keys_of, pairs_of, same, scale_keys
from regard.core.tokens import Rows, pick
from regard.ops import attend as ops

if TYPE_CHECKING:
    from regard.core.watch import Watch

# In the order in which they are applied within one call.
QUANTITIES = ("kv", "share", "q", "k", "v", "scale_keys", "mask", "bias", "scores", "weights", "heads", "out", "cache")
TOUCHES = {"kv": {"k", "v"}, "share": {"k", "v"}, "scale_keys": {"v"}, "heads": {"out"}}
COMMUTES = {"scale_keys", "mask", "bias", "heads"}
EAGER = {"scores", "weights"}
BEFORE_QK = {"q", "k", "kv", "share"}


class EditConflict(ValueError):
    """Two edits of one quantity at one site and step, without an order."""


@dataclass(frozen=True)
class Edit:
    """A change to one quantity of attention.

    Build one with :meth:`q`, :meth:`k`, :meth:`v`, :meth:`kv`, :meth:`share`, :meth:`scale_keys`, :meth:`mask`, :meth:`bias`,
    :meth:`scores`, :meth:`weights`, :meth:`heads`, :meth:`out` or :meth:`cache`. Every one of them takes these options:

    Args:
        strength: 0 is the identity, bit for bit; 1 the whole change; between and beyond, the straight line through both.
        only: heads that are changed; default all.
        branch: ``"cond"`` or ``"uncond"``: rows of that guidance branch only (where both run in one call, the second or the
            first half of the batch).
        order: among edits of one quantity at one site, the lower comes first.
    """

    quantity: str
    change: Callable[..., Any]
    strength: float = 1.0
    only: Sequence[int] | None = None
    branch: str | None = None
    order: int | None = None

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise ValueError(f"quantity={self.quantity!r} is not one of {', '.join(QUANTITIES)}")
        if self.branch not in (None, "cond", "uncond"):
            raise ValueError(f"branch={self.branch!r} is not 'cond' or 'uncond'")
        if self.quantity in ("mask", "kv", "share", "cache") and self.strength not in (0, 1):
            raise ValueError(f"strength={self.strength}: an edit of {self.quantity} is on (1) or off (0)")
        if self.quantity in ("kv", "cache") and self.only is not None:
            raise ValueError(f"only= does not apply to keys and values taken together ({self.quantity}); edit k and v")

    # -- constructors -----------------------------------------------------------------------------------------------

    @staticmethod
    def q(change: Callable[[Tensor, Call], Tensor], **options: Any) -> Edit:
        """``change(q, call)`` gives the new queries (b, h, l, d)."""
        return Edit("q", change, **options)

    @staticmethod
    def k(change: Callable[[Tensor, Call], Tensor], **options: Any) -> Edit:
        """``change(k, call)`` gives the new keys (b, g, s, d)."""
        return Edit("k", change, **options)

    @staticmethod
    def v(change: Callable[[Tensor, Call], Tensor], **options: Any) -> Edit:
        """``change(v, call)`` gives the new values (b, g, s, e)."""
        return Edit("v", change, **options)

    @staticmethod
    def kv(change: Callable[[Tensor, Tensor, Call], tuple[Tensor, Tensor]], **options: Any) -> Edit:
        """``change(k, v, call)`` gives new keys and values; they may be more or fewer where the call has no mask."""
        return Edit("kv", change, **options)

    @staticmethod
    def share(rows: Mapping[int, int], **options: Any) -> Edit:
        """Batch row ``i`` attends to the keys and values of row ``rows[i]``."""

        def change(x: Tensor, call: Call) -> Tensor:
            source = list(range(len(x)))
            for row, other in rows.items():
                if not (0 <= row < len(x) and 0 <= other < len(x)):
                    raise ValueError(f"share({dict(rows)}): the batch at {call.site} has {len(x)} rows")
                source[row] = other
            return x[source]

        return Edit("share", change, **options)

    @staticmethod
    def scale_keys(where: Rows, factor: float | Tensor, *, renormalize: bool = False, **options: Any) -> Edit:
        """Multiply the weight that chosen keys receive by ``factor``; with ``renormalize`` each row sums to 1 again."""
        if renormalize and not bool((torch.as_tensor(factor) > 0).all()):
            raise ValueError(f"factor={factor} must be positive when the rows are renormalised")
        quantity = "bias" if renormalize else "scale_keys"

        def change(call: Call) -> Tensor:
            factors = torch.ones(call.k.shape[2], dtype=call.q.dtype, device=call.q.device)
            index = keys_of(call, where)
            value = torch.as_tensor(factor, dtype=factors.dtype, device=factors.device)
            factors = factors.index_put((index,), value.expand(len(index)))
            return factors.log() if renormalize else factors

        return Edit(quantity, change, **options)

    @staticmethod
    def mask(allow: Callable[..., Tensor] | Tensor, **options: Any) -> Edit:
        """Forbid pairs: ``allow(b, h, q, kv)`` (torch's mask_mod on index tensors), or a boolean tensor, is True where a
        query may still look."""
        return Edit("mask", pairs_of(allow), **options)

    @staticmethod
    def bias(added: Callable[[Call], Tensor] | Tensor, **options: Any) -> Edit:
        """Add to the scores: a tensor broadcastable to (b, h, l, s), or a function of the call that gives one."""
        return Edit("bias", added if callable(added) else lambda call: added.to(call.q), **options)

    @staticmethod
    def scores(change: Callable[..., Tensor], **options: Any) -> Edit:
        """``change(score, b, h, q, kv)`` (torch's score_mod, on whole tensors) gives the new scores."""
        return Edit("scores", change, **options)

    @staticmethod
    def weights(change: Callable[[Tensor, Call], Tensor], **options: Any) -> Edit:
        """``change(weights, call)`` gives the new weights (b, h, l, s); the matrix is made at these sites."""
        return Edit("weights", change, **options)

    @staticmethod
    def heads(gate: Tensor | Sequence[float] | Callable[[Call], Tensor], **options: Any) -> Edit:
        """Multiply each head's output by its gate: (h,), or (b, h); 0 removes a head."""
        if callable(gate) and not isinstance(gate, Tensor):
            return Edit("heads", gate, **options)
        fixed = torch.as_tensor(gate)
        return Edit("heads", lambda call: fixed.to(call.q), **options)

    @staticmethod
    def out(change: Callable[[Tensor, Call], Tensor], **options: Any) -> Edit:
        """``change(out, call)`` gives the new per-head outputs (b, h, l, e), before the output projection."""
        return Edit("out", change, **options)

    @staticmethod
    def cache(keep: Callable[[Call], Tensor | None], **options: Any) -> Edit:
        """``keep(call)`` gives the keys that the cache still holds after the call, rising numbers (b, k) or (b, g, k) among
        those of ``call.k``, or None for all; tokens to come keep the positions they would have had."""
        return Edit("cache", keep, **options)

    # -- application ------------------------------------------------------------------------------------------------

    @property
    def touches(self) -> set[str]:
        return TOUCHES.get(self.quantity, {self.quantity})

    def conflicts(self, other: Edit) -> bool:
        """Whether the outcome would depend on which of the two comes first, and nobody said which."""
        if self.quantity == other.quantity and self.quantity in COMMUTES:
            return False
        unordered = self.order is None or other.order is None or self.order == other.order
        return bool(self.touches & other.touches) and unordered

    def with_options(self, **options: Any) -> Edit:
        return dataclasses.replace(self, **options)

    def applies(self, branch: str | None) -> bool:
        return self.strength != 0 and (self.branch is None or branch is None or branch == self.branch)

    def before(self, call: Call) -> None:
        """Lower what comes before the softmax into changed q, k, v, mask and bias of ``call``."""
        match self.quantity:
            case "kv":
                k, v = self.change(call.k, call.v, call)
                if k.shape[2] != call.k.shape[2] and (call.mask is not None or call.bias is not None):
                    raise ValueError(
                        f"{call.site}: keys went from {call.k.shape[2]} to {k.shape[2]}, but the call has a mask for the old ones"
                    )
                call.k, call.v = self._rows(k, call.k, call), self._rows(v, call.v, call)
            case "share":
                call.k, call.v = (self._rows(self.change(x, call), x, call) for x in (call.k, call.v))
            case "q" | "k" | "v":
                old = getattr(call, self.quantity)
                setattr(
                    call, self.quantity, self._blend(same(self.change(old, call), old, self.quantity, call), old, call)
                )
            case "scale_keys":
                factors = self._toward(self.change(call), 1.0).view(1, 1, 1, -1)
                inside = self._inside(call, factors.device)
                scale_keys(call, factors if inside is None else torch.where(inside, factors, 1.0))
            case "mask":
                allow = fitting(self.change(call), "mask", call)
                inside = self._inside(call, allow.device)
                allow = allow if inside is None else allow | ~inside
                if call.mask is None or call.mask.dtype == torch.bool:
                    call.mask = ops.merge_masks(call.mask, allow)
                else:
                    call.mask = call.mask.masked_fill(~allow, float("-inf"))
            case "bias":
                added = fitting(self.change(call), "bias", call)
                added = added[(None,) * (4 - added.ndim)] * self.strength
                inside = self._inside(call, added.device)
                added = added if inside is None else added * inside
                call.bias = added if call.bias is None else call.bias + added

    def on_scores(self, scores: Tensor, call: Call) -> Tensor:
        return self._blend(self.change(scores, *index_grid(call)), scores, call)

    def on_weights(self, weights: Tensor, call: Call) -> Tensor:
        return self._blend(same(self.change(weights, call), weights, "weights", call), weights, call)

    def after(self, out: Tensor, call: Call) -> Tensor:
        if self.quantity == "heads":
            gate = self._toward(self.change(call), 1.0)
            if gate.shape[-1] != out.shape[1]:
                raise ValueError(f"{call.site} has {out.shape[1]} heads; the gate has {gate.shape[-1]}")
            return self._rows(out * gate[..., :, None, None], out, call)
        return self._blend(same(self.change(out, call), out, "out", call), out, call)

    def _toward(self, factor: Tensor, identity: float) -> Tensor:
        return factor if self.strength == 1 else identity + self.strength * (factor - identity)

    def _blend(self, new: Tensor, old: Tensor, call: Call) -> Tensor:
        if self.strength != 1:
            new = old + self.strength * (new - old)
        return self._rows(new, old, call)

    def _rows(self, new: Tensor, old: Tensor, call: Call) -> Tensor:
        """``new`` in the rows and heads that this edit is for, ``old`` elsewhere."""
        inside = self._inside(call, new.device, heads=new.shape[1])
        if inside is None:
            return new
        if new.shape != old.shape:
            raise ValueError(f"{call.site}: an edit of some rows or heads cannot change the shape {tuple(old.shape)}")
        return torch.where(inside, new, old)

    def _inside(self, call: Call, device: torch.device, heads: int | None = None) -> Tensor | None:
        """(b, h, 1, 1), True in the batch rows and heads meant; None when all are."""
        inside = None
        if self.branch is not None and call.step.branch is None:
            b = call.q.shape[0]
            if b % 2:
                raise ValueError(f"branch={self.branch!r}: the batch at {call.site} has {b} rows, not two halves")
            second = torch.arange(b, device=device) >= b // 2
            inside = (second if self.branch == "cond" else ~second).view(b, 1, 1, 1)
        if self.only is not None:
            h = call.q.shape[1] if heads is None else heads
            if h != call.q.shape[1] and self.quantity in ("k", "v"):
                raise ValueError(f"only={list(self.only)}: {call.site} has {h} key heads; edit k and v for all of them")
            picked = torch.zeros(h, dtype=torch.bool, device=device)
            picked[pick(torch.arange(h, device=device), list(self.only))] = True
            picked = picked.view(1, h, 1, 1)
            inside = picked if inside is None else inside & picked
        return inside


def edit(
    model: torch.nn.Module,
    *edits: Edit,
    where: str | Sequence[str] = "*",
    steps: slice | range | int | None = None,
) -> Watch:
    """Apply ``edits`` at sites of ``model`` until the handle is undone; also a context manager.

    Args:
        where: names of sites with ``*``, or a kind of site: ``"self"``, ``"cross"``, ``"joint"``.
        steps: only at these steps of the loop around the model, counted from now.

    Raises:
        ValueError: no such site (with the nearest names), or no edits.
        EditConflict: two edits touch one quantity at one site and step, without ``order``.
    """
    from regard.core.watch import Watch

    if not edits:
        raise ValueError("edit() needs at least one Edit")
    return Watch(model, where, edits=edits, steps=steps)
