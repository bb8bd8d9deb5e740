"""A layer of a transformers cache from which keys were taken out, while positions and masks go on as if they were there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


def along(x: Tensor, index: Tensor) -> Tensor:
    """Keys or values ``x`` (b, g, s, d) at ``index`` (b, g, k)."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


class KeptLayer(DynamicLayer):
    """Some of the keys and values seen so far; ``index`` (b, g, k) are their places among all ``seen`` ones."""

    is_croppable = False

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor, seen: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = along(keys, index), along(values, index)
        self.index, self.seen = index, seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = torch.arange(self.seen, self.seen + key_states.shape[2], device=self.index.device)
        self.index = torch.cat((self.index, new.expand(*self.index.shape[:2], -1)), -1)
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a cache from which keys were taken out cannot be cropped")

    def reset(self) -> None:
        raise ValueError("a cache from which keys were taken out cannot be used anew: make a new one")

    def _rows(self, rows: Tensor) -> None:
        self.keys, self.values, self.index = (x[rows] for x in (self.keys, self.values, self.index))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx.to(self.index.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(torch.arange(len(self.index), device=self.index.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)

    def mask(self, mask: Tensor, heads: int) -> Tensor:
        """A ``mask`` (b, 1 or h, l, s) for all tokens seen, and those to come, at the keys that are left."""
        coming = torch.arange(self.seen, mask.shape[-1], device=self.index.device)
        index = torch.cat((self.index, coming.expand(*self.index.shape[:2], -1)), -1)
        b, g, k = index.shape
        index = index.repeat_interleave(heads // g, 1)[:, :, None]
        return mask.expand(b, heads, *mask.shape[2:]).gather(3, index.expand(b, heads, mask.shape[2], k))


class LayerCache:
    """The part of a transformers cache that belongs to one layer: as a layer of this library uses it, and as it is edited."""

    def __init__(self, cache: Any, index: int) -> None:
        self.cache, self.number = cache, index

    @property
    def position(self) -> int:
        return int(self.cache.get_seq_length(self.number))

    @property
    def kept(self) -> KeptLayer | None:
        layers = self.cache.layers
        layer = layers[self.number] if self.number < len(layers) else None
        return layer if isinstance(layer, KeptLayer) else None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self.cache.update(k, v, self.number)
        return both

    def keep(self, index: Tensor) -> None:
        layer: Any = self.cache.layers[self.number]
        if isinstance(layer, KeptLayer):
            layer.keys, layer.values = along(layer.keys, index), along(layer.values, index)
            layer.index = layer.index.gather(2, index)
        elif type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            self.cache.layers[self.number] = KeptLayer(layer.keys, layer.values, index, layer.get_seq_length())
        else:
            raise ValueError(
                f"keys cannot be taken out of a {type(layer).__name__}: use a DynamicCache without a window"
            )


def held_by(module: Any, kwargs: dict[str, Any]) -> LayerCache | None:
    """The cache that the attention ``module`` is called with."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is None or getattr(module, "layer_idx", None) is None or not hasattr(cache, "layers"):
        return None
    return LayerCache(cache, module.layer_idx)
