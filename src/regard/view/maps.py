"""Where trained layers look, on real samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from regard.models.slot import Slot, SlotNetwork
from regard.nn.attention import Attention


@runtime_checkable
class Shows(Protocol):
    """A layer that can say its weights (b, h, n, n) for tokens (b, n, c) of a grid."""

    def weights(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor: ...


def weights(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """The weights (b, h, n, n) with which ``layer`` mixes tokens ``x`` (b, n, c), or None if they cannot be vouched for.

    A layer derived from :class:`Attention` is believed only if its stages, put together with these weights, give its output.
    """
    if isinstance(layer, Shows):
        return layer.weights(x, grid=grid)
    if not isinstance(layer, Attention) or layer.causal:
        return None
    q, k, v = layer.project(x, x)
    if q.ndim != 4 or k.shape[-2] != x.shape[1] or q.shape[-2] != x.shape[1]:
        return None
    found = layer.normalize(layer.scores(q, k), None)
    verified = torch.allclose(layer.merge(layer.mix(found, v)), layer(x, grid=grid), rtol=1e-4, atol=1e-5)
    return found if verified else None


@dataclass(frozen=True)
class Map:
    """How much attention each token of ``grid`` receives, for each sample, in units of the mean over tokens."""

    layer: str
    grid: tuple[int, int]
    received: list[list[float]]


def received(name: str, network: SlotNetwork, images: Tensor) -> Map | None:
    """The attention that tokens receive in the first block, averaged over heads and queries; None without weights."""
    first = network.stages[0][0].mixer  # type: ignore[index, union-attr]
    if not isinstance(first, Slot):
        return None
    seen: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            network(images)
            found = weights(first.layer, seen[0], first.grid)
    finally:
        handle.remove()
    if found is None:
        return None
    sums = found.float().mean((1, 2))
    return Map(name, first.grid, (sums / sums.mean(-1, keepdim=True).clamp_min(1e-12)).tolist())
