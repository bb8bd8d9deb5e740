"""Dropping tokens from one decoder layer on, with positions, masks and uneven caches kept right.

All layers of a transformers decoder get the same mask, positions and rotary angles, so every layer from the cut on takes
its own part of them; only the layer at the cut takes its part of the hidden states. Positions stay the original ones, with
gaps. The caches of the layers before the cut hold the whole prompt, those after it what was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.tap import Tap
from regard.core.watch import Watch

Keep = Callable[[Call, Tensor, Tensor], Tensor]


class _Scorer(Watch):
    """Hands on the call of the layer before the cut when it reads a prompt."""

    def __init__(self, model: nn.Module, site: str, prune: TokenPruning) -> None:
        self.prune = prune
        super().__init__(model, site)

    def saw(self, tap: Tap, call: Call, out: Tensor, seam: str) -> Tensor:
        if call.q.shape[2] > 1:
            self.prune.choose(call)
        return super().saw(tap, call, out, seam)


class TokenPruning:
    """A handle on a decoder whose layers from ``after`` on see only the prompt tokens that ``keep`` returns.

    Args:
        after: number of layers that see every token; the layer before the cut gives the call to choose by.
        keep: ``keep(call, image, valid)`` with image and valid (b, s) boolean returns the kept positions (b, m), ascending.

    Raises:
        ValueError: no decoder, a cut outside it, a compiled (static) cache, a prompt in pieces, embeddings instead of ids.
    """

    def __init__(self, model: nn.Module, after: int, keep: Keep) -> None:
        name, layers = _decoder(model)
        if not 1 <= after < len(layers):
            raise ValueError(f"after={after} must be in 1..{len(layers) - 1}: the decoder has {len(layers)} layers")
        image_id = getattr(getattr(model, "config", None), "image_token_id", None)
        if image_id is None:
            raise ValueError(f"{type(model).__name__} has no image_token_id: its image tokens cannot be told from text")
        self.image_id, self.keep = image_id, keep
        self.image = self.valid = torch.zeros(0)
        self.kept: Tensor | None = None
        self.prompt = 0
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._see, with_kwargs=True)]
        self._hooks += [
            layer.register_forward_pre_hook(self._cut(first=i == after), with_kwargs=True)
            for i, layer in enumerate(layers)
            if i >= after
        ]
        self._scorer = _Scorer(model, f"{name}.layers.{after - 1}.self_attn", self)

    def undo(self) -> None:
        """Take the pruning away; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._scorer.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("input_ids are needed to find the image tokens; got embeddings only")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if getattr(cache, "is_compileable", False):
            raise ValueError(f"{type(cache).__name__} gives every layer the same length; prune with a dynamic cache")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if ids.shape[1] == 1 and seen:
            return
        if seen:
            raise ValueError(f"the prompt must come in one piece: {seen} tokens are cached and {ids.shape[1]} follow")
        mask = kwargs.get("attention_mask")
        self.valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.image = (ids == self.image_id) & self.valid
        self.prompt, self.kept = ids.shape[1], None

    def choose(self, call: Call) -> None:
        if not bool(self.image.any()):
            return
        kept = self.keep(call, self.image, self.valid)
        if kept.shape[1] < self.prompt:
            self.kept = kept

    def _cut(self, first: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.kept is None:
                return None
            changed = dict(kwargs)
            hidden = changed.pop("hidden_states", args[0] if args else None)
            mask = changed.get("attention_mask")
            if hidden.shape[1] == 1 and (mask is None or mask.shape[-2] == 1):
                if mask is not None:
                    later = torch.arange(self.prompt, mask.shape[-1], device=mask.device).expand(len(self.kept), -1)
                    changed["attention_mask"] = _take(mask, torch.cat([self.kept, later], 1), -1)
            else:
                if first:
                    hidden = _take(hidden, self.kept, 1)
                if mask is not None:
                    mask = _take(mask, self.kept, -1)
                    changed["attention_mask"] = mask if mask.ndim == 2 else _take(mask, self.kept, -2)
                for name in ("position_embeddings", "position_ids"):
                    if changed.get(name) is not None:
                        changed[name] = _along_positions(changed[name], self.kept)
            return (hidden, *args[1:]), changed

        return hook


def _decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and hasattr(module, "embed_tokens") and hasattr(layers[0], "self_attn"):
            return name, layers
    raise ValueError(f"{type(model).__name__} has no decoder with embed_tokens and layers")


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``x`` at the positions ``index`` (b, m) of axis ``dim``, row by row."""
    dim = dim % x.ndim
    x = x.expand(len(index), *x.shape[1:]) if x.shape[0] != len(index) else x
    shape = [len(index)] + [1] * (x.ndim - 1)
    shape[dim] = index.shape[1]
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))


def _along_positions(value: Any, index: Tensor) -> Any:
    """Positions (b, s) or (axes, b, s), or rotary (cos, sin) of shape (..., b, s, d), at ``index``."""
    if isinstance(value, tuple):
        return tuple(_rotary(x, index) for x in value)
    if value.ndim == 3:
        return torch.stack([_take(axis, index, 1) for axis in value])
    return _take(value, index, 1)


def _rotary(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([_take(axis, index, 1) for axis in x]) if x.ndim == 4 else _take(x, index, 1)
