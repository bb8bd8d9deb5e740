"""Do layers do what the catalogue says of them? The survey's facets, and ours, beside what a probe measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regard.catalog.registry import get, method, methods
from regard.checks.declared import AGREES, CONTRADICTS, UNKNOWN, validate
from regard.ops.attend import softmax
from regard.studies.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# One layer or more for each kind of distribution, support, cost and state that is built.
TOY = (
    "cbam",
    "dynamic-convolution",
    "flatten",
    "hilo",
    "moba",
    "multi-query-attention",
    "nat",
    "normalized-attention",
    "rela",
    "slot-attention",
)


def local_weights(
    scores: Float[Tensor, "*r l s"], centre: Float[Tensor, "*r l"], half_width: int
) -> Float[Tensor, "*r l s"]:
    r"""Local attention: softmax over a window around a place among the keys, times a Gaussian about that place.

    .. math:: a_s = \mathrm{softmax}_{|s - p| \le D}(z)_s \; e^{-(s - p)^2 / 2 \sigma^2}, \qquad \sigma = D / 2

    The Gaussian comes after the softmax, so that rows sum to less than 1.

    Args:
        scores: z.
        centre: p, a real number for each query; one whose window holds no key has weights of zero.
        half_width: D, at least 1.

    Reference: Minh-Thang Luong, Hieu Pham, Christopher D. Manning, Effective Approaches to Attention-based Neural Machine
        Translation, EMNLP 2015, arXiv:1508.04025
    """
    if half_width < 1:
        raise ValueError(f"half_width={half_width} must be at least 1")
    if centre.shape != scores.shape[:-1]:
        raise ValueError(f"centre must be {tuple(scores.shape[:-1])}, one place a query; got {tuple(centre.shape)}")
    away = torch.arange(scores.shape[-1], device=scores.device) - centre[..., None]
    return softmax(scores, away.abs() <= half_width) * (-2 * (away / half_width).square()).exp()


def _over_queries(table: Table) -> list[str]:
    rows = table.where(facet="distribution")
    return [str(row["layer"]) for row in rows if "over queries" in str(row["measured"])]


@method("attention-survey", kind="study")
class AttentionSurvey:
    r"""Hold every layer to its facets: distribution, support, order, cost, state and others, measured on small instances.

    The survey tells models of attention apart by facets that do not depend on each other: how many sequences, levels,
    positions and representations there are, which function scores a pair and which makes weights of scores. Here they are
    measured, with those that this catalogue adds, as far as numbers tell them: sums of weights along both axes, exact
    zeros, which inputs an output has a gradient from, what permuting tokens does, how FLOPs and cached bytes grow. A facet
    for which a layer gives no hold is in the table with the reason.

    Example:
        >>> [row["measured"] for row in validate([get("rela")]) if row["facet"] == "cost"]
        ['FLOPs grow like N^1.79']

    Differs: the survey sorts published models by hand and measures none. Of its own facets sequences, levels, representations
        and alignment stay labels set by hand. Score functions are in ``regard.ops.scores``, distribution functions in
        ``regard.ops.normalizers``; an encoder-decoder with and without attention is compared in this paper's claim.

    Reference: Sneha Chaudhari, Varun Mithal, Gungor Polatkan, Rohan Ramanath, An Attentive Survey of Attention Models, ACM
        TIST 2021, arXiv:1904.02874
    """

    claims: dict[str, Callable[[Table], bool]] = {
        "no facet is contradicted": lambda t: CONTRADICTS not in t.column("verdict"),
        "four facets of five can be measured": lambda t: t.column("verdict").count(UNKNOWN) <= len(t) / 5,
        "slot attention normalises over the queries": lambda t: "slot-attention" in _over_queries(t),
    }

    def run(self, scale: Literal["toy", "full"] = "toy") -> Table:
        """A table of what is declared and measured by layer and facet.

        Args:
            scale: ``toy`` (ten layers, seconds) or ``full`` (all that are registered).
        """
        if scale not in ("toy", "full"):
            raise ValueError(f"scale={scale!r} must be 'toy' or 'full'")
        layers = [get(name) for name in TOY] if scale == "toy" else methods("layer")
        return Table.build("Facets of layers, declared and measured", validate(layers), self.claims)

    def finding(self, table: Table) -> str:
        """The table in one sentence."""
        count = Counter(table.column("verdict"))
        return (
            f"Of {len(table)} facets of {len(set(table.column('layer')))} layers, {count[AGREES]} agree with what is "
            f"measured, {count[CONTRADICTS]} contradict it and {count[UNKNOWN]} could not be measured."
        )

    def plot(self, table: Table) -> Figure:
        """Verdicts, one line a layer, one column a facet."""
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        layers, facets = (list(dict.fromkeys(table.column(name))) for name in ("layer", "facet"))
        colours = {AGREES: "tab:green", CONTRADICTS: "tab:red", UNKNOWN: "lightgrey"}
        verdicts = {(row["layer"], row["facet"]): list(colours).index(str(row["verdict"])) for row in table}
        grid = [[verdicts[layer, facet] for facet in facets] for layer in layers]
        figure = Figure(figsize=(7, 1.5 + 0.22 * len(layers)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(grid, cmap=ListedColormap(list(colours.values())), vmin=0, vmax=len(colours) - 1, aspect="auto")
        axes.set_xticks(range(len(facets)), facets, rotation=45, ha="right")
        axes.set_yticks(range(len(layers)), layers)
        figure.legend(
            handles=[Patch(color=c, label=name) for name, c in colours.items()], loc="outside upper right", ncols=3
        )
        return figure
