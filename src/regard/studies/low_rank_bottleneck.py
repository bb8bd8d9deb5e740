"""How large a head must be: what one head can fit, what its scores' rank is, and what that costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from regard.catalog.registry import method
from regard.studies.table import Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def effective_rank(logits: Float[Tensor, "*r n s"], tol: float = 1e-10) -> Int[Tensor, "*r"]:
    """How many singular values of each matrix exceed ``tol`` times its largest."""
    size = torch.linalg.svdvals(logits)
    return (size > tol * size[..., :1]).sum(-1)


def fit_pattern(
    n: int, dim: int, head_dim: int, seed: int = 0, *, spread: float = 3.0, steps: int = 1500, rate: float = 0.02
) -> tuple[float, int]:
    r"""Fit one head to a random pattern of attention; the mean KL divergence left, in nats, and the rank of its scores.

    The pattern is the softmax of normal logits, the tokens are normal and fixed; queries and keys are trained by Adam with a
    cosine schedule.

    Args:
        n: tokens.
        dim: channels of a token.
        head_dim: channels of the head.
        seed: of tokens, pattern and start.
        spread: standard deviation of the logits of the pattern.
        steps: of Adam.
        rate: learning rate.

    Raises:
        ValueError: sizes below 1.
    """
    if min(n, dim, head_dim, steps) < 1:
        raise ValueError(f"n={n}, dim={dim}, head_dim={head_dim} and steps={steps} must be at least 1")
    world = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(n, dim, generator=world), spread * torch.randn(n, n, generator=world)
    pattern = logits.softmax(-1)
    w = [(torch.randn(dim, head_dim, generator=world) * dim**-0.5).requires_grad_() for _ in range(2)]
    optimiser = torch.optim.Adam(w, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def divergence() -> tuple[Tensor, Tensor]:
        scores = (x @ w[0]) @ (x @ w[1]).T / head_dim**0.5
        return F.kl_div(scores.log_softmax(-1), pattern, reduction="batchmean"), scores

    for _ in range(steps):
        optimiser.zero_grad()
        divergence()[0].backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        left, scores = divergence()
    return left.item(), int(effective_rank(scores.double(), 1e-5))


def cost(dim: int, num_heads: int, head_dim: int, length: int) -> dict[str, Value]:
    """Parameters of one attention, and FLOPs a token in a sequence of ``length``."""
    width = num_heads * head_dim
    return {
        "dim": dim,
        "heads": num_heads,
        "head_dim": head_dim,
        "parameters": 4 * dim * width,
        "flops": 8 * dim * width + 4 * length * width,
    }


def sweep(heads: Sequence[int], head_dims: Sequence[int], dims: Sequence[int], length: int) -> Table:
    """The cost of every combination beside that of standard heads, and how wide a standard model of equal cost would be.

    ``rank`` is the largest that scores between ``length`` tokens can have; ``equal_dim`` is the width at which standard
    attention, 4 dim^2, has as many parameters: the fair comparison.
    """
    rows = []
    for dim in dims:
        for count in heads:
            if dim % count:
                raise ValueError(f"dims has {dim}, which is not a multiple of {count} in heads")
            sizes = {"standard": [dim // count], "fixed": list(head_dims)}
            for kind, size in ((kind, size) for kind, all_sizes in sizes.items() for size in all_sizes):
                row = cost(dim, count, size, length)
                equal = round((dim * count * size) ** 0.5)
                rows.append({"head size": kind, **row, "rank": min(size, length), "equal_dim": equal})
    return Table.build(f"Cost of attention over {length} tokens", rows)


def advise(dim: int, num_heads: int, max_length: int) -> Table:
    """Standard heads and heads as large as sequences are long, side by side; warns where the former are smaller.

    Raises:
        ValueError: sizes below 1, ``dim`` not a multiple of ``num_heads``.
    """
    if min(dim, num_heads, max_length) < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} must be a positive multiple of num_heads={num_heads}; max_length={max_length}")
    table = sweep([num_heads], [max_length], [dim], max_length)
    standard, fixed = table
    if dim // num_heads < max_length - 1:
        warnings.warn(
            f"head_dim={dim // num_heads} is below the {max_length - 1} that any pattern over max_length={max_length} tokens "
            f"may need; head_dim={max_length} takes {fixed['parameters']} parameters in place of {standard['parameters']}",
            stacklevel=2,
        )
    return table


@method("low-rank-bottleneck-study", kind="study", paper="low-rank-bottleneck")
class LowRankBottleneck:
    r"""Fit heads of several sizes to random patterns of attention: below the number of tokens something stays out of reach.

    .. math:: \min_{W^q, W^k} \; \mathrm{KL}\big(P \,\|\, \mathrm{softmax}(x W^q (x W^k)^\top / \sqrt{d_p})\big)

    Each row also has the attention's cost at that head size, for eight heads.

    Example:
        >>> table = LowRankBottleneck().run()
        >>> all(table.claims.values())
        True

    Differs: the paper proves which patterns can be represented and measures language models; fitting single heads is ours.
        That n - 1 channels suffice follows from softmax ignoring a constant in every row. Models with and without the
        bottleneck are trained in this paper's claim.

    Reference: Srinadh Bhojanapalli, Chulhee Yun, Ankit Singh Rawat, Sashank J. Reddi, Sanjiv Kumar, Low-Rank Bottleneck in
        Multi-head Attention Models, ICML 2020, arXiv:2002.07028
    """

    claims: dict[str, Callable[[Table], bool]] = {
        "the divergence falls with every larger head below n - 1": lambda t: all(
            a > b for a, b in zip(_below(t), _below(t)[1:])
        ),
        "a quarter of n channels leave 20 times what n channels leave": lambda t: (
            _left(t, _tokens(t) // 4) >= 20 * _left(t, _tokens(t))
        ),
        "n - 1 channels do as n do": lambda t: _left(t, _tokens(t) - 1) <= 3 * _left(t, _tokens(t)),
        "scores never have a rank above the head size": lambda t: all(
            rank <= size for rank, size in zip(t.column("rank"), t.column("head_dim"))
        ),
    }

    def run(self, scale: Literal["toy", "full"] = "toy", seed: int = 0) -> Table:
        """A table of divergence, rank and cost by head size.

        Args:
            scale: ``toy`` (16 tokens, seconds) or ``full`` (32 tokens, a minute).
            seed: of tokens, pattern and start.
        """
        if scale not in ("toy", "full"):
            raise ValueError(f"scale={scale!r} must be 'toy' or 'full'")
        n, steps = (16, 800) if scale == "toy" else (32, 1500)
        rows: list[dict[str, Value]] = []
        for head_dim in sorted({2, 4, n // 4, n // 2, n - 1, n, 2 * n}):
            left, rank = fit_pattern(n, 2 * n, head_dim, seed, steps=steps)
            rows.append({"tokens": n, "divergence": left, "rank": rank, **cost(2 * n, 8, head_dim, n)})
        return Table.build("One head fitted to random patterns", rows, self.claims)

    def finding(self, table: Table) -> str:
        """The table in one sentence."""
        n = _tokens(table)
        return (
            f"A head of {n // 4} channels is left {_left(table, n // 4):.2g} nats from a random pattern over {n} tokens, "
            f"one of {n} channels {_left(table, n):.2g}."
        )

    def plot(self, table: Table) -> Figure:
        """Divergence against the size of the head."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.loglog(table.column("head_dim"), table.column("divergence"), "o-", base=2)
        axes.axvline(_tokens(table), color="grey", linestyle="--", label="as many channels as tokens")
        axes.set(xlabel="channels of the head", ylabel="divergence, nats")
        axes.legend()
        return figure


def _tokens(table: Table) -> int:
    return table.column("tokens")[0]


def _left(table: Table, head_dim: int) -> float:
    return table.where(head_dim=head_dim).column("divergence")[0]


def _below(table: Table) -> list[float]:
    return [left for left, size in zip(table.column("divergence"), table.column("head_dim")) if size < _tokens(table)]
