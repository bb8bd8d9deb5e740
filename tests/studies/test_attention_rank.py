"""Heads of low rank against loops, their exact products against quadrature and sampling, and the study."""

import math
from functools import partial

import pytest
import torch
from scipy.integrate import quad
from scipy.special import gegenbauer
from torch import Tensor

from regard.studies import attention_rank as study
from regard.studies.attention_rank import AttentionRank, HardHeads, RankHeads, nearest, uniform
from regard.studies.table import Table


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def two_points(count: int, dim: int) -> tuple[Tensor, Tensor]:
    return uniform(count, 2, dim), uniform(count, 1, dim)


def within(samples: Tensor, expected: float) -> None:
    """The mean of the samples is within three standard errors."""
    off = (samples.mean() - expected).abs() * math.sqrt(len(samples)) / samples.std()
    assert off <= 3, f"{off:.1f} standard errors from {expected}"


@pytest.mark.parametrize("kind", [RankHeads, HardHeads])
def test_equals_loops(kind: type[RankHeads]) -> None:
    model, x, y = kind(5, 3, 2).double(), normal(2, 4, 5), normal(2, 6, 5)
    out = model(x, y)
    for b in range(2):
        for l in range(6):
            total = torch.zeros(5, dtype=torch.float64)
            for q, k, m in zip(model.q, model.k, model.out):
                scores = torch.stack([(k @ point) @ (q @ y[b, l]) for point in x[b]]) / math.sqrt(2)
                weights = scores.exp() / scores.exp().sum()
                if kind is HardHeads:
                    weights = torch.zeros(4, dtype=torch.float64).index_fill(0, scores.argmax(), 1.0)
                total = total + m @ sum(w * point for w, point in zip(weights, x[b]))
            torch.testing.assert_close(out[b, l], total, atol=1e-12, rtol=1e-12)


