"""Modules that papers are built from."""

from regard.nn.attention import Attention, expand_mask
from regard.nn.cache import Cache, KVCache
from regard.nn.rotary import Rotary

__all__ = ["Attention", "Cache", "KVCache", "Rotary", "expand_mask"]
