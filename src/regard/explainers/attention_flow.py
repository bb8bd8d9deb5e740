"""Attention rollout and attention flow: how much of each input token reaches a token some layers above it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.catalog.registry import method
from regard.core.call import Call
from regard.core.capture import Capture
from regard.core.explain import readout
from regard.core.tokens import Rows

if TYPE_CHECKING:
    import networkx

SCALE = 1 << 30
PAIRS = 10_000


def mixing(attn: Sequence[Float[Tensor, "b h n n"]], residual: float = 0.5) -> list[Float[Tensor, "b n n"]]:
    """One row-stochastic matrix a layer: heads averaged, the residual stream added as the identity.

    Rows are divided by their sums; a query that looks at nothing keeps itself, as the residual stream does.

    Raises:
        ValueError: no layers, a tensor that is not (b, h, n, n), another size than the layer before, weights that are
            negative or not finite, rows that do not sum to one, a residual outside [0, 1].
    """
    if not attn:
        raise ValueError("attn is empty: expected the weights of one layer or more")
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual={residual} must be in [0, 1]")
    layers = []
    for index, weights in enumerate(attn):
        if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2]:
            raise ValueError(f"attn[{index}] must be (b, h, n, n); got {tuple(weights.shape)}")
        if (weights.shape[0], weights.shape[-1]) != (attn[0].shape[0], attn[0].shape[-1]):
            raise ValueError(
                f"attn[{index}] has {weights.shape[-1]} tokens in {weights.shape[0]} items, attn[0] has "
                f"{attn[0].shape[-1]} in {attn[0].shape[0]}: tokens that are pooled or windowed on the way have no rollout"
            )
        exact = torch.promote_types(weights.dtype, torch.float32)
        rounding = 1e-3 if weights.dtype == exact else 3e-2
        weights = weights.to(exact)
        if not bool((weights >= 0).all() & weights.isfinite().all()):
            raise ValueError(f"attn[{index}] holds negative weights, infinity or NaN")
        sums = weights.sum(-1)
        if bool(((sums - 1).abs() > rounding).logical_and(sums > 0).any()):
            raise ValueError(
                f"attn[{index}] has rows that sum to {sums.min():.4g} up to {sums.max():.4g}, expected 1 (or 0 for a "
                "masked row): pass weights after softmax, or divide the rows by their sums"
            )
        identity = torch.eye(weights.shape[-1], dtype=exact, device=weights.device)
        mean = torch.where(sums[..., None] > 0, weights, identity).mean(1)
        mixed = (1 - residual) * mean + residual * identity
        layers.append(mixed / mixed.sum(-1, keepdim=True))
    return layers


def attention_rollout(attn: Sequence[Float[Tensor, "b h n n"]], residual: float = 0.5) -> Float[Tensor, "b n n"]:
    """Row i holds the share of every input token in token i above the last layer of ``attn``; rows sum to one.

    Slices give the rest: ``attn[:3]`` the share above the third layer, ``attn[1:]`` what begins at the second.
    ``residual=0`` leaves the residual stream out. Raises ValueError as :func:`mixing`.
    """
    return reduce(lambda below, layer: layer @ below, mixing(attn, residual))


def attention_flow(
    attn: Sequence[Float[Tensor, "b h n n"]],
    targets: Sequence[int] | None = None,
    sources: Sequence[int] | None = None,
    residual: float = 0.5,
    normalize: bool = True,
) -> Float[Tensor, "b t s"]:
    """Largest flow from each token of ``targets``, above the last layer, down to each input token of ``sources``.

    Args:
        targets: tokens whose inputs are asked for; default all. Each pair is a problem of its own.
        sources: input tokens; default all.
        residual: weight of the residual stream.
        normalize: divide each row by its sum.

    Raises:
        ValueError: as :func:`mixing`.
    """
    layers = mixing(attn, residual)
    everything = range(layers[0].shape[-1])
    targets, sources = (
        list(everything if targets is None else targets),
        list(everything if sources is None else sources),
    )
    if len(targets) * len(sources) > PAIRS:
        warnings.warn(
            f"{len(targets)} x {len(sources)} maximum flows on {(len(layers) + 1) * len(everything)} nodes take long: ask for "
            "fewer with targets= and sources=",
            stacklevel=2,
        )
    graphs = [AttentionGraph([layer[item] for layer in layers]) for item in range(len(layers[0]))]
    flows = torch.tensor(
        [[[graph.flow(t, s) for s in sources] for t in targets] for graph in graphs],
        dtype=layers[0].dtype,
        device=layers[0].device,
    )
    return flows / flows.sum(-1, keepdim=True).clamp_min(1e-12) if normalize else flows


def encoder_decoder(
    encoder: Sequence[Float[Tensor, "b h s s"]],
    decoder: Sequence[Float[Tensor, "b h l l"]],
    cross: Sequence[Float[Tensor, "b h l s"]],
) -> list[Float[Tensor, "b 1 n n"]]:
    """The weights of an encoder-decoder as layers over its s + l tokens, encoder first, for the functions above.

    A layer that leaves a token alone looks from that token at itself. Raises ValueError where ``decoder`` and ``cross``
    differ in number or are empty.
    """
    if not encoder or not decoder or len(decoder) != len(cross):
        raise ValueError(f"decoder and cross must have one entry a layer; got {len(decoder)} and {len(cross)}")
    b, s, n = encoder[0].shape[0], cross[0].shape[-1], sum(cross[0].shape[-2:])
    steps = [(slice(s), slice(s), w) for w in encoder]
    for own, other in zip(decoder, cross, strict=True):
        steps += [(slice(s, n), slice(s, n), own), (slice(s, n), slice(s), other)]
    layers = []
    for rows, columns, weights in steps:
        weights = weights.mean(1, keepdim=True)
        layer = torch.eye(n, dtype=weights.dtype, device=weights.device).repeat(b, 1, 1, 1)
        layer[..., rows, :] = 0
        layer[..., rows, columns] = weights
        layers.append(layer)
    return layers


class AttentionGraph:
    """Tokens of every depth as nodes ``(depth, position)``, an edge from each to every token it reads one layer below.

    ``layers`` are (n, n) matrices, the lowest first; their entries are the capacities. Depth 0 is the input.
    """

    def __init__(self, layers: Sequence[Float[Tensor, "n n"]]) -> None:
        self.layers = [layer.detach().double().cpu() for layer in layers]
        self.depth, self.size = len(layers), layers[0].shape[-1]
        self._capacities: Any = None

    def adjacency(self) -> Float[Tensor, "m m"]:
        """Capacities between all (depth + 1) n nodes; node (l, i) is number l n + i."""
        full = torch.zeros((self.depth + 1) * self.size, (self.depth + 1) * self.size, dtype=torch.float64)
        for depth, layer in enumerate(self.layers, 1):
            full[depth * self.size : (depth + 1) * self.size, (depth - 1) * self.size : depth * self.size] = layer
        return full

    def to_networkx(self) -> networkx.DiGraph:
        from networkx import DiGraph

        graph = DiGraph()
        graph.add_nodes_from((depth, i) for depth in range(self.depth + 1) for i in range(self.size))
        for depth, layer in enumerate(self.layers, 1):
            for i, j in layer.nonzero().tolist():
                graph.add_edge((depth, i), (depth - 1, j), capacity=float(layer[i, j]))
        return graph

    def flow(self, target: int, source: int) -> float:
        """Value of the maximum flow from ``target`` at the top to input token ``source``, exact for capacities in 2^-30."""
        import numpy as np
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        for name, token in (("target", target), ("source", source)):
            if not -self.size <= token < self.size:
                raise ValueError(f"{name}={token} is outside 0..{self.size - 1}")
        if self._capacities is None:
            entries = [layer.nonzero() for layer in self.layers]
            ends = torch.cat([e + torch.tensor([d + 1, d]) * self.size for d, e in enumerate(entries)])
            values = torch.cat([layer[tuple(e.T)] for layer, e in zip(self.layers, entries, strict=True)])
            numbers = (values * SCALE).round().int().numpy()
            nodes = (self.depth + 1) * self.size
            rows, columns = ends.int().numpy().T
            self._capacities = csr_array((numbers, (rows, columns)), shape=(nodes, nodes), dtype=np.int32)
        top = self.depth * self.size + target % self.size
        return float(maximum_flow(self._capacities, top, source % self.size).flow_value) / SCALE


class _Reads:
    """What the two explainers share: the weights of all layers, and the row that is read."""

    needs = frozenset({"weights"})
    claims = frozenset({"non-negative", "uniform"})

    def __init__(
        self, *, start_layer: int = 0, residual: float = 0.5, token: Rows | Bool[Tensor, "b n"] | None = None
    ) -> None:
        self.start_layer, self.residual, self.token = start_layer, residual, token

    def read(self, evidence: Capture) -> tuple[list[Tensor], Tensor]:
        """Weights (b, h, n, n) of the layers from ``start_layer`` on, and the shares (b, n) of the rows that are read."""
        calls: list[Call] = evidence.sequence()[self.start_layer :]
        if not calls:
            raise ValueError(
                f"start_layer={self.start_layer} leaves none of {len(evidence.sequence())} attention calls"
            )
        for call in calls:
            same = call.q.shape[0] == calls[0].q.shape[0] and call.q.shape[2] == call.k.shape[2] == calls[0].q.shape[2]
            windows = call.tokens_k is not None and call.tokens_k.segments[0].role == "window"
            if windows or not same:
                raise ValueError(
                    f"{call.site} attends in windows or among other tokens than {calls[0].site}: a rollout needs the same "
                    "tokens in every layer"
                )
        return [call.weights() for call in calls], readout(calls[-1], self.token)


@method("attention-flow-rollout", kind="explainer", paper="attention-flow")
class AttentionRollout(_Reads):
    r"""Multiplies the attention of all layers, residual stream included, and reads the row of the class token.

    .. math:: R_l = A_l R_{l-1}, \qquad A_l = \tfrac12 \bar W_l + \tfrac12 I
    """

    def explain(self, evidence: Capture) -> Float[Tensor, "b n"]:
        attn, share = self.read(evidence)
        rollout = attention_rollout(attn, self.residual)
        return torch.einsum("bl,bls->bs", share.to(rollout.dtype), rollout)


@method("attention-flow", kind="explainer")
class AttentionFlow(_Reads):
    r"""Relevance of input tokens as the largest flow from the output token to each of them through the attention weights.

    Layers of tokens are a directed graph; an edge runs from each token down to every token that it reads one layer below,
    with the weight (mean over heads, residual stream added) as its capacity. A rollout,
    ``"attention-flow-rollout"``, sums over all paths the products of their weights; a flow takes the most that the edges
    let through together, so a path counts as much as its narrowest edge. It is never below the rollout. Both describe what
    the weights allow, for no class in particular.

    .. math::
        A_l = \tfrac12 \bar W_l + \tfrac12 I, \qquad
        F_{ij} = \max_f \Big\{ \sum_k f_{(L,i)\to(L-1,k)} \;:\; 0 \le f_{(l,p)\to(l-1,q)} \le (A_l)_{pq},\
        f \text{ conserved except at } (L,i) \text{ and } (0,j) \Big\}

    Args:
        start_layer: layers before this one are left out; negative counts from the end.
        residual: weight of the residual stream, 0.5 in the paper.
        token: rows that are read, see :func:`regard.core.explain.readout`; default the class token, the last token of a
            causal model, or the mean over an image without class token. The paper's text classifier takes the largest value
            of each column instead, ``attention_flow(weights).amax(1)``.

    Shape: weights (b, h, n, n) of each layer -> (b, n); on the grid of the image where there is one.

    Raises:
        ValueError: no layers left, layers with other tokens (windows, pooling), no row to read.

    Cost: n maximum flows on (L + 1) n nodes and L n^2 edges for each row that is read, on the CPU; a rollout costs L n^3.

    Example:
        >>> looks_back = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2)
        >>> attention_rollout([looks_back, looks_back])[0, 1]
        tensor([0.4375, 0.5625])
        >>> attention_flow([looks_back, looks_back], normalize=False)[0, 1]
        tensor([0.5000, 0.7500])

    Differs: capacities are rounded to multiples of 2^-30, so that the solver works on integers. Rows that look at
        nothing (padding) count as identity rows, which equals cutting the padding away. An encoder-decoder goes through
        :func:`encoder_decoder` and the functions; the explainer reads one stream. Other ways to fuse heads than the mean, and
        dropping the smallest weights, are later additions of others and left out.

    Reference: Samira Abnar, Willem Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, arXiv:2005.00928
    """

    def explain(self, evidence: Capture) -> Float[Tensor, "b n"]:
        attn, share = self.read(evidence)
        found = torch.zeros_like(share)
        for item, row in enumerate(share):
            read = row.nonzero()[:, 0]
            flows = attention_flow([w[item : item + 1] for w in attn], targets=read.tolist(), residual=self.residual)
            found[item] = row[read] @ flows[0].to(row.dtype)
        return found
