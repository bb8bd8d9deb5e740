"""Distribution functions: definitions, masks and exact gradients."""

import entmax
import pytest
import torch
from torch import Tensor

from regard.ops.attend import softmax
from regard.ops.normalizers import (
    NORMALIZERS,
    entmax15,
    entmax_alpha,
    gumbel,
    hard_sample,
    identity,
    l1,
    relu,
    relu_squared,
    sigmoid,
    sinkhorn,
    sparsemax,
    standardize,
    topk_softmax,
)

NAMES = [
    "softmax",
    "sigmoid",
    "sparsemax",
    "entmax15",
    "entmax_alpha",
    "relu",
    "relu_squared",
    "standardize",
    "l1",
    "sinkhorn",
    "hard_sample",
    "gumbel",
    "topk_softmax",
    "identity",
]
RANDOM = {"hard_sample", "gumbel"}
SIMPLEX = {"softmax", "sparsemax", "entmax15", "entmax_alpha", "sinkhorn", "hard_sample", "gumbel", "topk_softmax"}


def numbers(*shape: int, spread: float = 1.5) -> Tensor:
    return (spread * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def masks() -> list[Tensor]:
    full = torch.rand(2, 3, 5, 7) < 0.6
    full[0, 0, 2], full[1, 1, 0] = False, False
    full[1, 2, 3] = torch.arange(7) == 4
    return [full, full[0, :1], torch.arange(7) < 5, torch.arange(5)[:, None] != 2, torch.zeros(7, dtype=torch.bool)]


def test_registry() -> None:
    assert list(NORMALIZERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_masked_is_zero_and_changes_nothing(name: str) -> None:
    """Weights do not depend on what is masked, masked weights and gradients are zero, rows without keys are zero."""
    for mask in masks():
        x = numbers(2, 3, 5, 7)
        allowed = mask.expand(x.shape)
        changed = torch.where(allowed, x, 50.0 * torch.randn_like(x))
        torch.manual_seed(3)
        weights = NORMALIZERS[name](x, mask)
        torch.manual_seed(3)
        other = NORMALIZERS[name](changed, mask)
        torch.testing.assert_close(weights, other, rtol=0, atol=1e-13)
        assert (weights[~allowed] == 0).all()
        assert torch.isfinite(weights).all()
        if name in SIMPLEX:
            torch.testing.assert_close(weights.sum(-1), allowed.any(-1).double(), rtol=0, atol=1e-12)
            assert (weights >= 0).all()
        if name != "hard_sample":
            (grad,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), x)
            assert (grad[~allowed] == 0).all()
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM | {"sinkhorn"}])
def test_mask_is_the_compacted_row(name: str) -> None:
    x, keep = numbers(4, 9), torch.tensor([0, 2, 3, 7])
    mask = torch.zeros(9, dtype=torch.bool)
    mask[keep] = True
    torch.testing.assert_close(NORMALIZERS[name](x, mask)[:, keep], NORMALIZERS[name](x[:, keep]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM])
def test_gradients(name: str) -> None:
    mask = torch.tensor([[True, True, False, True, True], [False] * 5, [True] * 5])
    x = numbers(2, 3, 5)
    assert torch.autograd.gradcheck(lambda z: NORMALIZERS[name](z, mask), x, eps=1e-7, atol=1e-6)
    assert torch.autograd.gradcheck(NORMALIZERS[name], x, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM | {"entmax_alpha"}])
def test_second_gradients(name: str) -> None:
    mask = torch.tensor([[True, True, False, True, True], [False] * 5, [True] * 5])
    x = numbers(3, 5)
    assert torch.autograd.gradgradcheck(lambda z: NORMALIZERS[name](z, mask), x, eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(name: str, dtype: torch.dtype) -> None:
    x = numbers(3, 40).detach().to(dtype)
    torch.manual_seed(1)
    got = NORMALIZERS[name](x)
    assert got.dtype == dtype
    if name not in RANDOM:
        wanted = NORMALIZERS[name](x.double())
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance / 10)


