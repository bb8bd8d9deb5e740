"""What the rank of query and key is worth: nearest neighbours on a sphere, one full-rank head against many of low rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.ops.attend import mix, scores
from regard.studies._panels import panels
from regard.studies.table import Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Vectors = Float[Tensor, "h d"]


def uniform(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Vectors drawn uniformly from the unit sphere of the last axis."""
    if shape[-1] < 2:
        raise ValueError(f"dim={shape[-1]} must be at least 2")
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def orthogonal(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Vectors at right angles to each other, the frame drawn uniformly: (..., n, d) with n at most d."""
    *_, n, d = shape
    if n > d:
        raise ValueError(f"{n} orthogonal points do not exist in dim={d}")
    # QR prefers no direction once the factor R has a positive diagonal.
    q, r = torch.linalg.qr(torch.randn(*shape[:-2], d, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).transpose(-1, -2)


def directions(count: int, dim: int, generator: torch.Generator) -> Vectors:
    """Unit vectors in orthogonal frames, each frame drawn uniformly: more evenly spread than independent ones."""
    return orthogonal(-(-count // dim), dim, dim, generator=generator).flatten(0, 1)[:count]


def doubled(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Half of the points, and their opposites: (..., n, d) with n even."""
    *batch, n, d = shape
    if n % 2:
        raise ValueError(f"{n} points cannot be opposites in pairs: the number must be even")
    x = uniform(*batch, n // 2, d, generator=generator)
    return torch.cat([x, -x], -2)


def _at_least_two(x: Tensor) -> None:
    if x.shape[-2] < 2:
        raise ValueError(f"x has {x.shape[-2]} points; expected at least 2")


def nearest(x: Float[Tensor, "b n d"], y: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
    """The target: for each query the point with the largest product, of equals the first."""
    _at_least_two(x)
    return x.gather(1, (y @ x.mT).argmax(-1, keepdim=True).expand(-1, -1, x.shape[-1]))


def farthest(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The target where the points are themselves the queries; the nearest to a point would be the point."""
    return nearest(x, -x)


def error(got: Float[Tensor, "*n d"], target: Float[Tensor, "*n d"]) -> float:
    """Mean squared distance, as a share of the squared length of a target, which is 1."""
    return (got - target).square().sum(-1).mean().item()


class RankHeads(nn.Module):
    r"""Heads whose queries and keys have ``rank`` channels, each with a full output matrix of its own.

    .. math:: f(X, y) = \sum_h M_h X\, \mathrm{softmax}(X^\top K_h^\top Q_h y / \sqrt r), \qquad
        Q_h, K_h \in \mathbb R^{r \times d}, \; M_h \in \mathbb R^{d \times d}

    M stands for value and output projections of any rank: low rank is a property of the scores alone.
    Shape: points (b, n, dim), queries (b, l, dim) -> (b, l, dim).
    """

    def __init__(self, dim: int, num_heads: int, rank: int) -> None:
        super().__init__()
        if dim < 2 or num_heads < 1 or not 1 <= rank <= dim:
            raise ValueError(f"dim={dim} must be at least 2, num_heads={num_heads} positive, rank={rank} in 1..{dim}")
        inner, outer = math.sqrt(6 / (rank + dim)), math.sqrt(6 / (num_heads * dim + dim))
        self.q, self.k = (nn.Parameter(torch.empty(num_heads, rank, dim).uniform_(-inner, inner)) for _ in range(2))
        self.out = nn.Parameter(torch.empty(num_heads, dim, dim).uniform_(-outer, outer))

    def weights(self, scores: Float[Tensor, "b h l n"]) -> Float[Tensor, "b h l n"]:
        return scores.softmax(-1)

    def heads(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b l d"]) -> Float[Tensor, "b h l d"]:
        """What each head attends to, before its output matrix."""
        _at_least_two(x)
        q, k = (torch.einsum("bnd,hrd->bhnr", part, w) for part, w in ((y, self.q), (x, self.k)))
        return mix(self.weights(scores(q, k)), x[:, None])

    def forward(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return torch.einsum("bhld,hed->ble", self.heads(x, y), self.out)


class HardHeads(RankHeads):
    """:class:`RankHeads` that look at the point with the largest score alone."""

    def weights(self, scores: Float[Tensor, "b h l n"]) -> Float[Tensor, "b h l n"]:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)

    @classmethod
    def weighted(cls, q: Float[Tensor, "h r d"], k: Float[Tensor, "h r d"], a: Float[Tensor, "h"]) -> HardHeads:
        """The sum of given heads with one number each for output matrix. ``q = k = I, a = 1`` solves the task exactly."""
        made = cls(q.shape[2], q.shape[0], q.shape[1]).to(q.dtype)
        made.q.data, made.k.data = q, k
        made.out.data = a[:, None, None] * torch.eye(q.shape[2], dtype=q.dtype)
        return made


def head_products(q: Vectors, k: Vectors) -> Float[Tensor, "h h"]:
    r"""Expected product of what two hard heads of rank 1 give, for two points and unit q, k, exactly:

    .. math:: C_{gh} = \tfrac12 + \tfrac2{\pi^2} \arcsin(q_g \cdot q_h) \arcsin(k_g \cdot k_h)
    """
    angle_q, angle_k = ((v @ v.T).clamp(-1, 1).asin() for v in (q, k))
    return 0.5 + 2 / math.pi**2 * angle_q * angle_k


def target_products(q: Vectors, k: Vectors, terms: int = 400) -> Float[Tensor, "h"]:
    r"""Expected product of what a hard head of rank 1 gives and the nearest of two points, unit q and k.

    .. math:: b = \tfrac12 + \tfrac12 \sum_{l\;odd} N_l \lambda_l^3 P_l(q \cdot k), \qquad
        \lambda_1 = \frac{\Gamma(d/2)}{\sqrt\pi\, \Gamma((d+1)/2)}, \quad \lambda_{l+2} = -\frac{l}{l + d} \lambda_l

    P are the Gegenbauer polynomials with P(1) = 1, N the number of harmonics of their degree, :math:`\lambda` the coefficients
    of the sign. In two dimensions, with angle t, the sum is :math:`\pm(\frac12 - 2 (\min(t, \pi - t) / \pi)^2)`.

    Args:
        terms: odd degrees in the sum.
    """
    d = q.shape[1]
    cosine = (q * k).sum(-1).clamp(-1, 1)
    if d == 2:
        away = cosine.abs().acos() / math.pi
        return 0.5 + cosine.sign() * (0.25 - away.square())
    sign = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    total, before, polynomial = torch.zeros_like(cosine), torch.ones_like(cosine), cosine
    for l in range(1, 2 * terms):
        if l % 2:
            harmonics = (2 * l + d - 2) / l * math.comb(l + d - 3, l - 1)
            total = total + harmonics * sign**3 * polynomial
            sign *= -l / (l + d)
        before, polynomial = polynomial, ((2 * l + d - 2) * cosine * polynomial - l * before) / (l + d - 2)
    return 0.5 + total / 2


def optimal_weights(gram: Float[Tensor, "h h"], moment: Float[Tensor, "h"]) -> tuple[Float[Tensor, "h"], float]:
    r"""The numbers a that minimise :math:`1 - 2 b \cdot a + a^\top C a`, and that error.

    Raises:
        ValueError: heads so nearly alike that the condition number of C exceeds 1e12.
    """
    gram, moment = gram.double(), moment.double()
    values = torch.linalg.eigvalsh(gram)
    if not values[0] * 1e12 >= values[-1]:
        raise ValueError(f"heads are nearly alike: eigenvalues from {values[0]:.1e} to {values[-1]:.1e}, allowed 1e12")
    a = torch.cholesky_solve(moment[:, None], torch.linalg.cholesky(gram))[:, 0]
    return a, (1 - 2 * moment @ a + a @ gram @ a).item()


def measured_weights(heads: Float[Tensor, "b h l d"], target: Float[Tensor, "b l d"]) -> tuple[Tensor, float]:
    """:func:`optimal_weights` of heads of any rank, their products averaged over what they gave."""
    count = target[..., 0].numel()
    gram = torch.einsum("bgld,bhld->gh", heads, heads) / count
    return optimal_weights(gram, torch.einsum("bhld,bld->h", heads, target) / count)


def vote(x: Float[Tensor, "b n d"], y: Float[Tensor, "b l d"], directions: Vectors) -> Float[Tensor, "b l d"]:
    r"""The nearest point by majorities: two layers of heads of rank 1, a first that compares and a second that counts.

    A direction w prefers point i to j if :math:`w \cdot y` and :math:`w \cdot (x_i - x_j)` have one sign; for a random one
    that is right with probability 1 - t / pi, where t is the angle, at most a right one, between y and the line of i and j.
    The point that wins most of its duels is taken.
    """
    _at_least_two(x)
    asked, apart = (y @ directions.T).sign(), x @ directions.T
    duels = torch.einsum("blh,bijh->blij", asked, (apart[:, :, None] - apart[:, None]).sign())
    winner = (duels > 0).sum(-1).argmax(-1, keepdim=True)
    return x.gather(1, winner.expand(-1, -1, x.shape[-1]))


def heads_needed(dim: int, most_error: float, *, limit: int = 2048, seed: int = 0) -> int | None:
    """How many random heads of rank 1 (a power of two) bring the error of two points down to ``most_error``, weighted best.

    None where ``limit`` heads do not. A head of full rank needs no company.
    """
    if not most_error > 0:
        raise ValueError(f"most_error={most_error} must be positive")
    for count in (2**i for i in range(limit.bit_length())):
        generator = torch.Generator().manual_seed(seed)
        q, k = (directions(count, dim, generator) for _ in range(2))
        if optimal_weights(head_products(q, k), target_products(q, k))[1] <= most_error:
            return count
    return None


ONE, HALF, MEAN = "full rank", "rank d/2, complementary", "mean of the points"
ALIKE, APART, VOTE = "rank 1, q = k", "rank 1, q and k apart", "two layers of rank 1"


def measure(dim: int, multiples: tuple[int, ...], seeds: int, samples: int) -> list[dict[str, Value]]:
    """Errors for two points: exact for one layer of heads of rank 1, otherwise on ``samples`` unseen draws."""
    generator = torch.Generator().manual_seed(dim)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        x, y = (uniform(samples, n, dim, generator=generator) for n in (2, 1))
        return x, y, nearest(x, y)

    x, y, label = draw()
    frame = orthogonal(dim, dim, generator=generator)
    one, two = (HardHeads.weighted(w, w, torch.ones(len(w)).double()) for w in (frame[None], frame.view(2, -1, dim)))
    two = HardHeads.weighted(two.q, two.k, measured_weights(two.heads(x, y), label)[0])
    x, y, label = draw()
    found = [(ONE, dim, 1, error(one(x, y), label)), (HALF, dim // 2, 2, error(two(x, y), label))]
    found.append((MEAN, 0, 0, error(x.mean(1, keepdim=True), label)))
    for heads in (m * dim for m in multiples):
        errors: dict[str, list[float]] = {ALIKE: [], APART: [], VOTE: []}
        for _ in range(seeds):
            q, k = (directions(heads, dim, generator) for _ in range(2))
            errors[ALIKE].append(optimal_weights(head_products(q, q), target_products(q, q))[1])
            errors[APART].append(optimal_weights(head_products(q, k), target_products(q, k))[1])
            won = torch.cat([vote(*part, q) for part in zip(x.split(500), y.split(500))])
            errors[VOTE].append(error(won, label))
        found += [(name, 1, heads, sum(values) / seeds) for name, values in errors.items()]
    return [{"model": name, "dim": dim, "rank": r, "heads": h, "error": e} for name, r, h, e in found]


def _at(table: Table, model: str, multiple: int) -> list[float]:
    return [row["error"] for row in table.where(model=model) if row["heads"] == multiple * row["dim"]]  # type: ignore


@method("attention-rank", kind="study")
class AttentionRank:
    r"""Measure how many low-rank heads make up for one of full rank, on the nearest of two points on a sphere.

    One head of full rank finds the point nearest to a query, exactly. A head of rank 1 compares along one direction only; the
    best weighted sum of many that compare and ask along the same direction soon stops improving, at an error that grows with
    the dimension. A second layer, that counts votes in place of adding points, goes on improving.

    Example:
        >>> table = AttentionRank().run()
        >>> all(table.claims.values())
        True

    Differs: errors are exact for two points only. Coefficients of the sign come from a recurrence, not from quadrature, and
        directions in orthogonal frames. Heads whose query and key differ do improve, slowly: they are in the table, without a
        claim. The lower bounds of the theorems have constants that say nothing at these sizes, and the target with a bias is
        left out. Trained heads and transformers are in this paper's claim.

    Reference: Noah Amsel, Gilad Yehudai, Joan Bruna, On the Benefits of Rank in Attention Layers, 2024, arXiv:2407.16153
    """

    claims: dict[str, Callable[[Table], bool]] = {
        "one head of full rank is exact": lambda t: max(t.where(model=ONE).column("error")) <= 1e-6,
        "16 d heads of rank 1, q = k, stay above 0.25, and higher the more dimensions": lambda t: (
            min(_at(t, ALIKE, 16)) > 0.25 and sorted(set(_at(t, ALIKE, 16))) == _at(t, ALIKE, 16)
        ),
        "four times as many improve by less than 0.02": lambda t: all(
            few - many < 0.02 for few, many in zip(_at(t, ALIKE, 4), _at(t, ALIKE, 16))
        ),
        "votes of 64 d heads in two layers have less than half the error": lambda t: all(
            two < one / 2 for two, one in zip(_at(t, VOTE, 64), _at(t, ALIKE, 64))
        ),
    }

    def run(self, scale: Literal["toy", "full"] = "toy") -> Table:
        """A table of errors by model, dimension, rank and number of heads; ``toy`` takes seconds, ``full`` a few minutes."""
        if scale not in ("toy", "full"):
            raise ValueError(f"scale={scale!r} must be 'toy' or 'full'")
        dims, multiples, seeds, samples = (
            ((4, 8, 16), (4, 16, 64), 2, 3000) if scale == "toy" else ((4, 8, 16, 32), (1, 4, 16, 64), 10, 20_000)
        )
        rows = [row for dim in dims for row in measure(dim, multiples, seeds, samples)]
        return Table.build("Error of the nearest of two points", rows, self.claims)

    def finding(self, table: Table) -> str:
        """The table in one sentence."""
        d = max(table.column("dim"))
        one, two = (_at(table.where(dim=d), model, 64)[0] for model in (ALIKE, VOTE))
        return (
            f"In {d} dimensions one head of rank {d} has error {table.where(dim=d, model=ONE).column('error')[0]:.2g}, "
            f"{64 * d} heads of rank 1 have {one:.2f} in one layer and {two:.2f} in two."
        )

    def plot(self, table: Table) -> Figure:
        """Error against the number of heads."""
        return panels(table, panel="dim", series="model", x="heads", y="error")
