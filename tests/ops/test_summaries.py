"""Summaries against the matrix in the open, and how much they hold."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard.ops.attend import causal_mask, scores, softmax
from regard.ops.summaries import distance, entropy, logsumexp, mass, position, received, rows

B, H, G, L, S, D = 2, 4, 2, 7, 9, 3
CASES = [
    {},
    {"causal": True},
    {"mask": (S,)},
    {"mask": (L, S)},
    {"mask": (B, 1, 1, S), "causal": True},
    {"mask": (B, H, L, S), "scale": 0.3, "bias": (H, 1, S)},
    {"bias": (L, S), "causal": True},
    {"bias": (B, H, L, S), "scale": 2.0},
]


def inputs(b: int = B, h: int = H, g: int = G, l: int = L, s: int = S, d: int = D) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((b, h, l, d), (b, g, s, d))]


def arguments(case: dict) -> dict:
    """Shapes become random masks, with a row that sees nothing, and random biases."""
    made = dict(case)
    if "mask" in case:
        made["mask"] = torch.rand(case["mask"]) < 0.6
        if case["mask"][-2:] == (L, S):
            made["mask"][..., 4, :] = False
    if "bias" in case:
        made["bias"] = torch.randn(case["bias"], dtype=torch.float64, requires_grad=True)
    return made


def matrix(q: Tensor, k: Tensor, mask=None, bias=None, causal=False, scale=None) -> Tensor:
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    allowed = allowed if mask is None else allowed & mask
    allowed = allowed & causal_mask(q.shape[2], k.shape[2]) if causal else allowed
    return softmax(scores(q, k, scale=scale, bias=bias), allowed)


def same(got: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    up = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(wanted, leaves, up)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()) or "plain")
def call(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, dict, list[Tensor]]:
    q, k = inputs()
    made = arguments(request.param)
    return q, k, made, [q, k, made["bias"]] if "bias" in made else [q, k]


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_mass(call: tuple, r: int, shared: bool) -> None:
    q, k, made, leaves = call
    roles = (torch.rand(S, r) if shared else torch.rand(B, S, r)) < 0.5
    wanted = matrix(q, k, **made) @ (roles if shared else roles[:, None]).double()
    same(mass(q, k, roles, **made), wanted, leaves)


def test_mass_of_all_roles_is_one() -> None:
    q, k = inputs()
    roles = torch.nn.functional.one_hot(torch.arange(S) % 4)
    torch.testing.assert_close(mass(q, k, roles).sum(-1), torch.ones(B, H, L, dtype=torch.float64))


def test_position(call: tuple) -> None:
    q, k, made, leaves = call
    where = torch.stack((torch.arange(S) // 3, torch.arange(S) % 3), -1)
    same(position(q, k, where, **made), matrix(q, k, **made) @ where.double(), leaves)


@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("shape", [None, (L,), (B, H, L)])
def test_received(call: tuple, chunk: int, shape: tuple | None) -> None:
    q, k, made, leaves = call
    weights = None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = leaves if weights is None else [*leaves, weights]
    a = matrix(q, k, **made)
    wanted = (a if weights is None else a * weights[..., None]).sum(-2)
    same(received(q, k, weights, chunk=chunk, **made), wanted, leaves)


def test_received_is_the_gradient_of_the_values() -> None:
    """Another way to the column sums, through the fused kernel."""
    q, k = (x.detach() for x in inputs(g=H))
    v = torch.zeros_like(k, requires_grad=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(received(q, k), torch.autograd.grad(out.sum(), v)[0][..., 0])


@pytest.mark.parametrize("chunk", [2, 256])
def test_distance(call: tuple, chunk: int) -> None:
    q, k, made, leaves = call
    here, there = torch.randint(9, (L, 2)), torch.randn(S, 2, dtype=torch.float64)
    apart = (here[:, None] - there).square().sum(-1).sqrt()
    same(distance(q, k, here, there, chunk=chunk, **made), (matrix(q, k, **made) * apart).sum(-1), leaves)


@pytest.mark.parametrize("chunk", [2, 256])
def test_entropy(call: tuple, chunk: int) -> None:
    q, k, made, leaves = call
    a = matrix(q, k, **made)
    wanted = -(a * torch.where(a > 0, a, 1.0).log()).sum(-1)
    same(entropy(q, k, chunk=chunk, **made), wanted, leaves)


def test_entropy_at_its_ends() -> None:
    q, k = torch.zeros(1, 1, 2, 1), torch.linspace(-400, 400, 5).view(1, 1, 5, 1)
    q[0, 0, 1] = 1.0
    q.requires_grad_()
    out = entropy(q, k, scale=1.0)
    torch.testing.assert_close(out[0, 0], torch.tensor([5.0, 1.0]).log())
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("chunk", [2, 256])
def test_logsumexp(call: tuple, chunk: int) -> None:
    q, k, made, leaves = call
    plain = {name: x for name, x in made.items() if name in ("scale", "bias")}
    z = scores(q, k, **plain)
    total = (z.exp() * (matrix(q, k, **made) > 0)).sum(-1)
    got = logsumexp(q, k, chunk=chunk, **made)
    assert torch.equal(got == -torch.inf, total == 0)
    same(got.exp(), total, leaves)


def test_rows(call: tuple) -> None:
    q, k, made, leaves = call
    index = torch.tensor([6, 0, 4, 0])
    same(rows(q, k, index, **made), matrix(q, k, **made)[:, :, index], leaves)


def test_twice_differentiable() -> None:
    q, k = inputs(1, 2, 1, 3, 4, 2)
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    for f in (received, entropy):
        assert torch.autograd.gradgradcheck(lambda a, b, f=f: f(a, b, mask=mask, chunk=2), (q, k), fast_mode=True)


def test_half_precision() -> None:
    q, k = (x.detach().bfloat16() for x in inputs())
    where = torch.arange(1000, 1000 + S)[:, None]
    wanted = (matrix(q.double(), k.double()) @ where.double()).float()
    torch.testing.assert_close(position(q, k, where), wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(entropy(q, k).double(), entropy(q.double(), k.double()), rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [
                self.numel,
                *(x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out) if isinstance(x, Tensor)),
            ]
        )
        return out


N, CHUNK = 512, 16
PLACES = torch.arange(N)[:, None]
QUANTITIES = {
    "mass": lambda q, k: mass(q, k, PLACES % 2 == 0),
    "many roles": lambda q, k: mass(q, k, torch.rand(N, 9) < 0.5),
    "padded mass": lambda q, k: mass(q, k, PLACES % 2 == 0, mask=torch.arange(N) < 300),
    "position": lambda q, k: position(q, k, PLACES),
    "received": lambda q, k: received(q, k, chunk=CHUNK),
    "causal": lambda q, k: received(q, k, chunk=CHUNK, causal=True),
    "distance": lambda q, k: distance(q, k, PLACES, PLACES, chunk=CHUNK),
    "entropy": lambda q, k: entropy(q, k, chunk=CHUNK),
    "logsumexp": lambda q, k: logsumexp(q, k, chunk=CHUNK, mask=torch.arange(N) < 300),
    "rows": lambda q, k: rows(q, k, torch.arange(CHUNK), causal=True),
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_never_holds_the_matrix(name: str) -> None:
    q, k = (x.detach().float().requires_grad_() for x in inputs(1, 2, 1, N, N, 8))
    with Largest() as largest:
        QUANTITIES[name](q, k).sum().backward()
    assert largest.numel <= 2 * CHUNK * N
    with Largest() as whole:
        softmax(scores(q, k))
    assert whole.numel == 2 * N * N


def test_what_is_kept_for_the_backward_pass_is_linear() -> None:
    q, k = (x.detach().requires_grad_() for x in inputs(1, 2, 1, N, N, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        entropy(q, k, chunk=CHUNK).sum()
    assert max(kept, default=0) <= 2 * CHUNK * N
    assert sum(kept) <= 100 * N


def test_refusals() -> None:
    q, k = inputs(l=S + 1)
    with pytest.raises(ValueError, match="roles must be"):
        mass(q, k, torch.ones(S + 1, 2))
    with pytest.raises(ValueError, match="roles must be"):
        mass(q, k, torch.ones(B + 1, S, 2))
    with pytest.raises(ValueError, match="query_weights must be"):
        received(q, k, torch.ones(S + 2))
    for here, there in ((S, S), (S + 1, S + 1)):
        with pytest.raises(ValueError, match="query_positions and key_positions must have"):
            distance(q, k, torch.ones(here, 2), torch.ones(there, 2))
    with pytest.raises(ValueError, match="causal"):
        entropy(q, k, causal=True)
    with pytest.raises(ValueError, match="causal"):
        rows(q, k, torch.tensor([0]), causal=True)
    with pytest.raises(ValueError, match=r"index must be in 0\.\.9"):
        rows(q, k, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="index"):
        rows(q, k, torch.tensor([-1]))
