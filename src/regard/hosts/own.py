"""This library's own layers: the stage ``attend`` of :class:`regard.nn.Attention` is the seam."""

from __future__ import annotations

from torch import Tensor

from regard.core.call import Call
from regard.core.host import HOSTS, Host
from regard.core.tap import taps_of
from regard.nn import Attention
from regard.ops.attend import causal_mask, merge_masks

_PLAIN_ATTEND = Attention.attend


def _watched_attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    tap = taps_of(self)
    if tap is None or tap.quiet:
        return _PLAIN_ATTEND(self, q, k, v, mask)
    call = Call(q, k, v, mask=mask, scale=self.scale, dropout=self.dropout if self.training else 0.0)
    if self.causal:
        call.q_start = k.shape[2] - q.shape[2]
        call.mask = merge_masks(mask, causal_mask(q.shape[2], k.shape[2], q.device))
    if not self.fused:
        call.stages = (self.scores, self.normalize)
    given = call.mask

    def native(c: Call) -> Tensor:
        if c.bias is not None:
            raise ValueError(f"{c.site}: a layer of this library takes no bias; edit its scores")
        tap.quiet = True
        try:
            return _PLAIN_ATTEND(self, c.q, c.k, c.v, mask if c.mask is given else c.mask)
        finally:
            tap.quiet = False

    return tap.run(call, native, "own")


class Own(Host):
    """Layers that derive from ``nn.Attention``; others are met where they call the fused kernel."""

    name = "regard"

    def enter(self) -> None:
        Attention.attend = _watched_attend  # type: ignore[method-assign]

    def leave(self) -> None:
        Attention.attend = _PLAIN_ATTEND  # type: ignore[method-assign]


HOSTS["regard"] = Own()
