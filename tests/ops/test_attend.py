"""attend: the reference against loops, the faster forms against the reference."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from regard.ops.attend import attend, causal_mask, check_heads, merge_masks, mix, reference, scores, softmax, widen

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
B, H, G, L, S, D, E = 2, 6, 3, 5, 7, 4, 3


def inputs(b: int = B, h: int = H, g: int = G, l: int = L, s: int = S, d: int = D, e: int = E) -> tuple[Tensor, ...]:
    shapes = ((b, h, l, d), (b, g, s, d), (b, g, s, e))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One number at a time; masks and biases of the full shape."""
    b, h, l, _ = q.shape
    out = torch.zeros(b, h, l, v.shape[-1], dtype=torch.float64)
    for n, i, r in itertools.product(range(b), range(h), range(l)):
        head = i * k.shape[1] // h
        allowed = [j for j in range(k.shape[2]) if mask[n, i, r, j]]
        z = [scale * float(q[n, i, r] @ k[n, head, j]) + float(bias[n, i, r, j]) for j in allowed]
        total = sum(math.exp(x) for x in z)
        for x, j in zip(z, allowed):
            out[n, i, r] += math.exp(x) / total * v[n, head, j].detach()
    return out


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


@pytest.mark.parametrize(
    ("backend", "h", "g"),
    [*itertools.product(("reference", "sdpa"), (6,), (6, 3, 1)), ("reference", 1, 1), ("flex", 6, 3)],
)
def test_equals_loops(backend: str, h: int, g: int) -> None:
    dtype = torch.float32 if backend == "flex" else torch.float64
    q, k, v = (x.detach() for x in inputs(h=h, g=g, e=D))
    mask, bias = random_mask(B, h, L, S), torch.randn(B, h, L, S, dtype=torch.float64)
    mask[:, :, 2] = False
    expected = loops(q, k, v, mask, bias, 0.3)
    out = attend(*(x.to(dtype) for x in (q, k, v)), mask=mask, bias=bias.to(dtype), scale=0.3, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6 if backend == "flex" else 1e-12)
    assert (out[:, :, 2] == 0).all()


MASK_SHAPES = [None, (S,), (L, 1), (L, S), (B, 1, 1, S), (1, H, L, S), (B, 1, L, S), (B, H, L, S)]
BIAS_SHAPES = [None, (S,), (H, 1, 1), (L, S), (B, H, L, S)]


@pytest.mark.parametrize("mask_shape", MASK_SHAPES)
@pytest.mark.parametrize("bias_shape", BIAS_SHAPES)
def test_broadcast_masks_and_biases(mask_shape: tuple | None, bias_shape: tuple | None) -> None:
    q, k, v = (x.detach() for x in inputs())
    mask = None if mask_shape is None else random_mask(*mask_shape)
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64)
    full_mask = torch.ones(B, H, L, S, dtype=torch.bool) if mask is None else mask.expand(B, H, L, S)
    full_bias = torch.zeros(B, H, L, S, dtype=torch.float64) if bias is None else bias.expand(B, H, L, S)
    wanted = loops(q, k, v, full_mask, full_bias, D**-0.5)
    for backend in ("reference", "sdpa"):
        torch.testing.assert_close(attend(q, k, v, mask=mask, bias=bias, backend=backend), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shapes", [(None, None), ((S,), (H, 1, 1)), ((B, 1, L, S), (S,))])
@pytest.mark.parametrize("causal", [False, True])
def test_flex(shapes: tuple, causal: bool) -> None:
    q, k, v = (x.detach().float() for x in inputs(e=D))
    mask, bias = (None if shape is None else torch.randn(shape) for shape in shapes)
    mask = None if mask is None else mask > -0.3
    out = attend(q, k, v, mask=mask, bias=bias, causal=causal, scale=0.4, backend="flex")
    wanted = reference(q, k, v, mask=mask, bias=bias, causal=causal, scale=0.4)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("h", "g", "l", "s"), [(6, 6, 5, 5), (6, 3, 5, 7), (4, 1, 1, 7), (2, 2, 7, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("e", [D, E])
def test_sdpa_gradients(causal: bool, with_mask: bool, with_bias: bool, h: int, g: int, l: int, s: int, e: int) -> None:
    q, k, v = inputs(h=h, g=g, l=l, s=s, e=e)
    leaves = [q, k, v]
    mask = random_mask(B, h, l, s) if with_mask else None
    if mask is not None:
        mask[0, 0] = False
    bias = torch.randn(h, l, s, dtype=torch.float64, requires_grad=True) if with_bias else None
    if bias is not None:
        leaves.append(bias)
    wanted = reference(q, k, v, mask=mask, bias=bias, causal=causal, scale=0.7)
    out = attend(q, k, v, mask=mask, bias=bias, causal=causal, scale=0.7)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_rows_that_see_nothing(backend: str) -> None:
    q, k, v = inputs(e=D)
    mask = torch.ones(B, 1, L, S, dtype=torch.bool)
    mask[0, 0, 3], mask[1] = False, False
    out = attend(q, k, v, mask=mask, backend=backend)
    out.square().sum().backward()
    assert (out[0, :, 3] == 0).all()
    assert (out[1] == 0).all()
    assert (out[0, :, :3] != 0).all()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[1] == 0).all()
    assert (q.grad[0, :, 3] == 0).all()


def test_masked_tokens_do_not_matter() -> None:
    q, k, v = (x.detach() for x in inputs())
    mask = torch.arange(S) < 4
    changed = [torch.where(mask[:, None], x, 100.0) for x in (k, v)]
    for backend in ("reference", "sdpa"):
        torch.testing.assert_close(
            attend(q, k, v, mask=mask, backend=backend), attend(q, *changed, mask=mask, backend=backend)
        )


def test_causal_aligns_last_query_with_last_key() -> None:
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    q, k, v = (x.detach() for x in inputs(h=3, l=S))
    whole = attend(q, k, v, causal=True)
    for backend in ("reference", "sdpa"):
        torch.testing.assert_close(attend(q[:, :, -2:], k, v, causal=True, backend=backend), whole[:, :, -2:])
    torch.testing.assert_close(whole[:, :, 0], v[:, :, 0])


def test_default_scale() -> None:
    q, k, v = (x.detach() for x in inputs())
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, scale=D**-0.5))
    torch.testing.assert_close(scores(q, k), scores(q, k, scale=1.0) / 2.0)
    assert not torch.allclose(attend(q, k, v), attend(q, k, v, scale=1.0))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