def projection(z: Tensor) -> Tensor:
    """The nearest point of the simplex, by trying every size of the support."""
    best = None
    for kept in range(1, len(z) + 1):
        chosen = z.topk(kept).indices
        p = torch.zeros_like(z)
        p[chosen] = z[chosen] - (z[chosen].sum() - 1) / kept
        if (p >= 0).all() and (best is None or (p - z).norm() < (best - z).norm()):
            best = p
    assert best is not None
    return best


def bisection(z: Tensor, alpha: float) -> Tensor:
    z, low, high = (alpha - 1) * z, (alpha - 1) * z.max() - 1, (alpha - 1) * z.max()
    for _ in range(200):
        tau = (low + high) / 2
        p = (z - tau).clamp(min=0) ** (1 / (alpha - 1))
        low, high = (tau, high) if p.sum() > 1 else (low, tau)
    return p


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_sparsemax_is_the_projection(spread: float, n: int) -> None:
    x = numbers(6, n, spread=spread)
    out = sparsemax(x)
    torch.testing.assert_close(out, torch.stack([projection(row) for row in x.detach()]), rtol=0, atol=1e-12)
    against_peer(out, entmax.sparsemax, x)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_entmax15(spread: float, n: int) -> None:
    x = numbers(6, n, spread=spread)
    out = entmax15(x)
    torch.testing.assert_close(out, torch.stack([bisection(row, 1.5) for row in x.detach()]), rtol=0, atol=1e-8)
    against_peer(out, entmax.entmax15, x)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_entmax_alpha(alpha: float, spread: float) -> None:
    x = numbers(6, 9, spread=spread)
    out = entmax_alpha(x, alpha=alpha)
    torch.testing.assert_close(out, torch.stack([bisection(row, alpha) for row in x.detach()]), rtol=0, atol=1e-8)
    against_peer(out, lambda z: entmax.entmax_bisect(z, alpha, n_iter=60), x)


def against_peer(out: Tensor, peer, x: Tensor) -> None:
    theirs, up = peer(x), torch.randn_like(out)
    torch.testing.assert_close(out, theirs, rtol=0, atol=1e-9)
    mine_grad, their_grad = (torch.autograd.grad(y, x, up, retain_graph=True)[0] for y in (out, theirs))
    torch.testing.assert_close(mine_grad, their_grad, rtol=1e-6, atol=1e-7)


def test_entmax_alpha_meets_its_special_cases() -> None:
    x = numbers(5, 8)
    torch.testing.assert_close(entmax_alpha(x, alpha=2.0), sparsemax(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(entmax_alpha(x, alpha=1.5), entmax15(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(entmax_alpha(x, alpha=1.0001), softmax(x), rtol=0, atol=1e-3)


def test_entmax_alpha_learns_alpha_per_head() -> None:
    x = numbers(2, 3, 4, 6)
    alpha = torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    out = entmax_alpha(x, alpha=alpha)
    for h in range(3):
        torch.testing.assert_close(out[:, h], entmax_alpha(x[:, h], alpha=alpha[h].item()))
    assert torch.autograd.gradcheck(lambda z, a: entmax_alpha(z, alpha=a), (x, alpha), eps=1e-7, atol=1e-6)


def test_sparse_ones_have_exact_zeros() -> None:
    x = numbers(50, 12, spread=2.0)
    for f in (sparsemax, entmax15, entmax_alpha, relu, topk_softmax):
        assert (f(x) == 0).any()
    assert (softmax(x) > 0).all()
    assert (sparsemax(x) == 0).sum() > (entmax15(x) == 0).sum()


def test_ties_share() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, -5.0], dtype=torch.float64)
    for f in (sparsemax, entmax15, entmax_alpha):
        torch.testing.assert_close(f(x), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0], dtype=torch.float64))
    assert topk_softmax(x, k=2).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_elementwise_ones() -> None:
    x = numbers(3, 4).detach()
    torch.testing.assert_close(sigmoid(x), 1 / (1 + (-x).exp()))
    torch.testing.assert_close(relu(x), x * (x > 0))
    torch.testing.assert_close(relu_squared(x), x**2 * (x > 0))
    assert torch.equal(identity(x), x)
    torch.testing.assert_close(l1(x), torch.stack([row / sum(abs(v) for v in row) for row in x]))
    assert (l1(torch.zeros(2, 3)) == 0).all()


