"""Score functions against one pair at a time, and the identities between them."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regard.ops.scores import (
    SCORES,
    activated_general,
    additive,
    biased_general,
    concat,
    deep,
    dot,
    euclidean,
    feature,
    general,
    kernel,
    learned_static,
    location,
    scaled_dot,
    similarity,
)

P, D, M, L, S = 4, 3, 5, 6, 7


def t(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def positive(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def perceptron(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    for i, (w, b) in enumerate(zip(weights, biases)):
        x = w @ (torch.tanh(x) if i else x) + b
    return x[0]


# name: (width of q, parameters, score of query i and key j)
CASES: dict[str, tuple[int, Callable[[], list[Tensor]], Callable[..., Tensor]]] = {
    "similarity": (D, list, lambda q, k, i, j: q @ k / (q.norm() * k.norm())),
    "dot": (D, list, lambda q, k, i, j: sum(a * b for a, b in zip(q, k))),
    "scaled_dot": (D, list, lambda q, k, i, j: q @ k / math.sqrt(D)),
    "general": (P, lambda: [t(P, D)], lambda q, k, i, j, w: q @ w @ k),
    "biased_general": (P, lambda: [t(D, P), t(D)], lambda q, k, i, j, w, b: k @ (w @ q + b)),
    "activated_general": (P, lambda: [t(P, D), t()], lambda q, k, i, j, w, b: torch.tanh(q @ w @ k + b)),
    "concat": (
        P,
        lambda: [t(M, P + D), t(M), t(M)],
        lambda q, k, i, j, w, u, b: u @ torch.tanh(w @ torch.cat((q, k)) + b),
    ),
    "additive": (
        P,
        lambda: [t(M, P), t(M, D), t(M), t(M)],
        lambda q, k, i, j, w_q, w_k, u, b: u @ torch.tanh(w_q @ q + w_k @ k + b),
    ),
    "location": (P, lambda: [t(S + 2, P), t(S + 2)], lambda q, k, i, j, w, b: w[j] @ q + b[j]),
    "feature": (
        P,
        lambda: [t(M, D), t(M, D), t(M), t(M)],
        lambda q, k, i, j, w_1, w_2, u, b: u @ torch.tanh(w_1 @ k + w_2 @ k + b),
    ),
    "euclidean": (D, list, lambda q, k, i, j: -((q - k) ** 2).sum()),
    "learned_static": (P, lambda: [t(L + 1, S + 2)], lambda q, k, i, j, table: table[i, j]),
}


def pairs(q: Tensor, k: Tensor, one: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """The score of every pair on its own."""
    lead = [range(n) for n in q.shape[:-2]]
    values = [
        one(q[(*at, i)], k[(*at, j)], i, j, *parameters)
        for at in itertools.product(*lead)
        for i in range(q.shape[-2])
        for j in range(k.shape[-2])
    ]
    return torch.stack(values).view(*q.shape[:-1], k.shape[-2])


def test_every_score_is_tested() -> None:
    assert set(SCORES) == {*CASES, "kernel", "deep"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lead", [(), (2, 3), (1,)])
@pytest.mark.parametrize(("l", "s"), [(L, S), (1, S), (L, 1)])
def test_equals_loops(name: str, lead: tuple[int, ...], l: int, s: int) -> None:
    width, make, one = CASES[name]
    q, k, parameters = t(*lead, l, width), t(*lead, s, D), make()
    got, wanted = SCORES[name](q, k, *parameters), pairs(q, k, one, *parameters)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    up, leaves = torch.randn_like(got), [q, k, *parameters]
    grads = (torch.autograd.grad(y, leaves, up, allow_unused=True, materialize_grads=True) for y in (got, wanted))
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    width, make, _ = CASES[name]
    assert torch.autograd.gradcheck(SCORES[name], (t(2, 2, width), t(2, 3, D), *make()))


def test_kernel() -> None:
    q, k = t(2, L, D), t(2, S, D)
    wanted = pairs(q, k, lambda a, b, i, j: positive(a) @ positive(b))
    torch.testing.assert_close(kernel(q, k, positive), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(kernel(q, k, lambda x: x), dot(q, k))


@pytest.mark.parametrize("hidden", [(), (M,), (M, 2)])
def test_deep(hidden: tuple[int, ...]) -> None:
    q, k = t(2, L, P), t(2, S, D)
    sizes = [P + D, *hidden, 1]
    weights, biases = [t(b, a) for a, b in itertools.pairwise(sizes)], [t(b) for b in sizes[1:]]
    got = deep(q, k, weights, biases)
    wanted = pairs(q, k, lambda a, b, i, j: perceptron(torch.cat((a, b)), weights, biases))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad((got**2).sum(), [q, k, *weights, *biases]))


def test_identities() -> None:
    q, k, eye = t(2, L, D), t(2, S, D), torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(scaled_dot(q, k), dot(q, k) / math.sqrt(D))
    torch.testing.assert_close(general(q, k, eye), dot(q, k))
    torch.testing.assert_close(biased_general(q, k, eye, torch.zeros(D, dtype=torch.float64)), dot(q, k))
    torch.testing.assert_close(activated_general(q, k, eye, torch.zeros((), dtype=torch.float64)), dot(q, k).tanh())
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(activated_general(q, k, eye, one, torch.relu), (dot(q, k) + 1).relu())
    torch.testing.assert_close(similarity(3.0 * q, 0.1 * k), similarity(q, k))
    assert similarity(q, k).abs().max() <= 1 + 1e-12
    w_q, w_k, u, b = t(M, D), t(M, D), t(M), t(M)
    assert torch.equal(concat(q, k, torch.cat((w_q, w_k), 1), u, b), additive(q, k, w_q, w_k, u, b))
    one_hidden = deep(q, k, [torch.cat((w_q, w_k), 1), u[None]], [b, torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(one_hidden, additive(q, k, w_q, w_k, u, b))
    without_bias = additive(q, k, w_q, w_k, u, torch.zeros_like(b))
    torch.testing.assert_close(additive(q, k, w_q, w_k, u), without_bias)


def test_what_is_ignored() -> None:
    q, k = t(L, P), t(S, D)
    w = t(S, P)
    assert torch.equal(location(q, k, w), location(q, t(S, D), w))
    parameters = t(M, D), t(M, D), t(M)
    assert torch.equal(feature(q, k, *parameters), feature(t(L, P), k, *parameters))
    w_1, w_2, u = parameters
    mapped = feature(q, k, w_1, w_2, u, maps=(lambda x: 2 * x, torch.relu))
    wanted = pairs(q, k, lambda x, y, i, j: u @ torch.tanh(w_1 @ (2 * y) + w_2 @ y.relu()))
    torch.testing.assert_close(mapped, wanted)
    table = t(L, S)
    assert torch.equal(learned_static(q, k, table), learned_static(t(L, P), t(S, D), table))


def test_zero_vectors() -> None:
    q = torch.zeros(2, D, requires_grad=True)
    out = similarity(q, torch.randn(S, D))
    assert (out == 0).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()
    assert euclidean(q, torch.zeros(1, D)).abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: location(t(L, P), t(S, D), t(S - 1, P)), "w has places for 6 keys; got 7"),
        (lambda: learned_static(t(L, P), t(S, D), t(L, S - 1)), "table has places for 6 keys"),
        (lambda: learned_static(t(L, P), t(S, D), t(L - 1, S)), "table has places for 5 queries"),
        (lambda: concat(t(L, P), t(S, D), t(M, P), t(M)), "w must have"),
        (lambda: dot(t(L, P), t(S, D)), "one width"),
        (lambda: deep(t(L, P), t(S, D), [t(2, P + D)], [t(2)]), "one output"),
        (lambda: deep(t(L, P), t(S, D), [], []), "one output"),
    ],
)
def test_refusals(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
