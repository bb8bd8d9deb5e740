"""diffusers: sites are met at the fused kernel; here is the guidance branch, and what the tokens mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from diffusers.models.cache_utils import CacheMixin
from torch import nn

from regard.core.call import Call
from regard.core.host import HOSTS, Host, Sample
from regard.core.tokens import Segment, Tokens

_BRANCH: ContextVar[str | None] = ContextVar("guidance branch", default=None)
_PLAIN_CONTEXT = CacheMixin.cache_context


@contextmanager
def _noted_context(self: Any, name: str, **kwargs: Any) -> Iterator[None]:
    token = _BRANCH.set(name if name in ("cond", "uncond") else None)
    try:
        with _PLAIN_CONTEXT(self, name, **kwargs):
            yield
    finally:
        _BRANCH.reset(token)


# In which order the two streams of a joint site are put together: text first, unless the class is listed here.
IMAGE_FIRST = ("SD3Transformer2DModel", "HunyuanVideoTransformer3DModel")


class Diffusers(Host):
    """UNets: self-attention over the pixels of one level, cross-attention to the text. Transformers: both in one sequence."""

    name = "diffusers"

    def enter(self) -> None:
        CacheMixin.cache_context = _noted_context  # type: ignore[method-assign]

    def leave(self) -> None:
        CacheMixin.cache_context = _PLAIN_CONTEXT  # type: ignore[method-assign]

    def branch(self, model: nn.Module) -> str | None:
        return _BRANCH.get()

    def kind(self, model: nn.Module, name: str, call: Call) -> str | None:
        """A block that runs over both streams already put together has one input, and is joint all the same."""
        return "joint" if name.startswith("single_") and call.q.shape[2] == call.k.shape[2] else None

    def tokens(self, model: nn.Module, name: str, call: Call, sample: Sample) -> tuple[Tokens | None, Tokens | None]:
        l, s = call.q.shape[2], call.k.shape[2]
        image = _grid(model, sample.shape, l)
        if l != s:
            return image, Tokens((Segment("text", (s,)),))
        if image is not None:
            return image, image
        joint = _joint(model, sample.shape, l)
        return joint, joint


def _grid(model: nn.Module, sample: tuple[int, ...], size: int) -> Tokens | None:
    """The level of a UNet, or the patch grid of a transformer, that has ``size`` positions."""
    if len(sample) != 4:
        return None
    height, width = sample[-2:]
    patch = getattr(getattr(model, "config", None), "patch_size", None) or 1
    for factor in (patch * 2**i for i in range(8)):
        grid = (-(-height // factor), -(-width // factor))
        if grid[0] * grid[1] == size:
            return Tokens((Segment("image", grid),))
    return None


def _joint(model: nn.Module, sample: tuple[int, ...], size: int) -> Tokens | None:
    if len(sample) == 4:
        patch = getattr(getattr(model, "config", None), "patch_size", None) or 1
        grid: tuple[int, ...] = (sample[-2] // patch, sample[-1] // patch)
    elif len(sample) == 3:
        grid = (sample[1],)
    else:
        return None
    text = size - grid[0] * (grid[1] if len(grid) == 2 else 1)
    if text < 0:
        return None
    if text == 0:
        return Tokens((Segment("image", grid),))
    parts = (Segment("text", (text,)), Segment("image", grid))
    return Tokens(parts[::-1] if type(model).__name__ in IMAGE_FIRST else parts)


HOSTS["diffusers"] = Diffusers()
