"""The two parts of layer norm against torch's, selectability against convex hulls and linear programs, and the study."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import ConvexHull

from regard.ops.attend import attend
from regard.studies.layernorm_expressivity import (
    FactorizedLayerNorm,
    LayerNormExpressivity,
    chosen_by_reflection,
    query_angle,
    random_keys,
    separable,
    unselectable,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_both_parts_are_layer_norm(eps: float) -> None:
    norm = FactorizedLayerNorm(7, eps=eps).double()
    norm.gain.data, norm.bias.data = normal(7), normal(7)
    x = normal(2, 3, 7).requires_grad_()
    found = []
    for out in (norm(x), F.layer_norm(x, (7,), norm.gain, norm.bias, eps)):
        found.append(
            [out, *torch.autograd.grad((out * torch.arange(42).view(2, 3, 7)).sum(), [x, norm.gain, norm.bias])]
        )
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_scaling_alone_is_rms_norm() -> None:
    x = normal(5, 6)
    norm = FactorizedLayerNorm(6, project=False, affine=False, eps=1e-3)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), eps=1e-3), atol=1e-12, rtol=1e-12)


def test_geometry() -> None:
    x = normal(50, 6)
    project = FactorizedLayerNorm(6, scale=False, affine=False)
    both = FactorizedLayerNorm(6, affine=False)
    torch.testing.assert_close(project(project(x)), project(x), atol=1e-14, rtol=0)
    torch.testing.assert_close(project(x), x - x.sum(-1, keepdim=True) / 6)
    assert both(x).sum(-1).abs().max() < 1e-10
    torch.testing.assert_close(both(x).norm(dim=-1), torch.full((50,), math.sqrt(6), dtype=torch.float64))
    small = FactorizedLayerNorm(6, project=False, affine=False, radius=0.25)
    torch.testing.assert_close(small(x).norm(dim=-1), torch.full((50,), 0.25, dtype=torch.float64))


def test_a_zero_vector_stays_zero() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    out = FactorizedLayerNorm(4, affine=False)(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("c", [-3.0, 0.5, 100.0])
def test_a_query_along_ones_attends_equally_to_projected_keys(c: float) -> None:
    keys = FactorizedLayerNorm(6, scale=False, affine=False)(normal(9, 6))
    query = torch.full((1, 1, 1, 6), c, dtype=torch.float64)
    weights = attend(query, keys[None, None], torch.eye(9, dtype=torch.float64)[None, None])
    assert weights.max() - weights.min() < 1e-12


def test_equal_norms_are_all_selectable_by_linear_program() -> None:
    for _ in range(60):
        keys = F.normalize(normal(5, 3), dim=-1)
        assert all(separable(keys, i) for i in range(5))


def test_in_the_plane_selectable_is_extreme() -> None:
    for count in (3, 8, 20):
        keys = normal(count, 2)
        extreme = torch.zeros(count, dtype=torch.bool)
        extreme[ConvexHull(keys.numpy()).vertices.tolist()] = True
        assert torch.equal(unselectable(keys), ~extreme)
        assert torch.equal(torch.tensor([separable(keys, i) for i in range(count)]), extreme)


def test_reflection_never_finds_too_much() -> None:
    missed = 0
    for _ in range(10):
        keys = normal(16, 3)
        found = chosen_by_reflection(keys)
        exact = torch.tensor([separable(keys, i) for i in range(16)])
        assert not (found & ~exact).any()
        missed += int((exact & ~found).sum())
    assert missed <= 8, "the search finds too little to be of use"


def test_a_verdict_does_not_depend_on_linear_maps_or_shifts() -> None:
    keys = normal(20, 3)
    verdict = unselectable(keys)
    assert verdict.any()
    assert not verdict.all()
    assert torch.equal(unselectable(keys @ normal(3, 3) + normal(3)), verdict)


def test_few_keys_are_all_selectable() -> None:
    assert not unselectable(normal(1, 3)).any()
    assert not unselectable(normal(4, 3)).any()
    middle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert unselectable(middle).tolist() == [True, False, False]


def test_equal_keys_share_a_verdict() -> None:
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    with pytest.warns(UserWarning, match="1 of 5 keys equal another"):
        assert unselectable(keys).tolist() == [False, False, False, False, True]


def test_query_angle() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, -1.0, 0.0], [-1.0, -1.0, -1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    want = torch.tensor([0.0, 90.0, 0.0, math.degrees(math.acos(1 / math.sqrt(3)))], dtype=torch.float64)
    torch.testing.assert_close(query_angle(eye, eye, x), want, atol=1e-5, rtol=0)
    w_q, w_k = normal(2, 3), normal(2, 3)
    asked = w_k.T @ (w_q @ x[3])
    by_hand = math.degrees(math.acos(abs(asked.sum().item()) / (asked.norm().item() * math.sqrt(3))))
    assert query_angle(w_q, w_k, x)[3].item() == pytest.approx(by_hand)


def test_study() -> None:
    study = LayerNormExpressivity()
    table = study.run()
    assert table.claims == dict.fromkeys(study.claims, True)
    assert all(holds(table) for holds in study.claims.values())
    worse = table.build(
        "broken", [{**row, "unselectable": 0.3 if row["norm"] == "scale" else row["unselectable"]} for row in table]
    )
    assert [holds(worse) for holds in study.claims.values()] == [False, True, True]
    assert random_keys(3, 6, 2, seed=0) == random_keys(3, 6, 2, seed=0) != random_keys(3, 6, 2, seed=1)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: FactorizedLayerNorm(1), "dim=1"),
        (lambda: FactorizedLayerNorm(4, eps=-1.0), "eps=-1.0"),
        (lambda: FactorizedLayerNorm(4, radius=0.0), "radius=0.0"),
        (lambda: unselectable(torch.zeros(0, 3)), "n at least 1"),
        (lambda: unselectable(torch.full((2, 3), float("nan"))), "finite"),
        (lambda: LayerNormExpressivity().run("huge"), "scale='huge'"),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
