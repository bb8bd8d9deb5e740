"""Relevance through self-, cross- and co-attention: gradient-weighted attention, added up layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.catalog.registry import method
from regard.core.call import Call
from regard.core.capture import Capture
from regard.core.explain import readout
from regard.core.known import knowledge, matches
from regard.core.tokens import Rows

Looks = str | tuple[str, str] | list[tuple[str, str]]
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
        self._identity = {s: torch.eye(n, dtype=dtype, device=device) for s, n in self.sizes.items()}
        # What a matrix has above its start: 1 + 1e-6 in float32 would leave little of the 1e-6, which is normalised later.
        self._gained = {
            (s, q): torch.zeros(1, n, m, dtype=dtype, device=device)
            for s, n in self.sizes.items()
            for q, m in self.sizes.items()
        }

    def matrix(self, stream: str, of: str) -> Float[Tensor, "b l s"]:
        gained = self._gained[self._known(stream), self._known(of)]
        return gained + self._identity[stream] if stream == of else gained

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
        through = self._normalized(s).transpose(-1, -2) @ weights @ self._normalized(q)
        return {(s, q): through, (s, s): weights @ self.matrix(q, s)}

    def _add(self, additions: dict[tuple[str, str], Tensor]) -> None:
        self._gained |= {pair: self._gained[pair] + more for pair, more in additions.items()}

    def _normalized(self, stream: str) -> Tensor:
        """The identity plus R - I with rows that sum to one; a row without relevance of others has none (0 / 0 = 0)."""
        gained = self._gained[stream, stream]
        total = gained.sum(-1, keepdim=True)
        shares = torch.where(total > 0, gained / total.clamp_min(torch.finfo(gained.dtype).tiny), 0.0)
        return shares + self._identity[stream]

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


def gradient_weighted(call: Call) -> Float[Tensor, "b l s"]:
    """Mean over heads of the positive part of gradient times weights; zero where the score does not depend on the call."""
    weights = call.weights()
    if call.out_grad is None:
        return torch.zeros_like(weights[:, 0])
    return (call.weights_grad() * weights).clamp_min(0).mean(1)


def topology(evidence: Capture, given: Mapping[str, Looks] | None = None) -> list[Step]:
    """Each call in running order with the stream of its queries and the stream of its keys.

    Args:
        given: site pattern -> a stream, or (stream of queries, stream of keys), or a list of such pairs for a site that runs
            several times. Default: one stream ``"tokens"``; or ``"decoder"`` and the ``"encoder"`` that it looks at, which is
            ``"context"`` where its tokens come from outside.

    Raises:
        ValueError: a call that ``given`` does not cover, tokens that change their number within a stream, windows.
    """
    steps = _inferred(evidence) if given is None else _given(evidence.sequence(), given)
    sizes: dict[str, tuple[int, int]] = {}
    for call, query, key in steps:
        b = call.q.shape[0]
        if call.tokens_k is not None and call.tokens_k.segments[0].role == "window":
            raise ValueError(f"{call.site} attends in windows; relevance needs the same tokens in every layer")
        for stream, size in ((query, call.q.shape[2]), (key, call.k.shape[2])):
            if sizes.setdefault(stream, (b, size)) != (b, size):
                raise ValueError(
                    f"{call.site} has {size} tokens of stream {stream!r} in {b} rows, where an earlier call had "
                    f"{sizes[stream][1]} in {sizes[stream][0]}: relevance cannot follow tokens that are pooled or windowed; "
                    "if these are several streams, name them with topology="
                )
    return steps


def _given(calls: Sequence[Call], given: Mapping[str, Looks]) -> list[Step]:
    steps: list[Step] = []
    times: dict[str, int] = {}
    for call in calls:
        entry = next((streams for pattern, streams in given.items() if matches(call.site, "", pattern)), None)
        if entry is None:
            raise ValueError(f"topology={dict(given)} says nothing of {call.site}")
        if isinstance(entry, list):
            number = times[call.site] = times.get(call.site, -1) + 1
            entry = entry[number % len(entry)]
        steps.append((call, entry, entry) if isinstance(entry, str) else (call, *entry))
    return steps


def _inferred(evidence: Capture) -> list[Step]:
    """A list of blocks of which some look elsewhere is the decoder; what it looks at is the rest, or comes from outside."""
    known = knowledge(evidence.model).sites
    calls = evidence.sequence()
    away = [call for call in calls if known[call.site].kind == "cross" or call.q.shape[2] != call.k.shape[2]]
    decoders = {_block(call.site)[0] for call in away}
    twice = [block for block, count in Counter(_block(call.site) for call in away).items() if count > 1]
    if twice:
        raise ValueError(
            f"{'.'.join(twice[0])} looks at other tokens more than once: say with topology= who looks at whom"
        )
    names = {call.site: "decoder" if _block(call.site)[0] in decoders else "encoder" for call in calls}
    if not away:
        return [(call, "tokens", "tokens") for call in calls]
    source = "encoder" if "encoder" in names.values() else "context"
    return [(call, names[call.site], source if call in away else names[call.site]) for call in calls]


def _block(site: str) -> tuple[str, str]:
    """The list of blocks in which a site stands, and which of them."""
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", site)
    return (found[1], found[2]) if found else (site, "")


@method("generic-attribution", kind="explainer")
class GenericAttribution:
    r"""Relevance of input tokens for one output, through any mix of self-, cross- and co-attention.

    Every stream of tokens (text, image, decoder queries) has a relevance matrix for itself, beginning as the identity, and
    one for each other stream, beginning at zero. Layers are walked in running order; each adds its attention, weighted by the
    positive part of the score's gradient, times what is known so far. Needs neither relevance rules for the other
    operators nor a changed model: weights and gradients come from the fused forward.

    .. math::
        \bar A &= \mathbb{E}_h\big[(\nabla A \odot A)^+\big] \\
        \text{self:}\quad R^{sq} &\mathrel{+}= \bar A R^{sq}, \qquad R^{ss} \mathrel{+}= \bar A R^{ss} \\
        \text{cross:}\quad R^{sq} &\mathrel{+}= (\bar R^{ss})^\top \bar A \bar R^{qq}, \qquad
            R^{ss} \mathrel{+}= \bar A R^{qs}, \qquad \bar R = I + (R - I) / \textstyle\sum_j (R - I)_{ij}

    Args:
        start_layer: attention calls before this one are left out; negative counts from the end, -1 keeps the last.
        token: rows that are read, see :func:`regard.core.explain.readout`: the query of a detector, the end token of a text;
            default the class token, or the last token of a causal stream.
        stream: whose row is read; default the stream whose queries ran last.
        of: whose tokens are explained; default the stream that ran first, the encoder's in an encoder-decoder.
        topology: who looks at whom, where it is neither one stream nor encoder and decoder; see :func:`topology`. A
            co-attention module that runs once in each direction takes a list of both:
            ``{"*.language.*": "text", "*.vision.*": "image", "*.both.*": [("text", "image"), ("image", "text")]}``.

    Shape: one relevance a token, (b, n), not negative; on the grid of the image where there is one.

    Raises:
        ValueError: no gradient reaches any weights, windows or pooled tokens, an unknown stream, no row to read.

    Cost: one forward and one backward pass and 2 L n^3; weights and gradients of one layer at a time, b h n^2.

    Example:
        >>> from regard import explain, tokens
        >>> from regard.nn import Attention
        >>> model = torch.nn.Sequential(Attention(8, 2), torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> relevance = explain(model, torch.randn(1, 6, 8), "generic-attribution", target=2, token=slice(None))
        >>> relevance.values.shape, bool((relevance.values >= 0).all())
        (torch.Size([1, 6]), True)

    Differs: where one row is read, its relevance to itself is set to zero, as the released code does for the class
        token of text. A row without relevance of others is normalised to zero; the released code divides by zero there. A
        call that the score does not depend on adds nothing. Matrices are not rescaled between layers, so they grow
        with depth in deep decoders.

    Reference: Hila Chefer, Shir Gur, Lior Wolf, Generic Attention-model Explainability for Interpreting Bi-Modal and
        Encoder-Decoder Transformers, ICCV 2021, arXiv:2103.15679
    """

    needs = frozenset({"weights", "weights_grad"})
    where = ("self", "cross", "joint", "pool")
    claims = frozenset({"non-negative"})

    def __init__(
        self,
        *,
        start_layer: int = 0,
        token: Rows | Bool[Tensor, "b n"] | None = None,
        stream: str | None = None,
        of: str | None = None,
        topology: Mapping[str, Looks] | None = None,
    ) -> None:
        self.start_layer, self.token, self.stream, self.of, self.topology = start_layer, token, stream, of, topology

    def explain(self, evidence: Capture) -> Float[Tensor, "b n"]:
        everything = topology(evidence, self.topology)
        steps = everything[self.start_layer :]
        if not steps:
            raise ValueError(f"start_layer={self.start_layer} leaves none of {len(everything)} attention calls")
        if all(call.out_grad is None for call, _, _ in steps):
            raise ValueError(
                "no gradient reached the weights of any site: the score must depend on them, with gradients on"
            )
        relevance = propagate(steps)
        stream, of = self.stream or steps[-1][1], self.of or everything[0][2]
        matrix = relevance.matrix(stream, of)
        call = next(
            c for own in (True, False) for c, q, k in reversed(everything) if q == stream and (k == q or not own)
        )
        share = readout(call, self.token).to(matrix)
        found = torch.einsum("bl,bls->bs", share, matrix.expand(len(share), -1, -1))
        return found.masked_fill(share == 1, 0.0) if stream == of else found


def propagate(steps: Sequence[Step]) -> RelevancePropagation:
    """Relevance after the calls of :func:`topology`, which must have their gradients."""
    sizes = {k: c.k.shape[2] for c, _, k in steps} | {q: c.q.shape[2] for c, q, _ in steps}
    q = steps[0][0].q
    relevance = RelevancePropagation(sizes, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    index = 0
    while index < len(steps):
        call, query, key = steps[index]
        after = steps[index + 1] if index + 1 < len(steps) else None
        weights = gradient_weighted(call)
        if query == key:
            relevance.self_attention(query, weights)
        elif after is not None and after[0].site == call.site and after[1:] == (key, query):
            relevance.co_attention(query, key, weights, gradient_weighted(after[0]))
            index += 1
        else:
            relevance.cross_attention(query, key, weights)
        index += 1
    return relevance
