"""What one attention layer learns when its queries and keys are random and only its values are fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.ops import normalizers
from regard.ops.attend import softmax
from regard.studies._panels import panels
from regard.studies.table import Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Query = Float[Tensor, "b d"]
Keys = Float[Tensor, "b n d"]
Mask = Bool[Tensor, "b n"]


def extend(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
    """With a last channel of ones, the place of a bias."""
    return F.pad(x, (0, 1), value=1.0)


class RandomFeatureAttention(nn.Module):
    r"""Attention heads with frozen random query-key matrices, read out by fitted values.

    .. math:: f(x) = \sum_m \frac1N \sum_i \mathrm{relu}(\tilde x_0^\top W_m \tilde x_i) \, v_m^\top \tilde x_i, \qquad
        W_m = \begin{pmatrix} c I & 0 \\ 0 & 0 \end{pmatrix} + Z, \quad Z \sim N(0, \tfrac14), \quad \tilde x = [x; 1]

    Args:
        dim: channels of the query and of a key.
        num_heads: random matrices.
        shift: c; with it heads look at keys like the query from the start (the "biased" layer).
        generator: of the matrices.

    Shape: query (b, dim), keys (b, n, dim) -> (b, num_heads * (dim + 1)) features, linear in which is the output. ``mask``
        (b, n) is True where a key is there.

    Raises:
        ValueError: sizes that are not positive, a batch without keys, widths that do not fit.
    """

    w: Tensor

    def __init__(
        self, dim: int, num_heads: int, *, shift: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1:
            raise ValueError(f"dim={dim} and num_heads={num_heads} must be positive")
        noise = 0.5 * torch.randn(num_heads, dim + 1, dim + 1, generator=generator, dtype=torch.float64)
        self.register_buffer("w", noise + shift * torch.eye(dim + 1).double().index_fill(0, torch.tensor(dim), 0.0))
        self.dim = dim

    def weights(self, scores: Float[Tensor, "b m n"], mask: Mask | None) -> Float[Tensor, "b m n"]:
        """Rectified, over the number of keys: no softmax, and no sum of one."""
        count = scores.shape[-1] if mask is None else mask.sum(-1)[:, None, None]
        return normalizers.relu(scores, None if mask is None else mask[:, None]) / count

    def forward(self, query: Query, keys: Keys, mask: Mask | None = None) -> Float[Tensor, "b f"]:
        b, n = keys.shape[:2]
        if query.shape != (b, self.dim) or keys.shape != (b, n, self.dim):
            raise ValueError(f"dim={self.dim} does not fit query {tuple(query.shape)} and keys {tuple(keys.shape)}")
        if mask is not None and mask.shape != (b, n):
            raise ValueError(f"mask must be {(b, n)}, as the keys; got {tuple(mask.shape)}")
        if n == 0 or (mask is not None and not mask.any(-1).all()):
            raise ValueError(f"every row needs a key; keys are {tuple(keys.shape)}")
        query, keys = extend(query), extend(keys)
        scores = torch.einsum("bp,mpq,bnq->bmn", query, self.w.to(query.dtype), keys)
        return (self.weights(scores, mask) @ keys).flatten(1)


class RandomSoftmaxAttention(RandomFeatureAttention):
    """:class:`RandomFeatureAttention` with softmax for ReLU: outside of the theory."""

    def weights(self, scores: Float[Tensor, "b m n"], mask: Mask | None) -> Float[Tensor, "b m n"]:
        return softmax(scores, None if mask is None else mask[:, None])


class RandomFeatureMLP(nn.Module):
    r"""The comparison: random ReLU features of query and keys side by side, :math:`\mathrm{relu}(W [x_0; \dots; x_n; 1])`.

    Shape: query (b, dim), keys (b, num_keys, dim) -> (b, width). Their number and order are fixed.
    """

    w: Tensor

    def __init__(self, dim: int, num_keys: int, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if min(dim, num_keys, width) < 1:
            raise ValueError(f"dim={dim}, num_keys={num_keys} and width={width} must be positive")
        inputs = (num_keys + 1) * dim + 1
        self.register_buffer("w", torch.randn(width, inputs, generator=generator, dtype=torch.float64) / inputs**0.5)

    def forward(self, query: Query, keys: Keys) -> Float[Tensor, "b f"]:
        x = extend(torch.cat([query[:, None], keys], 1).flatten(1))
        if x.shape[1] != self.w.shape[1]:
            raise ValueError(f"query and keys have {x.shape[1] - 1} channels together; expected {self.w.shape[1] - 1}")
        return (x @ self.w.to(x.dtype).T).relu()


def attention_kernel(query: Query, keys: Keys, other_query: Query, other_keys: Keys) -> Float[Tensor, "b p"]:
    r"""The product of the features of two inputs over the number of heads, for infinitely many heads without shift.

    .. math:: k = \frac1{N N'} \sum_{ij} \frac{|A_i||B_j|}{8 \pi} (\sin t_{ij} + (\pi - t_{ij}) \cos t_{ij}) \,
        \tilde x_i \cdot \tilde x'_j, \qquad A_i = \tilde x_0 \tilde x_i^\top, \; B_j = \tilde x'_0 \tilde x_j'^\top

    with t the angle between A and B.
    """
    q, k, p, l = extend(query), extend(keys), extend(other_query), extend(other_keys)
    products = torch.einsum("bnd,cmd->bcnm", k, l)
    long_a, long_b = (x.norm(dim=-1)[:, None] * y.norm(dim=-1) for x, y in ((q, k), (p, l)))
    length = long_a[:, None, :, None] * long_b[None, :, None]
    angle = ((q @ p.T)[..., None, None] * products / length).clamp(-1, 1).acos()
    return (length / (8 * math.pi) * (angle.sin() + (math.pi - angle) * angle.cos()) * products).mean((2, 3))


class KernelRidge:
    r"""Least squares with a penalty, from the products of the features, all penalties at one price.

    .. math:: \alpha = (K + \lambda I)^{-1} y

    The coefficients of features :math:`\Phi` are :math:`\Phi^\top \alpha`, whose squared length is :math:`\alpha^\top K \alpha`.

    Args:
        gram: K = ΦΦᵀ of the training inputs, (n, n), in float64.
    """

    def __init__(self, gram: Float[Tensor, "n n"]) -> None:
        if len(gram) < 2 or gram.dtype != torch.float64:
            raise ValueError(f"gram must be of two samples at least, in float64; got {tuple(gram.shape)}, {gram.dtype}")
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.cutoff = len(gram) * torch.finfo(gram.dtype).eps * self.values[-1]

    def solve(self, y: Float[Tensor, "n"], ridge: float) -> Float[Tensor, "n"]:
        """Alpha; with ``ridge`` 0 the interpolation of least norm, by pseudo-inverse."""
        if ridge < 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        along = self.vectors.T @ y
        kept = self.values > self.cutoff if ridge == 0 else torch.ones_like(self.values, dtype=torch.bool)
        return self.vectors @ torch.where(kept, along / torch.where(kept, self.values.clamp(min=0) + ridge, 1.0), 0.0)

    def within(self, y: Float[Tensor, "n"], radius: float) -> Float[Tensor, "n"]:
        """Alpha of the least error among coefficients no longer than ``radius``."""
        if radius <= 0:
            raise ValueError(f"radius={radius} must be positive")

        def length(alpha: Tensor) -> float:
            return ((self.vectors.T @ alpha).square() * self.values.clamp(min=0)).sum().sqrt().item()

        if length(self.solve(y, 0.0)) <= radius:
            return self.solve(y, 0.0)
        # No coefficients are longer than |y| times the root of the largest eigenvalue over the ridge.
        low, high = float(self.cutoff), float(y.norm() * self.values[-1].sqrt()) / radius
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if length(self.solve(y, middle)) > radius else (low, middle)
        return self.solve(y, high)


# Of the correlation of query and key, and of what a key has along one direction; the target is the mean over the keys.
TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "keys alone": lambda correlation, along: along.relu(),
    "correlation squared": lambda correlation, along: correlation.square(),
    "correlation cubed": lambda correlation, along: correlation.pow(3),
    "correlation times key": lambda correlation, along: correlation * along,
}
PLAIN, SHIFTED, MLP = "attention", "attention, shifted", "mlp"
DIM, HEADS, SHIFT, TESTED = 12, 300, 4.0, 1000
RIDGES = tuple(10.0**e for e in range(-8, 3))


def inputs(count: int, num_keys: int, generator: torch.Generator, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """A query and keys, independent and uniform on the unit sphere: (count, dim), (count, num_keys, dim)."""
    if num_keys < 1:
        raise ValueError(f"num_keys={num_keys} must be at least 1")
    x = F.normalize(torch.randn(count, num_keys + 1, dim, generator=generator, dtype=torch.float64), dim=-1)
    return x[:, 0], x[:, 1:]


def layers(num_keys: int, generator: torch.Generator, shift: float = SHIFT) -> dict[str, nn.Module]:
    """The models of the study, all with one number of features."""
    return {
        PLAIN: RandomFeatureAttention(DIM, HEADS, generator=generator),
        SHIFTED: RandomFeatureAttention(DIM, HEADS, shift=shift, generator=generator),
        MLP: RandomFeatureMLP(DIM, num_keys, HEADS * (DIM + 1), generator=generator),
    }


def compare(
    models: Mapping[str, nn.Module],
    num_keys: int,
    samples: Sequence[int],
    generator: torch.Generator,
    targets: Sequence[str] = tuple(TARGETS),
) -> list[dict[str, Value]]:
    """Test error over the variance of the target, by target, model and number of training samples.

    The ridge is the best of a grid on validation samples of their own.
    """
    beta = F.normalize(torch.randn(DIM, generator=generator, dtype=torch.float64), dim=0)
    count = max(samples)
    query, keys = inputs(count + 2 * TESTED, num_keys, generator)
    correlation = torch.einsum("bd,bnd->bn", query, keys)
    labels = {name: TARGETS[name](correlation, keys @ beta).mean(-1) for name in targets}
    rows: list[dict[str, Value]] = []
    for model, made in models.items():
        seen, unseen = made(query, keys).split([count, 2 * TESTED])
        gram, cross = seen @ seen.T / HEADS, unseen @ seen.T / HEADS
        for n in samples:
            fit = KernelRidge(gram[:n, :n])
            for target, y in labels.items():
                center, unknown = y[:n].mean(), y[count:]
                tried = torch.stack([cross[:, :n] @ fit.solve(y[:n] - center, r) + center for r in RIDGES])
                squares = (tried - unknown).square()
                best = squares[:, :TESTED].mean(1).argmin()
                error = (squares[best, TESTED:].mean() / unknown[TESTED:].var()).item()
                rows.append({"target": target, "keys": num_keys, "model": model, "samples": n, "error": error})
    return rows


def _most(table: Table, target: str, model: str) -> float:
    """The error with most samples."""
    return table.where(target=target, model=model, samples=max(table.column("samples"))).column("error")[0]


@method("random-feature-attention-study", kind="study")
class RandomFeatureAttentionStudy:
    r"""Compare a random-feature attention layer, plain and shifted, with random features of the whole input.

    With queries and keys frozen the layer is linear in its values, so that fitting it is a convex problem. It learns averages
    over keys of a function of query and key, from a number of samples that does not grow with the number of keys; that of a
    perceptron does. A multiple of the identity added to the random matrices makes functions of the correlation of
    query and key easier, of even degree above all, and functions of the keys alone harder.

    Example:
        >>> table = RandomFeatureAttentionStudy().run()
        >>> all(table.claims.values())
        True

    Differs: the norm is penalised, or bounded, as a whole; the paper's second constraint, on the sum of the heads' norms, is left
        out. The shift is 4, the same for all targets; the paper has no figure for it. The matrices of the perceptron have
        unit variance before the ReLU, which is what the ridge sees of their scale.

    Reference: Hengyu Fu, Tianyu Guo, Yu Bai, Song Mei, What can a Single Attention Layer Learn? A Study Through the Random
        Features Lens, NeurIPS 2023, arXiv:2307.11353
    """

    claims: dict[str, Callable[[Table], bool]] = {
        "averages of the keys: attention has at most 0.4 of the error of the mlp": lambda t: (
            _most(t, "keys alone", PLAIN) <= 0.4 * _most(t, "keys alone", MLP)
        ),
        "correlations squared: only the shifted attention learns": lambda t: (
            _most(t, "correlation squared", SHIFTED) <= 0.6
            and min(_most(t, "correlation squared", model) for model in (PLAIN, MLP)) >= 0.9
        ),
        "correlations cubed: attention learns, the mlp does not": lambda t: (
            _most(t, "correlation cubed", PLAIN) <= 0.7 and _most(t, "correlation cubed", MLP) >= 0.9
        ),
        "averages of the keys: the shift hurts": lambda t: (
            _most(t, "keys alone", SHIFTED) > 2 * _most(t, "keys alone", PLAIN)
        ),
    }

    def run(self, scale: Literal["toy", "full"] = "toy") -> Table:
        """A table of errors by target, model and samples; ``toy`` takes seconds, ``full`` (three draws) some minutes."""
        if scale not in ("toy", "full"):
            raise ValueError(f"scale={scale!r} must be 'toy' or 'full'")
        samples, seeds = ((200, 800), 1) if scale == "toy" else ((200, 800, 2000), 3)
        worlds = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        draws = [compare(layers(8, world), 8, samples, world) for world in worlds]
        means = [fmean(float(row["error"]) for row in same) for same in zip(*draws)]
        rows = [{**row, "error": mean} for row, mean in zip(draws[0], means)]
        return Table.build("Test error over the variance of the target", rows, self.claims)

    def finding(self, table: Table) -> str:
        """The table in one sentence."""
        keys, squared = (
            [f"{_most(table, target, model):.2f}" for model in (PLAIN, SHIFTED, MLP)]
            for target in ("keys alone", "correlation squared")
        )
        return (
            f"With {max(table.column('samples'))} samples random attention has {keys[0]} of the variance left on averages "
            f"of the keys (shifted {keys[1]}, mlp {keys[2]}), and {squared[0]} on squared correlations (shifted "
            f"{squared[1]}, mlp {squared[2]})."
        )

    def plot(self, table: Table) -> Figure:
        """Error against the number of training samples."""
        return panels(table, panel="target", series="model", x="samples", y="error")
