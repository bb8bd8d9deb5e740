"""The keys and values that a decoder keeps between steps."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """What a layer asks of whoever keeps its keys and values: where the next token stands, and room for it."""

    @property
    def position(self) -> int:
        """Tokens seen so far, those that are no longer held among them."""
        ...

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (b, g, n, d) keys and values; returns all that are held."""
        ...

    def keep(self, index: Tensor) -> None:
        """Hold only those that ``index`` (b, g, k) names, in its order."""
        ...


class KVCache:
    """Keys and values of the tokens seen so far, (b, g, capacity, d), filled from the left.

    ``append`` writes in place and returns views of the filled part; ``reorder`` follows a beam search, ``crop`` forgets
    the newest tokens, ``keep`` all but some. Raises ValueError for another batch size, dtype or width, or when the capacity
    is exceeded.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        k_dim: int,
        v_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if min(batch, kv_heads, capacity, k_dim) < 1:
            raise ValueError(
                f"batch, kv_heads, capacity, k_dim must be positive; got {(batch, kv_heads, capacity, k_dim)}"
            )
        self.k = torch.zeros(batch, kv_heads, capacity, k_dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch, kv_heads, capacity, k_dim if v_dim is None else v_dim, dtype=dtype, device=device)
        self.length = self.forgotten = 0

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (b, g, n, d) keys and values; returns all keys and values so far."""
        for name, new, held in (("k", k, self.k), ("v", v, self.v)):
            if new.shape[:2] != held.shape[:2] or new.shape[-1] != held.shape[-1]:
                raise ValueError(f"{name} is {tuple(new.shape)} but the cache holds {tuple(held.shape)}")
            if new.dtype != held.dtype:
                raise ValueError(f"{name} is {new.dtype} but the cache holds {held.dtype}")
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"cache is full: capacity {self.k.shape[2]}, {self.length} held, {k.shape[2]} to append")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    @property
    def position(self) -> int:
        return self.length + self.forgotten

    def keep(self, index: Tensor) -> None:
        """Hold only those that ``index`` (b, g, k) names, in its order; positions go on as if nothing was forgotten."""
        if index.shape[:2] != self.k.shape[:2] or (index.numel() and int(index.max()) >= self.length):
            raise ValueError(
                f"index {tuple(index.shape)} must name some of the {self.length} held by {tuple(self.k.shape)}"
            )
        kept = index.shape[2]
        for x in (self.k, self.v):
            x[:, :, :kept] = x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))
        self.forgotten += self.length - kept
        self.length = kept

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.k, self.v = self.k[rows], self.v[rows]

    def crop(self, length: int) -> None:
        """Keep the oldest ``length`` tokens."""
        if self.forgotten:
            raise ValueError(f"{self.forgotten} tokens were forgotten: which are the newest of the rest is not known")
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} is outside 0..{self.length}")
        self.length = length
