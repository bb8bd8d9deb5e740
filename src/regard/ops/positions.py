"""Positions: rotations of queries and keys, biases and index tables of relative positions, and position features.

A position is a number per token, (n,), or a vector per token, (n, a), with one coordinate per axis of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def _real(positions: Tensor) -> Tensor:
    """Positions as floating point numbers of at least single precision."""
    kind = positions.dtype if positions.is_floating_point() else torch.float32
    return positions.to(torch.promote_types(kind, torch.float32))


def grid_positions(grid: Sequence[int], device: torch.device | str | None = None) -> Int[Tensor, "n a"]:
    """The integer coordinates of every cell of a grid, row-major."""
    axes = [torch.arange(length, device=device) for length in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def grid_coordinates(grid: Sequence[int], device: torch.device | str | None = None) -> Float[Tensor, "n a"]:
    """The coordinates of every cell of a grid, row-major, from -1 to 1 with both ends included."""
    axes = [torch.linspace(-1.0, 1.0, length, device=device) for length in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def rotary_angles(positions: Shaped[Tensor, "*n"], dim: int, base: float = 10000.0) -> Float[Tensor, "*n half"]:
    r"""The angles :math:`p \cdot base^{-2i/dim}`, i = 0 .. dim/2 - 1, of every position.

    Args:
        positions: any shape, integer or real.
        dim: channels to rotate, two per angle.
        base: the longest wavelength is nearly 2 pi base.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} must be even and at least 2")
    p = _real(positions)
    rates = base ** (-torch.arange(0, dim, 2, dtype=p.dtype, device=p.device) / dim)
    return p[..., None] * rates


def axial_angles(positions: Shaped[Tensor, "*n a"], dim: int, base: float = 10000.0) -> Float[Tensor, "*n half"]:
    """Rotary angles on a grid: every axis gets an equal share of the channels, first axis first."""
    axes = positions.shape[-1]
    if dim < 2 * axes or dim % (2 * axes):
        raise ValueError(f"dim={dim} must be a positive multiple of {2 * axes} for {axes} axes")
    return rotary_angles(positions, dim // axes, base).flatten(-2)


def rotate_halves(x: Float[Tensor, "*n d"], angles: Float[Tensor, "*m half"]) -> Float[Tensor, "*n d"]:
    r"""Rotate channel i with channel i + m by angle i, m being the number of angles; channels from 2m on stay.

    .. math:: (a, b) = (x_i, x_{i+m}) \mapsto (a \cos\theta_i - b \sin\theta_i,\; b \cos\theta_i + a \sin\theta_i)

    Args:
        x: queries or keys.
        angles: from :func:`rotary_angles`, broadcastable to ``x`` up to the last axis.
    """
    m = _check_angles(x, angles)
    first, second, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def rotate_pairs(x: Float[Tensor, "*n d"], angles: Float[Tensor, "*m half"]) -> Float[Tensor, "*n d"]:
    r"""Rotate channel 2i with channel 2i + 1 by angle i; channels beyond two per angle stay.

    .. math:: (a, b) = (x_{2i}, x_{2i+1}) \mapsto (a \cos\theta_i - b \sin\theta_i,\; b \cos\theta_i + a \sin\theta_i)

    Args:
        x: queries or keys.
        angles: from :func:`rotary_angles`, broadcastable to ``x`` up to the last axis.
    """
    m = _check_angles(x, angles)
    first, second, rest = x[..., 0 : 2 * m : 2], x[..., 1 : 2 * m : 2], x[..., 2 * m :]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _check_angles(x: Tensor, angles: Tensor) -> int:
    m = angles.shape[-1]
    if 2 * m > x.shape[-1]:
        raise ValueError(f"angles has {m} angles for {2 * m} channels, but x has {x.shape[-1]}")
    return m


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Float[Tensor, "h"]:
    r"""One slope per head: :math:`2^{-8i/h}`, i = 1 .. h, for a power of two; else those of the power of two below,
    followed by every second one of the power of two above."""
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    slopes += [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (num_heads - below), 2)]
    return torch.tensor(slopes, device=device)