def test_start() -> None:
    model = RankHeads(16, 5, 4)
    for weight, bound in ((model.q, math.sqrt(6 / 20)), (model.k, math.sqrt(6 / 20)), (model.out, math.sqrt(6 / 96))):
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("points", [2, 5, 33])
@pytest.mark.parametrize("dim", [2, 6])
def test_one_head_of_full_rank_is_exact(points: int, dim: int) -> None:
    x, y = uniform(500, points, dim), uniform(500, 3, dim)
    eye = torch.eye(dim, dtype=torch.float64)[None]
    exact = HardHeads.weighted(eye, eye, torch.ones(1, dtype=torch.float64))
    assert study.error(exact(x, y), nearest(x, y)) < 1e-8
    soft, errors = RankHeads(dim, 1, dim).double(), []
    for beta in (10.0, 1e3, 1e6):
        soft.q.data, soft.k.data, soft.out.data = beta * eye, eye, eye
        errors.append(study.error(soft(x, y), nearest(x, y)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_a_head_of_rank_one_takes_the_largest_or_the_smallest() -> None:
    x, q, k = uniform(1, 7, 3), uniform(1, 1, 3), uniform(1, 1, 3)
    head = HardHeads.weighted(q, k, torch.ones(1, dtype=torch.float64))
    along = (x @ k[0, 0])[0]
    assert torch.equal(head(x, q), x[:, along.argmax()][:, None])
    assert torch.equal(head(x, -q), x[:, along.argmin()][:, None])


def test_ties_go_to_the_first() -> None:
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64) + 0.0
    y = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    assert torch.equal(nearest(x, y), x[:, [0, 1]])


def test_targets() -> None:
    x, y = uniform(3, 5, 4), uniform(3, 2, 4)
    for b in range(3):
        for l in range(2):
            distances = (x[b] - y[b, l]).norm(dim=-1)
            assert torch.equal(nearest(x, y)[b, l], x[b, distances.argmin()])
        for n in range(5):
            assert torch.equal(study.farthest(x)[b, n], x[b, (x[b] - x[b, n]).norm(dim=-1).argmax()])
    assert torch.equal(nearest(x, x), x), "the nearest of a point among themselves is the point"


def test_points() -> None:
    x = uniform(20_000, 3)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(20_000, dtype=torch.float64))
    torch.testing.assert_close(x.T @ x / 20_000, torch.eye(3, dtype=torch.float64) / 3, atol=0.01, rtol=0)
    frame = study.orthogonal(4000, 3, 4)
    torch.testing.assert_close(frame @ frame.mT, torch.eye(3, dtype=torch.float64).expand(4000, 3, 3))
    assert frame.mean(0).abs().max() < 0.04, "QR left its signs"
    pairs = study.doubled(2, 6, 4)
    assert torch.equal(pairs[:, 3:], -pairs[:, :3])
    spread = study.directions(7, 3, torch.Generator().manual_seed(0))
    assert spread.shape == (7, 3)
    torch.testing.assert_close(spread[:3] @ spread[:3].T, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_products_are_those_of_samples(dim: int) -> None:
    x, y = two_points(1_000_000, dim)
    label = nearest(x, y)[:, 0]
    q, k = uniform(3, dim), uniform(3, dim)
    k[0], k[1] = q[0], -q[1]
    chosen = [
        torch.where(((x[:, 0] - x[:, 1]) @ b * (y[:, 0] @ a) > 0)[:, None], x[:, 0], x[:, 1]) for a, b in zip(q, k)
    ]
    gram, moment = study.head_products(q, k), study.target_products(q, k)
    for g in range(3):
        within((chosen[g] * label).sum(-1), moment[g].item())
        for h in range(g):
            within((chosen[g] * chosen[h]).sum(-1), gram[g, h].item())
        assert gram[g, g].item() == pytest.approx(1, abs=1e-7)


FACTORS = (
    lambda raw, one, t: raw(t) / one,
    lambda raw, one, t: 2 / math.pi * math.asin(t) * raw(t) / one,
    lambda raw, one, t: (raw(t) / one) ** 2,
)


@pytest.mark.parametrize("dim", [3, 4, 9])
def test_target_products_are_those_of_quadrature(dim: int) -> None:
    def mean(f) -> float:
        """Over one coordinate of a uniform unit vector."""
        weight = lambda t: (1 - t * t) ** ((dim - 3) / 2)  # noqa: E731
        return quad(lambda t: f(t) * weight(t), 0, 1, limit=500)[0] / quad(weight, 0, 1)[0]

    q = torch.eye(dim, dtype=torch.float64)[:1].expand(5, -1)
    cosine = torch.tensor([-0.9, -0.3, 0.0, 0.5, 0.8], dtype=torch.float64)
    k = torch.zeros(5, dim, dtype=torch.float64)
    k[:, 0], k[:, 1] = cosine, (1 - cosine.square()).sqrt()
    want = torch.full((5,), 0.5, dtype=torch.float64)
    for l in range(1, 40, 2):
        raw = gegenbauer(l, dim / 2 - 1)
        one = raw(1.0)
        # The products are even where the degree is odd, so half of the interval is enough.
        sign, arcsine, square = (mean(partial(f, raw, one)) for f in FACTORS)
        want += 0.5 * sign * arcsine / square * torch.tensor([raw(t) / one for t in cosine.tolist()])
    torch.testing.assert_close(study.target_products(q, k, terms=20), want, atol=1e-7, rtol=0)
    torch.testing.assert_close(study.target_products(q, k), want, atol={3: 1e-4, 4: 3e-5, 9: 1e-7}[dim], rtol=0)


def test_two_dimensions_have_a_closed_form() -> None:
    turn = torch.linspace(0, math.pi, 13, dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(13, -1)
    found = study.target_products(q, torch.stack([turn.cos(), turn.sin()], -1))
    fourier = sum((2 / (math.pi * l)) ** 3 * (-1) ** (l // 2) * (l * turn).cos() for l in range(1, 4001, 2))
    torch.testing.assert_close(found, 0.5 + fourier, atol=1e-7, rtol=0)
    assert found[0].item() == pytest.approx(0.75)
    assert found[6].item() == pytest.approx(0.5)


@pytest.mark.parametrize("dim", [2, 4])
def test_predicted_error_is_that_of_the_heads(dim: int) -> None:
    q, k = uniform(12, dim), uniform(12, dim)
    a, predicted = study.optimal_weights(study.head_products(q, k), study.target_products(q, k))
    model = HardHeads.weighted(q[:, None], k[:, None], a)
    x, y = two_points(400_000, dim)
    within((model(x, y) - nearest(x, y))[:, 0].square().sum(-1), predicted)
    for i in (0, 7):
        moved = a.clone()
        moved[i] += 0.1
        other = 1 - 2 * study.target_products(q, k) @ moved + moved @ study.head_products(q, k) @ moved
        assert other > predicted


def test_measured_weights_are_least_squares() -> None:
    x, y = two_points(300, 4)
    parts = study.orthogonal(4, 4).view(2, 2, 4)
    heads, label = HardHeads.weighted(parts, parts, normal(2)).heads(x, y), nearest(x, y)
    a, found = study.measured_weights(heads, label)
    flat = heads.permute(0, 2, 3, 1).reshape(-1, 2)
    torch.testing.assert_close(a, torch.linalg.lstsq(flat, label.flatten()[:, None]).solution[:, 0])
    assert found == pytest.approx((flat @ a - label.flatten()).square().sum().item() / 300)


def test_vote() -> None:
    dim = 5
    y, w = uniform(1, 1, dim), study.directions(200_000, dim, torch.Generator().manual_seed(1))
    x = uniform(1, 2, dim)
    apart = x[0, 0] - x[0, 1]
    cosine = abs((apart @ y[0, 0]).item()) / apart.norm().item()
    right = ((w @ apart) * (w @ y[0, 0]) * (apart @ y[0, 0]) > 0).double()
    within(right, 1 - math.acos(cosine) / math.pi)
    x, y = uniform(300, 4, dim), uniform(300, 2, dim)
    errors = [
        study.error(study.vote(x, y, study.directions(n, dim, torch.Generator().manual_seed(2))), nearest(x, y))
        for n in (5, 50, 500)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2], "more votes must help, among four points too"
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    points = torch.tensor([[[0.1, 0.0], [0.9, 0.0], [0.5, 0.0]]], dtype=torch.float64)
    assert torch.equal(study.vote(points, one[None], one), points[:, 1:2])
    assert torch.equal(study.vote(points, -one[None], one), points[:, :1])


def test_heads_needed() -> None:
    count = study.heads_needed(4, 0.3)
    assert count is not None
    found = []
    for heads in (count // 2, count):
        world = torch.Generator().manual_seed(0)
        q, k = study.directions(heads, 4, world), study.directions(heads, 4, world)
        found.append(study.optimal_weights(study.head_products(q, k), study.target_products(q, k))[1])
    assert found[1] <= 0.3 < found[0]
    assert study.heads_needed(4, 1.0) == 1
    assert study.heads_needed(4, 1e-3, limit=64) is None
    assert study.heads_needed(8, 0.3) > count


@pytest.fixture(scope="module")
def table() -> Table:
    return AttentionRank().run()


def test_study(table: Table) -> None:
    made = AttentionRank()
    assert table.claims == dict.fromkeys(made.claims, True)
    worse = [{**row, "error": 0.1 if row["model"] == study.ALIKE else row["error"]} for row in table]
    assert [holds(table.build("broken", worse)) for holds in made.claims.values()] == [True, False, True, False]
    lazy = [{**row, "error": 0.1 if row["model"] == study.ONE else row["error"]} for row in table]
    assert [holds(table.build("broken", lazy)) for holds in made.claims.values()] == [False, True, True, True]
    trivial = table.where(model=study.MEAN).column("error")
    assert trivial == pytest.approx([0.5] * 3, abs=0.02)
    said = made.finding(table)
    assert "In 16 dimensions one head of rank 16 has error 0, 1024 heads" in said
    assert f"{table.where(model=study.VOTE, heads=1024).column('error')[0]:.2f} in two" in said


def test_plot(table: Table) -> None:
    figure = AttentionRank().plot(table)
    assert [axes.get_title() for axes in figure.axes] == ["dim 4", "dim 8", "dim 16"]
    rows = table.where(model=study.VOTE, dim=8)
    curve = next(line for line in figure.axes[1].lines if line.get_label() == study.VOTE)
    assert curve.get_ydata().tolist() == rows.column("error")
    assert curve.get_xdata().tolist() == rows.column("heads")
    assert len(figure.axes[0].lines) == 6


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: RankHeads(4, 2, 5), "rank=5 in 1..4"),
        (lambda: RankHeads(4, 2, 0), "rank=0"),
        (lambda: RankHeads(4, 0, 2), "num_heads=0"),
        (lambda: RankHeads(1, 1, 1), "dim=1"),
        (lambda: uniform(3, 1), "dim=1 must be at least 2"),
        (lambda: study.orthogonal(5, 4), "5 orthogonal points do not exist in dim=4"),
        (lambda: study.doubled(5, 4), "5 points cannot"),
        (lambda: nearest(uniform(2, 1, 3), uniform(2, 1, 3)), "x has 1 points"),
        (lambda: RankHeads(3, 1, 1).double()(uniform(2, 1, 3), uniform(2, 1, 3)), "x has 1 points"),
        (lambda: study.vote(uniform(2, 1, 3), uniform(2, 1, 3), uniform(4, 3)), "x has 1 points"),
        (lambda: study.optimal_weights(torch.ones(2, 2), torch.ones(2)), "heads are nearly alike"),
        (lambda: study.heads_needed(4, 0.0), "most_error=0.0"),
        (lambda: AttentionRank().run("huge"), "scale='huge'"),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
