"""Where a host keeps its heads: between its (..., n, d) and the (b, h, n, d) of a call."""

from __future__ import annotations

from torch import Tensor


class Fold:
    """The leading axes of ``like``, a host's queries.

    Args:
        heads: number of heads where the module says it. They may be folded into the batch, or stand before an axis of
            windows; without it they are the axis before the tokens.
        batch: of the module's input; 0 where it is not known.
    """

    def __init__(self, like: Tensor, heads: int | None, batch: int) -> None:
        lead = like.shape[:-2]
        self.lead = lead
        self.folded, self.axis = 1, len(lead) - 1
        if heads is None or not lead:
            return
        places = [i for i in range(1, len(lead)) if lead[i] == heads]
        # Heads are cut from the channels: a step to the next head is shorter than one to the next window.
        axis = min(places, key=like.stride) if places else None
        blocks_first = axis == 1 and len(lead) == 2 and lead[0] == batch * heads and like.stride(1) == 1
        if axis is not None and not blocks_first:
            self.axis = axis
        elif lead[0] % heads == 0 and lead[0] != batch:
            self.folded, self.axis = heads, 1

    def apart(self, x: Tensor) -> Tensor:
        """(b, h, n, d) of a host's tensor with these leading axes; an axis of heads of another size stays."""
        if not self.lead:
            return x[None, None]
        if self.folded > 1:
            x = x.expand(*self.lead, *x.shape[-2:]).unflatten(0, (-1, self.folded))
        elif len(self.lead) == 1:
            return x.expand(*self.lead, *x.shape[-2:]).unsqueeze(1)
        else:
            x = x.expand(*(n if i != self.axis else -1 for i, n in enumerate(self.lead)), *x.shape[-2:])
        return x if x.ndim == 4 and self.axis == 1 else x.movedim(self.axis, -3).flatten(0, -4)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`apart`."""
        if len(self.lead) < 2 and self.folded == 1:
            return x.reshape(*self.lead, *x.shape[-2:])
        lead = list(self.lead)
        if self.folded > 1:
            lead[:1] = [lead[0] // self.folded, self.folded]
        del lead[self.axis]
        x = x.reshape(*lead, *x.shape[1:]) if len(lead) != 1 else x
        x = x if self.axis == len(lead) else x.movedim(-3, self.axis)
        return x.flatten(0, 1) if self.folded > 1 else x