def alibi_bias(
    slopes: Float[Tensor, "h"], query_positions: Shaped[Tensor, "l"], key_positions: Shaped[Tensor, "s"]
) -> Float[Tensor, "h l s"]:
    r"""The bias :math:`-m_h |i - j|` of every head, query position i and key position j."""
    apart = (_real(query_positions)[:, None] - _real(key_positions)).abs()
    return -slopes[:, None, None] * apart


def relative_index(
    query_positions: Int[Tensor, "l"] | Int[Tensor, "l a"],
    key_positions: Int[Tensor, "s"] | Int[Tensor, "s a"],
    max_distance: int | Sequence[int],
) -> Int[Tensor, "l s"]:
    r"""Where a table of relative positions holds the entry of every pair.

    Along an axis the entry of query i and key j is :math:`\mathrm{clip}(j - i, -(m-1), m-1) + m - 1`: 0 is the farthest
    key before the query, m - 1 the query itself. On a grid the axes' entries form a row-major index into a table of
    :math:`\prod (2m - 1)` entries; nothing is clipped when m is the length of the axis.

    Args:
        query_positions: one integer, or one per axis, for each query.
        key_positions: likewise for the keys.
        max_distance: m, one for all axes or one per axis; farther pairs share the last entry.
    """
    queries = query_positions[:, None] if query_positions.ndim == 1 else query_positions
    keys = key_positions[:, None] if key_positions.ndim == 1 else key_positions
    axes = queries.shape[-1]
    limits = (max_distance,) * axes if isinstance(max_distance, int) else tuple(max_distance)
    if keys.shape[-1] != axes or len(limits) != axes or min(limits) < 1:
        raise ValueError(
            f"max_distance={max_distance} must be positive, one or one per axis; positions have {axes} and "
            f"{keys.shape[-1]} coordinates"
        )
    index = torch.zeros(len(queries), len(keys), dtype=torch.long, device=queries.device)
    for axis, m in enumerate(limits):
        offset = (keys[:, axis] - queries[:, None, axis]).clamp(1 - m, m - 1)
        index = index * (2 * m - 1) + offset + m - 1
    return index


def sincos(positions: Shaped[Tensor, "*n"], dim: int, base: float = 10000.0) -> Float[Tensor, "*n c"]:
    """Sines, then cosines, of the angles of :func:`rotary_angles`: ``dim`` features of every position."""
    angles = rotary_angles(positions, dim, base)
    return torch.cat((angles.sin(), angles.cos()), -1)


def axial_sincos(positions: Shaped[Tensor, "*n a"], dim: int, base: float = 10000.0) -> Float[Tensor, "*n c"]:
    """:func:`sincos` on a grid: every axis gets an equal share of the channels, first axis first."""
    axes = positions.shape[-1]
    if dim < 2 * axes or dim % (2 * axes):
        raise ValueError(f"dim={dim} must be a positive multiple of {2 * axes} for {axes} axes")
    return sincos(positions, dim // axes, base).flatten(-2)


def fourier_features(
    positions: Float[Tensor, "*n a"], bands: int, max_freq: int | float | Sequence[int | float]
) -> Float[Tensor, "*n c"]:
    r"""The coordinates, then :math:`\sin(\pi f_k x)`, then :math:`\cos(\pi f_k x)`: a (2 bands + 1) features.

    An axis has ``bands`` frequencies, evenly spaced from 1 to ``max_freq`` / 2; sines and cosines go axis by axis.

    Args:
        positions: coordinates from -1 to 1, such as :func:`grid_coordinates`.
        bands: frequencies per axis.
        max_freq: the resolution to tell apart (tokens per axis), one for all axes or one per axis.
    """
    axes = positions.shape[-1]
    limits = [float(max_freq)] * axes if isinstance(max_freq, int | float) else [float(f) for f in max_freq]
    if bands < 1 or len(limits) != axes:
        raise ValueError(f"bands={bands} must be at least 1 and max_freq={max_freq} one number or one per {axes} axes")
    p = _real(positions)
    rates = torch.stack([torch.linspace(1.0, f / 2, bands, dtype=p.dtype, device=p.device) for f in limits])
    angles = (math.pi * p[..., None] * rates).flatten(-2)
    return torch.cat((p, angles.sin(), angles.cos()), -1)