def test_no_keys(backend: str) -> None:
    q, k, v = inputs(s=0)
    out = attend(q, k, v, backend=backend)
    assert out.shape == (B, H, L, E)
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_queries(backend: str) -> None:
    q, k, v = inputs(l=0)
    assert attend(q, k, v, backend=backend).shape == (B, H, 0, E)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_bfloat16(backend: str) -> None:
    q, k, v = (x.detach().bfloat16() for x in inputs())
    mask, bias = random_mask(L, S), torch.randn(L, S)
    out = attend(q, k, v, mask=mask, bias=bias, backend=backend)
    assert out.dtype == torch.bfloat16
    wanted = reference(q.double(), k.double(), v.double(), mask=mask, bias=bias.double())
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=0.05)


def test_dropout_keeps_the_mean() -> None:
    q, k, v = (x.detach().float() for x in inputs(b=1, h=1, g=1, l=1))
    for backend in ("reference", "sdpa"):
        draws = torch.cat([attend(q, k, v, dropout=0.5, backend=backend) for _ in range(2000)])
        assert (draws.std(0) > 0.1).any()
        torch.testing.assert_close(draws.mean(0), attend(q, k, v)[0], rtol=0, atol=0.1)


def test_softmax_is_twice_differentiable_on_empty_rows() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    weights = softmax(x, mask)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert (weights[~mask] == 0).all()
    assert torch.autograd.gradcheck(lambda z: softmax(z, mask), x)
    assert torch.autograd.gradgradcheck(lambda z: softmax(z, mask), x)


def test_grouped_heads_are_repeated_heads() -> None:
    q, k, v = (x.detach() for x in inputs())
    wide_k, wide_v = widen(k, 2), widen(v, 2)
    torch.testing.assert_close(wide_k[:, 3], k[:, 1])
    torch.testing.assert_close(scores(q, k), scores(q, wide_k))
    weights = softmax(scores(q, k))
    torch.testing.assert_close(mix(weights, v), mix(weights, wide_v))
    assert widen(k, 1) is k


def test_merge_masks() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([[True], [False]])
    assert merge_masks(None, None) is None
    assert merge_masks(None, a) is a
    assert merge_masks(a, None, b).tolist() == [[True, True, False], [False, False, False]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 2, 3), (1, 3, 2, 3), (1, 3, 2, 3)), "multiple"),
        (((1, 4, 2, 3), (1, 2, 2, 5), (1, 2, 2, 3)), "one width"),
        (((1, 4, 2, 3), (1, 2, 2, 3), (1, 2, 4, 3)), "tokens"),
        (((4, 2, 3), (2, 2, 3), (2, 2, 3)), "must be"),
    ],
)
def test_refuses_shapes(shapes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_heads(*(torch.zeros(shape) for shape in shapes))


def test_refuses_calls() -> None:
    q, k, v = inputs(l=S + 1)
    with pytest.raises(ValueError, match="causal"):
        attend(q, k, v, causal=True)
    with pytest.raises(ValueError, match="dropout"):
        attend(q, k, v, dropout=0.1, backend="flex")
