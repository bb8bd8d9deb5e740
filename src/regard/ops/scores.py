r"""Score functions: how well every query fits every key, before normalisation.

Each takes queries (..., l, d_q), keys (..., s, d_k) and its parameters as tensors, and gives scores (..., l, s). The
formulas are those of one query q and one key k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Queries = Float[Tensor, "*r l p"]
Keys = Float[Tensor, "*r s d"]
Scores = Float[Tensor, "*r l s"]


def similarity(q: Queries, k: Keys, eps: float = 1e-12) -> Scores:
    r"""The cosine of the angle between them, :math:`q \cdot k / (|q| |k|)`; lengths below ``eps`` count as ``eps``."""
    return dot(F.normalize(q, dim=-1, eps=eps), F.normalize(k, dim=-1, eps=eps))


def dot(q: Queries, k: Keys) -> Scores:
    r""":math:`q \cdot k`."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have one width; got {q.shape[-1]} and {k.shape[-1]}")
    return q @ k.transpose(-1, -2)


def scaled_dot(q: Queries, k: Keys) -> Scores:
    r""":math:`q \cdot k / \sqrt{d}` for vectors of width d."""
    return dot(q * q.shape[-1] ** -0.5, k)


def general(q: Queries, k: Keys, w: Float[Tensor, "p d"]) -> Scores:
    r""":math:`q^\top W k`."""
    return dot(q @ w, k)


def biased_general(q: Queries, k: Keys, w: Float[Tensor, "d p"], b: Float[Tensor, "d"]) -> Scores:
    r""":math:`k^\top (W q + b)`."""
    return dot(F.linear(q, w, b), k)


def activated_general(
    q: Queries, k: Keys, w: Float[Tensor, "p d"], b: Float[Tensor, ""], activation: Function = torch.tanh
) -> Scores:
    r""":math:`\mathrm{act}(q^\top W k + b)`, b one number."""
    return activation(general(q, k, w) + b)


def kernel(q: Queries, k: Keys, feature_map: Function) -> Scores:
    r""":math:`\phi(q) \cdot \phi(k)`."""
    return dot(feature_map(q), feature_map(k))


def concat(
    q: Queries,
    k: Keys,
    w: Float[Tensor, "m both"],
    out: Float[Tensor, "m"],
    b: Float[Tensor, "m"] | None = None,
    activation: Function = torch.tanh,
) -> Scores:
    r""":math:`u^\top \mathrm{act}(W [q; k] + b)`, with u = ``out``."""
    if w.shape[-1] != q.shape[-1] + k.shape[-1]:
        raise ValueError(f"w must have {q.shape[-1]} + {k.shape[-1]} columns for q and k; got {tuple(w.shape)}")
    return additive(q, k, w[:, : q.shape[-1]], w[:, q.shape[-1] :], out, b, activation)


def additive(
    q: Queries,
    k: Keys,
    w_q: Float[Tensor, "m p"],
    w_k: Float[Tensor, "m d"],
    out: Float[Tensor, "m"],
    b: Float[Tensor, "m"] | None = None,
    activation: Function = torch.tanh,
) -> Scores:
    r""":math:`u^\top \mathrm{act}(W_q q + W_k k + b)`, with u = ``out``."""
    return activation(F.linear(q, w_q, b)[..., :, None, :] + F.linear(k, w_k)[..., None, :, :]) @ out


def deep(
    q: Queries,
    k: Keys,
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, "_"]],
    activation: Function = torch.tanh,
) -> Scores:
    r"""A perceptron on :math:`[q; k]`: ``activation`` follows every layer but the last, which has one output."""
    if not weights or len(weights) != len(biases) or weights[-1].shape[0] != 1:
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"weights and biases must pair up and end in one output; got {shapes}, {len(biases)} biases")
    l, s = q.shape[-2], k.shape[-2]
    pairs = (q[..., :, None, :].expand(*q.shape[:-1], s, -1), k[..., None, :, :].expand(*k.shape[:-2], l, s, -1))
    x = F.linear(torch.cat(pairs, -1), weights[0], biases[0])
    for w, b in zip(weights[1:], biases[1:]):
        x = F.linear(activation(x), w, b)
    return x[..., 0]


def location(q: Queries, k: Keys, w: Float[Tensor, "most p"], b: Float[Tensor, "most"] | None = None) -> Scores:
    r""":math:`(W q + b)_j` for key j: the query alone decides. ``w`` has a row for each place that a key may have."""
    return _places(F.linear(q, w, b), k, "w")


def feature(
    q: Queries,
    k: Keys,
    w_1: Float[Tensor, "m d1"],
    w_2: Float[Tensor, "m d2"],
    out: Float[Tensor, "m"],
    b: Float[Tensor, "m"] | None = None,
    maps: tuple[Function, Function] | None = None,
    activation: Function = torch.tanh,
) -> Scores:
    r""":math:`u^\top \mathrm{act}(W_1 \phi_1(k) + W_2 \phi_2(k) + b)`, with u = ``out``: the key alone decides.

    Without ``maps`` both :math:`\phi` are the identity.
    """
    first, second = (k, k) if maps is None else (maps[0](k), maps[1](k))
    one = activation(F.linear(first, w_1, b) + F.linear(second, w_2)) @ out
    return one[..., None, :].expand(*k.shape[:-2], q.shape[-2], k.shape[-2])


def euclidean(q: Queries, k: Keys) -> Scores:
    r""":math:`-|q - k|^2`, expanded so that no (l, s, d) tensor is made; rounding grows with :math:`|q|^2 + |k|^2`."""
    return 2.0 * dot(q, k) - q.square().sum(-1)[..., :, None] - k.square().sum(-1)[..., None, :]


def learned_static(q: Queries, k: Keys, table: Float[Tensor, "longest most"]) -> Scores:
    """The entry of ``table`` for the places of query and key, whatever they hold."""
    if table.shape[0] < q.shape[-2]:
        raise ValueError(f"table has places for {table.shape[0]} queries; got {q.shape[-2]}")
    return _places(table[: q.shape[-2]], k, "table").expand(*q.shape[:-1], k.shape[-2])


def _places(scores: Tensor, k: Tensor, name: str) -> Tensor:
    if scores.shape[-1] < k.shape[-2]:
        raise ValueError(f"{name} has places for {scores.shape[-1]} keys; got {k.shape[-2]}")
    return scores[..., : k.shape[-2]]


SCORES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        similarity,
        dot,
        scaled_dot,
        general,
        biased_general,
        activated_general,
        kernel,
        concat,
        additive,
        deep,
        location,
        feature,
        euclidean,
        learned_static,
    )
}
