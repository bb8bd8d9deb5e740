"""Where in a loop a call happens: the denoising step, or the decoding step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Step ``index`` of the loop the model runs in, counted from the start of the watch; ``branch`` names a guidance branch.

    For a decoder inside ``generate`` the prefill is step 0. ``branch`` is ``"cond"`` or ``"uncond"`` where the host says so.
    """

    index: int = 0
    branch: str | None = None


def chosen(steps: slice | range | int | None, index: int) -> bool:
    """Whether step ``index`` is among ``steps`` (None: every step)."""
    if steps is None:
        return True
    if isinstance(steps, slice):
        start, stop, stride = steps.start or 0, steps.stop, steps.step or 1
        ends = (start, stop or 0, stride - 1)
    else:
        ends = (steps,) if isinstance(steps, int) else (*steps[:1], *steps[-1:])
    if min(ends, default=0) < 0:
        raise ValueError(f"steps={steps} must count from the front: the number of steps is not known in advance")
    if isinstance(steps, slice):
        return index >= start and (stop is None or index < stop) and (index - start) % stride == 0
    return index == steps if isinstance(steps, int) else index in steps
