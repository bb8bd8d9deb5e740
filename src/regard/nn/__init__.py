"""Modules that papers are built from."""

from regard.nn.attention import Attention, expand_mask
from regard.nn.cache import KVCache

__all__ = ["Attention", "KVCache", "expand_mask"]
