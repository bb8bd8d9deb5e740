"""Relevance through self-, cross- and co-attention: gradient-weighted attention, added up layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.catalog.registry import method
from regard.core.call import Call
from regard.core.capture import Capture
from regard.core.explain import readout
from regard.core.known import matches
from regard.core.tokens import Rows

Streams = str | tuple[str, str]
Step = tuple[Call, str, str]


class RelevancePropagation:
    """Relevance matrices between streams of tokens: row i of ``matrix(s, q)`` is what token i of s owes to the tokens of q.

    They begin as the identity within a stream and zero between two; each rule adds to them. An item of a batch has its own.

    Args:
        sizes: number of tokens of each stream.

    Example:
        >>> r = RelevancePropagation({"text": 2, "image": 3})
        >>> r.cross_attention("text", "image", torch.ones(1, 2, 3))
        >>> r.matrix("text", "image").shape
        torch.Size([1, 2, 3])
    """

    def __init__(
        self, sizes: Mapping[str, int], *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self.sizes = dict(sizes)
        self._r = {
            (s, q): (torch.eye if s == q else torch.zeros)(self.sizes[s], self.sizes[q], dtype=dtype, device=device)[
                None
            ]
            for s in self.sizes
            for q in self.sizes
        }

    def matrix(self, stream: str, of: str) -> Float[Tensor, "b l s"]:
        return self._r[self._known(stream), self._known(of)]

    def self_attention(self, stream: str, weights: Float[Tensor, "b n n"]) -> None:
        """R_sq += A R_sq for every stream q, s itself included."""
        self._check(weights, stream, stream)
        self._add({(stream, q): weights @ self.matrix(stream, q) for q in self.sizes})

    def cross_attention(self, stream: str, other: str, weights: Float[Tensor, "b l s"]) -> None:
        """Queries of ``stream`` look at ``other``: R_sq += (normalised R_ss)^T A (normalised R_qq), R_ss += A R_qs."""
        self._add(self._crossed(stream, other, weights))

    def co_attention(
        self, stream: str, other: str, weights: Float[Tensor, "b l s"], back: Float[Tensor, "b s l"]
    ) -> None:
        """Two streams look at each other at the same time; ``back`` are the weights of ``other`` looking at ``stream``."""
        first, second = self._crossed(stream, other, weights), self._crossed(other, stream, back)
        self._add(first)
        self._add(second)

    def _crossed(self, s: str, q: str, weights: Tensor) -> dict[tuple[str, str], Tensor]:
        self._check(weights, s, q)
        through = _normalized(self.matrix(s, s)).transpose(-1, -2) @ weights @ _normalized(self.matrix(q, q))
        return {(s, q): through, (s, s): weights @ self.matrix(q, s)}

    def _add(self, additions: dict[tuple[str, str], Tensor]) -> None:
        self._r |= {pair: self._r[pair] + more for pair, more in additions.items()}

    def _known(self, stream: str) -> str:
        if stream not in self.sizes:
            raise ValueError(f"stream={stream!r} is not one of {', '.join(self.sizes)}")
        return stream

    def _check(self, weights: Tensor, s: str, q: str) -> None:
        expected = (self.sizes[self._known(s)], self.sizes[self._known(q)])
        if weights.ndim != 3 or tuple(weights.shape[1:]) != expected:
            raise ValueError(
                f"weights of {s} looking at {q} must be (b, {expected[0]}, {expected[1]}); got {tuple(weights.shape)}"
            )


def _normalized(own: Tensor) -> Tensor:
    """The identity plus R - I with rows that sum to one; a row without relevance of others has none (0 / 0 = 0)."""
    identity = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    gained = own - identity
    total = gained.sum(-1, keepdim=True)
    return torch.where(total > 0, gained / total.clamp_min(torch.finfo(own.dtype).tiny), 0.0) + identity


def gradient_weighted(call: Call) -> Float[Tensor, "b l s"]:
    """Mean over heads of the positive part of gradient times weights; zero where the score does not depend on the call."""
    weights = call.weights()
    if call.out_grad is None:
        return torch.zeros_like(weights[:, 0])
    return (call.weights_grad() * weights).clamp_min(0).mean(1)


def topology(
    calls: Sequence[Call], given: Mapping[str, Streams | Sequence[tuple[str, str]]] | None = None
) -> list[Step]:
    """Each call with the stream of its queries and the stream of its keys.

    Args:
        given: site pattern -> a stream, or (stream of queries, stream of keys), or a list of such pairs for a site that runs
            several times. Default: one stream ``"tokens"``, or ``"encoder"`` and ``"decoder"`` where one looks at the other.

    Raises:
        ValueError: a call that ``given`` does not cover, tokens that change their number within a stream, windows, a model
            that is neither one stream nor encoder and decoder.
    """
    named = _given(calls, given) if given is not None else _inferred(calls)
    sizes: dict[str, tuple[int, int]] = {}
    for call, query, key in named:
        if call.tokens_k is not None and call.tokens_k.segments[0].role == "window":
            raise ValueError(f"{call.site} attends in windows; relevance needs the same tokens in every layer")
        for stream, size in ((query, call.q.shape[2]), (key, call.k.shape[2])):
            known = sizes.setdefault(stream, (call.q.shape[0], size))
            if known != (call.q.shape[0], size):
                raise ValueError(
                    f"{call.site} sees {size} tokens of {stream!r} in {call.q.shape[0]} rows, an earlier call saw {known[1]} in "
                    f"{known[0]}: pooled or windowed tokens have no relevance; give topology= if these are several streams"
                )
    return named


def _given(calls: Sequence[Call], given: Mapping[str, Streams | Sequence[tuple[str, str]]]) -> list[Step]:
    found: list[Step] = []
    times: dict[str, int] = {}
    for call in calls:
        entry = next((streams for pattern, streams in given.items() if matches(call.site, "", pattern)), None)
        if entry is None:
            raise ValueError(f"topology= says nothing of {call.site}; it has {', '.join(given)}")
        if isinstance(entry, list):
            number = times.get(call.site, 0)
            times[call.site] = number + 1
            entry = entry[number % len(entry)]
        query, key = (entry, entry) if isinstance(entry, str) else entry
        found.append((call, query, key))
    return found


def _inferred(calls: Sequence[Call]) -> list[Step]:
    container = {call.site: re.split(r"\.\d+(?:\.|$)", call.site, maxsplit=1)[0] for call in calls}
    decoders = {container[call.site] for call in calls if _looks_away(call)}
    if not decoders:
        return [(call, "tokens", "tokens") for call in calls]
    names = {call.site: "decoder" if container[call.site] in decoders else "encoder" for call in calls}
    if "encoder" not in names.values():
        raise ValueError(
            f"{calls[-1].site} and the other sites are neither one stream nor encoder and decoder: say with topology= whose "
            "tokens look at whose"
        )
    return [(call, names[call.site], "encoder" if _looks_away(call) else names[call.site]) for call in calls]


def _looks_away(call: Call) -> bool:
    return call.kind == "cross" or call.q.shape[2] != call.k.shape[2]
