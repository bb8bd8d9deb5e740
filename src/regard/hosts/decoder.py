"""A layer in the place of the causal self-attention of a transformers decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.hosts.eviction import LayerCache, held_by
from regard.nn import Attention, Rotary

# Rates that do not depend on how long the sequence is.
FIXED = ("default", "linear", "llama3", "yarn", "proportional")


def rotary_of(model: nn.Module, name: str) -> Rotary | None:
    """The rotary positions of the innermost module around ``name`` that has some; None where the host has none.

    Raises ValueError where their rates depend on the length of the sequence or on the kind of layer.
    """
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        holder = model.get_submodule(".".join(path[:depth]))
        turning = next((m for n, m in holder.named_children() if "rotary" in n), None)
        if turning is None:
            continue
        rates, kind = getattr(turning, "inv_freq", None), getattr(turning, "rope_type", None)
        if not isinstance(rates, Tensor) or kind not in FIXED:
            raise ValueError(
                f"{name} cannot be replaced: its rotary positions are of kind {kind}, not {', '.join(FIXED)}"
            )
        return Rotary(rates, float(getattr(turning, "attention_scaling", 1.0)))
    return None


class DecoderSlot(nn.Module):
    """A causal layer called as a decoder of transformers calls its attention."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, index

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kwargs.get("encoder_hidden_states") is not None:
            raise ValueError("encoder_hidden_states reached a layer that was put in the place of self-attention")
        given: dict[str, Any] = {}
        held = held_by(self, kwargs)
        if held is not None:
            given["cache"] = self._fit(held)
        if attention_mask is not None:
            if attention_mask.dtype != torch.bool:
                attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
            kept = None if held is None else held.kept
            heads = getattr(self.layer, "num_heads", 1)
            given["mask"] = attention_mask if kept is None else kept.mask(attention_mask, heads)
        return self.layer(hidden_states, **given), None

    def _fit(self, held: LayerCache) -> LayerCache:
        if not isinstance(self.layer, Attention):
            raise ValueError(
                f"{type(self.layer).__name__} keeps no keys and values that the host's cache could hold: "
                "call the model with use_cache=False"
            )
        if getattr(held.cache, "is_compileable", False):
            raise ValueError(f"{type(held.cache).__name__} has places for tokens to come: use a cache that grows")
        return held


def decoder_slot(model: nn.Module, name: str) -> Callable[[nn.Module], nn.Module]:
    """What stands for the module ``name``: its scale and its rotary positions go over to the layer."""
    module = model.get_submodule(name)
    rotary, scale = rotary_of(model, name), getattr(module, "scaling", None)

    def wrap(layer: nn.Module) -> nn.Module:
        if isinstance(layer, Attention):
            if layer.takes_rotary:
                layer.rotary = rotary
            if scale is not None and layer.head_dim == getattr(module, "head_dim", None):
                layer.scale = scale
        return DecoderSlot(layer, getattr(module, "layer_idx", 0))

    return wrap
