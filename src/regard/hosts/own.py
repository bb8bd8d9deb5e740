"""This library's own layers: ``seam`` of :class:`regard.nn.Attention` is where they are met."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.core.call import Call
from regard.core.host import HOSTS, Host
from regard.core.lower import run_eager
from regard.core.tap import taps_of
from regard.nn import Attention, Cache
from regard.ops.attend import attend, causal_mask, merge_masks

_PLAIN_SEAM = Attention.seam


def _watched_seam(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    tap = taps_of(self)
    if tap is None or tap.quiet:
        return self.attend(q, k, v, mask)
    call = Call(q, k, v, mask=mask, scale=self.scale, dropout=self.dropout if self.training else 0.0)
    if self.causal:
        call.q_start = k.shape[2] - q.shape[2] if tap.held is None else tap.held.position - q.shape[2]
        call.mask = merge_masks(mask, causal_mask(q.shape[2], k.shape[2], q.device))
    if not self.fused:
        call.stages = (self.scores, self.normalize)
    call.unsure = type(self).attend is not Attention.attend
    given = call.mask

    def native(c: Call) -> Tensor:
        if c.bias is not None:
            if c.unsure:
                raise ValueError(
                    f"{c.site}: {type(self).__name__} has its own form of attention, to which no bias can be added"
                )
            if self.fused:
                return attend(c.q, c.k, c.v, mask=c.mask, bias=c.bias, scale=c.scale, dropout=c.dropout)
            return run_eager(c, [])
        tap.quiet = True
        try:
            return self.attend(c.q, c.k, c.v, mask if c.mask is given else c.mask)
        finally:
            tap.quiet = False

    return tap.run(call, native, "own")


class Own(Host):
    """Layers that derive from ``nn.Attention``; others are met where they call the fused kernel."""

    name = "regard"

    def enter(self) -> None:
        Attention.seam = _watched_seam  # type: ignore[method-assign]

    def cache(self, module: nn.Module, kwargs: dict[str, Any]) -> Cache | None:
        found: Cache | None = kwargs.get("cache")
        return found

    def leave(self) -> None:
        Attention.seam = _PLAIN_SEAM  # type: ignore[method-assign]


HOSTS["regard"] = Own()
