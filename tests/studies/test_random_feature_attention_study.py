"""Random features against loops and their kernel, the fits against primal solutions, and the study."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from regard.studies import random_feature_attention_study as study
from regard.studies.random_feature_attention_study import (
    KernelRidge,
    RandomFeatureAttention,
    RandomFeatureAttentionStudy,
    RandomFeatureMLP,
    RandomSoftmaxAttention,
    attention_kernel,
)
from regard.studies.table import Table


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def bordered(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(1, dtype=x.dtype)])


@pytest.mark.parametrize("kind", [RandomFeatureAttention, RandomSoftmaxAttention])
@pytest.mark.parametrize("shift", [0.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_loops(kind: type[RandomFeatureAttention], shift: float, masked: bool) -> None:
    layer, query, keys = kind(4, 5, shift=shift), normal(3, 4), normal(3, 7, 4)
    mask = torch.rand(3, 7) < 0.6 if masked else torch.ones(3, 7, dtype=torch.bool)
    mask[0], mask[:, 2] = True, True
    out = layer(query, keys, mask if masked else None).view(3, 5, 5)
    for b in range(3):
        there = [bordered(x) for x, seen in zip(keys[b], mask[b]) if seen]
        for m, w in enumerate(layer.w):
            scores = torch.stack([(w * torch.outer(bordered(query[b]), x)).sum() for x in there])
            weights = scores.clamp(min=0) / len(there)
            if kind is RandomSoftmaxAttention:
                weights = scores.exp() / scores.exp().sum()
            want = sum(a * x for a, x in zip(weights, there))
            torch.testing.assert_close(out[b, m], want, atol=1e-12, rtol=1e-12)


def test_mlp_equals_loops() -> None:
    mlp, query, keys = RandomFeatureMLP(4, 3, 6), normal(2, 4), normal(2, 3, 4)
    for b in range(2):
        x = bordered(torch.cat([query[b], *keys[b]]))
        want = torch.stack([(row @ x).clamp(min=0) for row in mlp.w])
        torch.testing.assert_close(mlp(query, keys)[b], want, atol=1e-12, rtol=1e-12)


def test_matrices() -> None:
    plain, shifted = (
        RandomFeatureAttention(6, 4000, shift=c, generator=torch.Generator().manual_seed(3)) for c in (0.0, 4.0)
    )
    assert plain.w.std().item() == pytest.approx(0.5, rel=0.01)
    corner = torch.tensor([4.0] * 6 + [0.0], dtype=torch.float64)
    torch.testing.assert_close(shifted.w - plain.w, torch.diag(corner).expand(4000, 7, 7))
    assert plain.w[:, 6].std() > 0.4, "the row of the bias must stay random"
    assert plain.w[:, :, 6].std() > 0.4, "the column of the bias must stay random"
    assert not list(plain.parameters())


def test_features_reach_their_kernel() -> None:
    """The mean over heads is within three standard errors of the integral, with key sets of different sizes."""
    layer = RandomFeatureAttention(3, 100_000, generator=torch.Generator().manual_seed(5))
    query, keys, other_query, other_keys = normal(2, 3), normal(2, 4, 3), normal(3, 3), normal(3, 5, 3)
    want = attention_kernel(query, keys, other_query, other_keys)
    first, second = (layer(*x).view(-1, 100_000, 4) for x in ((query, keys), (other_query, other_keys)))
    products = torch.einsum("bmd,cmd->bcm", first, second)
    off = (products.mean(-1) - want).abs() * math.sqrt(100_000) / products.std(-1)
    assert off.max() <= 3
    assert (products.std(-1) / math.sqrt(100_000) < 0.05 * want.abs().max()).all(), "the estimate says little"


def test_kernel_of_one_key_is_the_arc_cosine_kernel() -> None:
    query, key = torch.tensor([[0.0]]), torch.tensor([[[0.0]]])
    assert attention_kernel(query, key, query, key).item() == pytest.approx(1 / 8), "E relu(w)^2 of variance 1/4"
    a, b = normal(1, 2), normal(1, 1, 2)
    other, far = normal(1, 2), normal(1, 1, 2)
    flat = [torch.outer(bordered(q[0]), bordered(k[0, 0])).flatten() / 2 for q, k in ((a, b), (other, far))]
    covariance = torch.stack([torch.stack([u @ v for v in flat]) for u in flat])
    z = normal(4_000_000, 2) @ torch.linalg.cholesky(covariance).T
    inner = bordered(b[0, 0]) @ bordered(far[0, 0])
    sampled = z.relu().prod(-1) * inner
    off = (sampled.mean() - attention_kernel(a, b, other, far)).abs() * 2000 / sampled.std()
    assert off <= 3


def test_the_order_of_keys_does_not_matter() -> None:
    layer, query, keys = RandomFeatureAttention(5, 9, shift=1.0), normal(3, 5), normal(3, 6, 5)
    out = layer(query, keys)
    torch.testing.assert_close(layer(query, keys[:, torch.randperm(6)]), out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer(query, torch.cat([keys, keys], 1)), out, atol=1e-12, rtol=1e-12)
    mlp = RandomFeatureMLP(5, 6, 9)
    assert not torch.allclose(mlp(query, keys.flip(1)), mlp(query, keys))


def test_what_is_masked_is_not_there() -> None:
    layer, query, keys = RandomFeatureAttention(5, 9), normal(2, 5), normal(2, 6, 5)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] + [False] * 5])
    out = layer(query, keys, mask)
    torch.testing.assert_close(out[:1], layer(query[:1], keys[:1, :4]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(out[1:], layer(query[1:], keys[1:, :1]), atol=1e-12, rtol=1e-12)


def test_even_functions_of_a_key_need_the_channel_of_ones() -> None:
    """Without it a head is even in the query and odd in the key, or odd and even: a square of a key is neither."""
    layer, (query, keys) = RandomFeatureAttention(3, 400), study.inputs(300, 1, torch.Generator().manual_seed(1), 3)
    y = keys[:, 0, 0].square() - 1 / 3
    bare = (torch.einsum("bp,mpq,bnq->bmn", query, layer.w[:, :3, :3], keys).relu() @ keys).flatten(1)
    left = []
    for phi in (layer(query, keys), bare):
        fit = KernelRidge(phi[:200] @ phi[:200].T / 400)
        got = phi[200:] @ phi[:200].T / 400 @ fit.solve(y[:200], 1e-3)
        left.append(((got - y[200:]).square().mean() / y[200:].var()).item())
    assert left[0] < 0.01
    assert left[1] > 0.9


@pytest.mark.parametrize(("samples", "features"), [(9, 20), (30, 6)])
@pytest.mark.parametrize("ridge", [1e-3, 0.7])
def test_dual_ridge_is_the_primal_one(samples: int, features: int, ridge: float) -> None:
    phi, y = normal(samples, features), normal(samples)
    primal = torch.linalg.solve(phi.T @ phi + ridge * torch.eye(features).double(), phi.T @ y)
    fit = KernelRidge(phi @ phi.T)
    torch.testing.assert_close(phi.T @ fit.solve(y, ridge), primal, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("samples", "features"), [(9, 20), (30, 6)])
def test_no_ridge_is_the_least_norm(samples: int, features: int) -> None:
    phi, y = normal(samples, features), normal(samples)
    phi[1] = phi[0]
    fit = KernelRidge(phi @ phi.T)
    torch.testing.assert_close(phi.T @ fit.solve(y, 0.0), torch.linalg.pinv(phi) @ y, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_within_a_ball_is_the_best_there(share: float) -> None:
    phi, y = normal(12, 5), normal(12)
    fit = KernelRidge(phi @ phi.T)
    free = (phi.T @ fit.solve(y, 0.0)).norm().item()
    w = phi.T @ fit.within(y, share * free)
    assert w.norm().item() == pytest.approx(share * free, rel=1e-8)
    ball = {"type": "ineq", "fun": lambda v: (share * free) ** 2 - v @ v}
    found = minimize(
        lambda v: (phi @ torch.from_numpy(v) - y).square().sum().item(), [0.0] * 5, constraints=[ball], tol=1e-12
    )
    assert (phi @ w - y).square().sum().item() == pytest.approx(found.fun, rel=1e-6)
    torch.testing.assert_close(fit.within(y, 2 * free), fit.solve(y, 0.0))
    assert not KernelRidge(torch.zeros(3, 3).double()).within(normal(3), 1.0).any()


def test_inputs() -> None:
    query, keys = study.inputs(20_000, 3, torch.Generator().manual_seed(0))
    assert query.shape == (20_000, study.DIM)
    assert keys.shape == (20_000, 3, study.DIM)
    for x in (query, *keys.unbind(1)):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(20_000, dtype=torch.float64))
        torch.testing.assert_close(
            x.T @ x / 20_000, torch.eye(study.DIM, dtype=torch.float64) / study.DIM, atol=5e-3, rtol=0
        )
    assert (query * keys[:, 0]).sum(-1).mean().abs() < 0.01


def test_targets() -> None:
    correlation, along = torch.tensor([-2.0, 3.0]), torch.tensor([5.0, -7.0])
    found = {name: target(correlation, along).tolist() for name, target in study.TARGETS.items()}
    assert list(found.values()) == [[5.0, 0.0], [4.0, 9.0], [-8.0, 27.0], [-10.0, -21.0]]


def test_all_fit_the_same_number_of_coefficients() -> None:
    models = study.layers(4, torch.Generator().manual_seed(0))
    assert {m(normal(1, study.DIM), normal(1, 4, study.DIM)).shape[1] for m in models.values()} == {3900}


def test_error_is_that_of_a_fit_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TESTED", 50)
    layer = RandomFeatureAttention(study.DIM, study.HEADS)
    (row,) = study.compare({"a": layer}, 3, [40], torch.Generator().manual_seed(2), ["keys alone"])
    world = torch.Generator().manual_seed(2)
    beta = F.normalize(torch.randn(study.DIM, generator=world, dtype=torch.float64), dim=0)
    query, keys = study.inputs(140, 3, world)
    y, phi = (keys @ beta).relu().mean(-1), layer(query, keys) / math.sqrt(study.HEADS)
    errors = []
    gram, mean = phi @ phi[:40].T, y[:40].mean()
    for ridge in study.RIDGES:
        alpha = torch.linalg.solve(gram[:40] + ridge * torch.eye(40).double(), y[:40] - mean)
        gap = (gram @ alpha + mean - y).square()
        errors.append((gap[40:90].mean().item(), gap[90:].mean().item()))
    assert row["error"] == pytest.approx(min(errors)[1] / y[90:].var().item(), rel=1e-6)


@pytest.fixture(scope="module")
def table() -> Table:
    return RandomFeatureAttentionStudy().run()


def test_study(table: Table) -> None:
    made = RandomFeatureAttentionStudy()
    assert table.claims == dict.fromkeys(made.claims, True)
    equal = table.build("broken", [{**row, "error": 0.5} for row in table])
    assert [holds(equal) for holds in made.claims.values()] == [False] * 4
    assert "With 800 samples" in made.finding(table)
    plain = table.where(model=study.PLAIN, target="keys alone", samples=800).column("error")[0]
    assert f"has {plain:.2f} of the variance left" in made.finding(table)


def test_plot(table: Table) -> None:
    figure = RandomFeatureAttentionStudy().plot(table)
    assert [axes.get_title() for axes in figure.axes] == [f"target {name}" for name in study.TARGETS]
    curve = next(line for line in figure.axes[0].lines if line.get_label() == study.MLP)
    assert curve.get_ydata().tolist() == table.where(model=study.MLP, target="keys alone").column("error")
    assert curve.get_xdata().tolist() == [200, 800]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: RandomFeatureAttention(0, 3), "dim=0"),
        (lambda: RandomFeatureAttention(3, 0), "num_heads=0"),
        (lambda: RandomFeatureMLP(3, 0, 4), "num_keys=0"),
        (lambda: RandomFeatureAttention(3, 2)(normal(2, 3), normal(2, 0, 3)), "needs a key"),
        (lambda: RandomFeatureAttention(3, 2)(normal(2, 4), normal(2, 5, 3)), "dim=3 does not fit"),
        (lambda: RandomFeatureAttention(3, 2)(normal(1, 3), normal(2, 5, 3)), "dim=3 does not fit"),
        (
            lambda: RandomFeatureAttention(3, 2)(normal(2, 3), normal(2, 5, 3), torch.ones(2, 4).bool()),
            r"mask must be \(2, 5\)",
        ),
        (
            lambda: RandomFeatureAttention(3, 2)(normal(2, 3), normal(2, 5, 3), torch.zeros(2, 5).bool()),
            "needs a key",
        ),
        (lambda: RandomFeatureMLP(3, 2, 4)(normal(2, 3), normal(2, 5, 3)), "18 channels together; expected 9"),
        (lambda: KernelRidge(normal(1, 1)), "two samples"),
        (lambda: KernelRidge(torch.eye(3)), "float64"),
        (lambda: KernelRidge(torch.eye(3).double()).solve(normal(3), -1.0), "ridge=-1.0"),
        (lambda: KernelRidge(torch.eye(3).double()).within(normal(3), 0.0), "radius=0.0"),
        (lambda: study.inputs(3, 0, torch.Generator()), "num_keys=0"),
        (lambda: RandomFeatureAttentionStudy().run("huge"), "scale='huge'"),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
