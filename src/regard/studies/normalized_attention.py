"""Softmax, standardized weights, sum and maximum as pooling in one and the same block: how large is what tokens gather?"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import linear_regression
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.layers.sequence.normalized_attention import NormalizedAttention
from regard.nn import Attention
from regard.nn.blocks import MLP
from regard.ops import normalizers
from regard.ops.attend import attend
from regard.studies.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN, FIRST = 64, 50


class HiddenSoftmax(Attention):
    """Softmax attention whose heads pass through layer norm and GELU, as those of :class:`NormalizedAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.out = nn.Sequential(nn.LayerNorm(dim, eps=1e-3), nn.GELU("tanh"), self.out)  # type: ignore[assignment]


class RawScores(Attention):
    """Attention without a normalizer: the scaled scores are the weights, divided by the root of the number of keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.out = nn.Sequential(nn.GELU("tanh"), self.out)  # type: ignore[assignment]

    def normalize(self, scores: Float[Tensor, "b h l s"], mask: Tensor | None) -> Float[Tensor, "b h l s"]:
        return normalizers.identity(scores, mask) / math.sqrt(scores.shape[-1])


class SumPooling(nn.Module):
    """What all visible tokens add up to, one vector for all: (b, n, c) -> (b, 1, c)."""

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None) -> Float[Tensor, "b 1 c"]:
        return (x if mask is None else x.masked_fill(~mask[..., None], 0.0)).sum(1, keepdim=True)


class MaxPooling(nn.Module):
    """The largest value of each channel among the visible tokens, one vector for all: (b, n, c) -> (b, 1, c)."""

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None) -> Float[Tensor, "b 1 c"]:
        return (x if mask is None else x.masked_fill(~mask[..., None], -1e9)).amax(1, keepdim=True)


class NormalizedBlock(nn.Module):
    r"""The paper's transformer block: a norm on what each sublayer gives, before it is added, and one inside the MLP.

    .. math:: x' = x + \mathrm{LN}(\mathrm{pool}(x)), \qquad
        y = x' + \mathrm{LN}\big(W_2\, \mathrm{GELU}(\mathrm{LN}(W_1 x'))\big)

    Args:
        dim: channels.
        pooling: how tokens gather: an attention, or :class:`SumPooling` or :class:`MaxPooling`, for which the hidden
            layer is widened until the block has about as many parameters as one with attention.
    """

    def __init__(self, dim: int, pooling: nn.Module) -> None:
        super().__init__()
        hidden = 4 * dim if isinstance(pooling, Attention) else round((12 * dim + 8) / (2 * dim + 1) * dim)
        self.pooling, self.norm = pooling, nn.LayerNorm(dim, eps=1e-3)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.LayerNorm(hidden, eps=1e-3), nn.GELU("tanh"), nn.Linear(hidden, dim)
        )
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-3)

    def gathered(self, x: Float[Tensor, "b n c"], mask: Tensor | None = None) -> Float[Tensor, "b m c"]:
        """What is added to the tokens."""
        return self.norm(self.pooling(x, mask=mask))

    def forward(self, x: Float[Tensor, "b n c"], mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
        x = x + self.gathered(x, mask)
        return x + self.mlp_norm(self.mlp(x))


class BertBlock(nn.Module):
    """Softmax attention in the block that the paper departs from: a norm of each sum."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.pooling, self.norm = Attention(dim, num_heads), nn.LayerNorm(dim, eps=1e-3)
        self.mlp, self.mlp_norm = MLP(dim, 4 * dim, approximate="tanh"), nn.LayerNorm(dim, eps=1e-3)

    def gathered(self, x: Float[Tensor, "b n c"], mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
        """What is added to the tokens."""
        return self.pooling(x, mask=mask)

    def forward(self, x: Float[Tensor, "b n c"], mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
        x = self.norm(x + self.gathered(x, mask))
        return self.mlp_norm(x + self.mlp(x))


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "normalized": lambda dim, heads: NormalizedBlock(dim, NormalizedAttention(dim, heads)),
    "softmax": lambda dim, heads: NormalizedBlock(dim, HiddenSoftmax(dim, heads)),
    "none": lambda dim, heads: NormalizedBlock(dim, RawScores(dim, heads)),
    "sum": lambda dim, heads: NormalizedBlock(dim, SumPooling()),
    "max": lambda dim, heads: NormalizedBlock(dim, MaxPooling()),
    "bert": BertBlock,
}


def initialise(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Matrices and embeddings from normal numbers cut off at two deviations, biases at zero, as the paper starts."""
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    return model


def mode(count: int, length: int, generator: torch.Generator, vocabulary: int = 10) -> tuple[Tensor, Tensor]:
    """Random tokens (count, length), and the one that comes most often, the smallest of equals."""
    tokens = torch.randint(vocabulary, (count, length), generator=generator)
    often = F.one_hot(tokens, vocabulary).sum(1)
    return tokens, (often * vocabulary - torch.arange(vocabulary)).argmax(1)


def cases(
    count: int, length: int, generator: torch.Generator, vocabulary: int = 100
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b"], Int[Tensor, "b"]]:
    """Random tokens, the position to point at, and which case it is.

    Case 0: token 64 is there, point at the smallest token; 1: token 50 is, but not 64, point at the first; 2: at the
    largest. Of equals the first.
    """
    if vocabulary <= MIN:
        raise ValueError(f"vocabulary={vocabulary} must be above {MIN}, the token that asks for the smallest")
    tokens = torch.randint(vocabulary, (count, length), generator=generator)
    place = torch.arange(length)
    smallest, largest = (tokens * length + place).argmin(1), (tokens * length - place).argmax(1)
    case = torch.where((tokens == MIN).any(1), 0, torch.where((tokens == FIRST).any(1), 1, 2))
    return tokens, torch.stack([smallest, torch.zeros_like(smallest), largest]).gather(0, case[None])[0], case


def slope(tokens: list[int], sizes: list[float]) -> float:
    """The exponent with which sizes grow with the number of tokens."""
    return linear_regression([math.log(n) for n in tokens], [math.log(size) for size in sizes]).slope


def _exponent(table: Table, block: str, column: str) -> float:
    rows = table.where(block=block)
    return slope(rows.column("tokens"), rows.column(column))


@method("normalized-attention-geometry", kind="study", paper="normalized-attention")
class NormalizedAttentionGeometry:
    r"""How the size of what a token gathers depends on the number of tokens, before any training.

    Of normal random queries, keys and values of width 64: the deviation of weights times values (``aggregate``), and the
    same after the norm that follows in the block (``hidden``). Of a whole block of width 64 with 4 heads, as the paper
    initialises it, on normal random tokens: the length of what is added to a token over that of the token (``ratio``).
    Where it vanishes with the number of tokens, each token is left to itself.

    .. math:: \mathrm{size} \sim n^{slope}

    Example:
        >>> table = NormalizedAttentionGeometry().run()
        >>> all(table.claims.values())
        True

    Differs: the official script looks at the aggregates alone, and takes the normed sum of the values for normalized
        attention. What the blocks learn is compared in this paper's claim.

    Reference: Oliver Richter, Roger Wattenhofer, Normalized Attention Without Probability Cage, 2020, arXiv:2005.09561.
    """

    claims: dict[str, Callable[[Table], bool]] = {
        "what softmax gathers shrinks like the root of the number of tokens, slope -0.55 to -0.40": lambda t: (
            -0.55 <= _exponent(t, "bert", "aggregate") <= -0.40
        ),
        "what normalized attention gathers grows like it, slope 0.48 to 0.52": lambda t: (
            abs(_exponent(t, "normalized", "aggregate") - 0.5) <= 0.02
        ),
        "after its norm it does not depend on the number of tokens, slope -0.02 to 0.02": lambda t: (
            abs(_exponent(t, "normalized", "hidden")) <= 0.02
        ),
        "nor does what its block adds to a token, slope -0.02 to 0.02": lambda t: (
            abs(_exponent(t, "normalized", "ratio")) <= 0.02
        ),
        "what the softmax block of BERT adds shrinks, slope -0.55 to -0.40": lambda t: (
            -0.55 <= _exponent(t, "bert", "ratio") <= -0.40
        ),
    }

    @torch.no_grad()
    def run(self, scale: Literal["toy", "full"] = "toy", seed: int = 0) -> Table:
        """A table of sizes by block and number of tokens.

        Args:
            scale: ``toy`` (up to 512 tokens, 16,384 in all for each row) or ``full`` (up to 2,048 and four times as many).
            seed: of all numbers.
        """
        if scale not in ("toy", "full"):
            raise ValueError(f"scale={scale!r} must be 'toy' or 'full'")
        lengths, total = ([8, 32, 128, 512], 2**14) if scale == "toy" else ([8, 32, 128, 512, 2048], 2**16)
        torch.manual_seed(seed)
        rows: list[dict[str, bool | int | float | str]] = []
        for name in ("normalized", "softmax", "bert"):
            block = initialise(BLOCKS[name](64, 4))
            for n in lengths:
                q, k, v = (torch.randn(total // n, 1, n, 64) for _ in range(3))
                out = attend(q, k, v)
                if name == "normalized":
                    out = normalizers.standardize(q @ k.transpose(-1, -2)) @ v
                hidden = out if name == "bert" else F.layer_norm(out, (64,), eps=1e-3)
                x = torch.randn(total // n, n, 64)
                added = block.gathered(x).norm(dim=-1) / x.norm(dim=-1)  # type: ignore[operator]
                sizes = {"aggregate": out.std(), "hidden": hidden.std(), "ratio": added.mean()}
                rows.append({"block": name, "tokens": n, **{key: value.item() for key, value in sizes.items()}})
        return Table.build("Size of what a token gathers", rows, self.claims)

    def finding(self, table: Table) -> str:
        """The table in one sentence."""
        ours, theirs = (_exponent(table, block, "ratio") for block in ("normalized", "bert"))
        return (
            f"What a block adds to a token grows with the number of tokens n like n^{ours:.2f} under normalized attention "
            f"and like n^{theirs:.2f} under BERT's softmax."
        )

    def plot(self, table: Table) -> Figure:
        """Three sizes against the number of tokens, one curve a block."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3), layout="constrained")
        for axes, size in zip(figure.subplots(1, 3), ("aggregate", "hidden", "ratio")):
            for block in dict.fromkeys(table.column("block")):
                rows = table.where(block=block)
                axes.loglog(rows.column("tokens"), rows.column(size), "o-", base=2, label=block)
            axes.set(title=size, xlabel="tokens")
        figure.axes[0].legend()
        return figure