def test_standardize() -> None:
    x = numbers(2, 3, 4, 6)
    mask = torch.rand(2, 1, 4, 6) < 0.7
    mask[0, 0, 0], mask[0, 0, 1], mask[0, 0, 2] = False, torch.arange(6) == 3, True
    gain, bias = (torch.randn(3, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = standardize(x, mask, gain, bias)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                row = x[b, h, i][mask[b, 0, i]]
                if len(row):
                    z = gain[h] * (row - row.mean()) / (row.std(correction=0) + 1e-3) + bias[h]
                    torch.testing.assert_close(out[b, h, i][mask[b, 0, i]], z[0], rtol=0, atol=1e-12)
    assert (out[0, :, 0] == 0).all()
    torch.testing.assert_close(out[0, :, 1, 3], bias[:, 0, 0])
    plain = standardize(x)
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 3, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(standardize(7.0 * x + 3.0, eps=1e-9), standardize(x, eps=1e-9), rtol=0, atol=1e-7)
    assert torch.autograd.gradcheck(lambda z, g, c: standardize(z, mask, g, c), (x, gain, bias))


def test_sinkhorn() -> None:
    x = numbers(2, 4, 4)
    out = sinkhorn(x, iterations=300)
    ones = torch.ones(2, 4, dtype=torch.float64)
    torch.testing.assert_close(out.sum(-1), ones)
    torch.testing.assert_close(out.sum(-2), ones)
    wide = sinkhorn(numbers(3, 6), iterations=300)
    torch.testing.assert_close(wide.sum(-2), torch.full((6,), 0.5, dtype=torch.float64))
    plain = x.exp()
    for _ in range(5):
        plain = plain / plain.sum(-2, keepdim=True)
        plain = plain / plain.sum(-1, keepdim=True)
    torch.testing.assert_close(sinkhorn(x, iterations=5), plain)


@pytest.mark.parametrize("draw", [hard_sample, gumbel])
def test_draws_follow_softmax(draw) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, -1.0])
    mask = torch.tensor([True, True, True, False])
    generator = torch.Generator().manual_seed(5)
    out = draw(x.expand(20000, 4), mask, generator=generator)
    share = torch.nn.functional.one_hot(out.argmax(-1), 4).double().mean(0)
    torch.testing.assert_close(share, softmax(x, mask).double(), rtol=0, atol=0.015)
    generator.manual_seed(5)
    assert torch.equal(out, draw(x.expand(20000, 4), mask, generator=generator))
    assert not torch.equal(out, draw(x.expand(20000, 4), mask, generator=generator))


def test_hard_sample_is_one_hot_and_gumbel_sharpens() -> None:
    x = numbers(100, 6)
    hard = hard_sample(x)
    assert ((hard == 1).sum(-1) == 1).all()
    assert ((hard == 0).sum(-1) == 5).all()
    assert not hard.requires_grad
    draws = []
    for temperature in (0.05, 5.0):
        draws.append(gumbel(x, temperature=temperature, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(draws[0].argmax(-1), draws[1].argmax(-1))
    assert draws[0].amax(-1).mean() > 0.9 > 0.6 > draws[1].amax(-1).mean()


def test_topk_softmax() -> None:
    x = numbers(4, 7)
    mask = torch.tensor([True, False, True, True, False, True, True])
    out = topk_softmax(x, mask, k=3)
    for row, z in zip(out, x):
        best = sorted((j for j in range(7) if mask[j]), key=lambda j: -z[j].item())[:3]
        torch.testing.assert_close(row[best], z[best].softmax(-1))
        assert row.count_nonzero() == 3
    torch.testing.assert_close(topk_softmax(x, mask, k=99), softmax(x, mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: entmax_alpha(x, alpha=1.0), "alpha=1.0"),
        (lambda x: entmax_alpha(x, alpha=torch.tensor([1.5, 0.5])), "alpha"),
        (lambda x: standardize(x, eps=0.0), "eps=0.0"),
        (lambda x: sinkhorn(x, iterations=0), "iterations=0"),
        (lambda x: gumbel(x, temperature=0.0), "temperature=0.0"),
        (lambda x: topk_softmax(x, k=0), "k=0"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 2))
