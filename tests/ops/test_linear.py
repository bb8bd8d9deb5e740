"""Linear attention against the matrix of its weights."""

import pytest
import torch
from torch import Tensor

from regard.ops import linear


def inputs(b: int, h: int, g: int, l: int, s: int, d: int = 4, e: int = 3) -> list[Tensor]:
    shapes = [(b, h, l, d), (b, g, s, d), (b, g, s, e)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in (q.exp(), k.exp(), v)]


def weights(q: Tensor, k: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return torch.stack([q[:, i] @ k[:, i // groups].transpose(-1, -2) for i in range(q.shape[1])], 1)


def mixed(a: Tensor, v: Tensor) -> Tensor:
    groups = a.shape[1] // v.shape[1]
    return torch.stack([a[:, i] @ v[:, i // groups] for i in range(a.shape[1])], 1)


def agree(out: Tensor, expected: Tensor, leaves: list[Tensor], atol: float = 1e-12) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=atol)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (out, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=atol)


@pytest.mark.parametrize("shape", [(2, 3, 3, 7, 11), (1, 1, 1, 1, 1), (2, 6, 2, 5, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_bidirectional(shape: tuple[int, ...], masked: bool) -> None:
    q, k, v = leaves = inputs(*shape)
    b, s = shape[0], shape[4]
    mask = torch.arange(s) < torch.randint(1, s + 1, (b, 1)) if masked else None
    a = weights(q, k) * (1.0 if mask is None else mask[:, None, None])
    n = torch.full((b, 1, 1, 1), s) if mask is None else mask.sum(1)[:, None, None, None]
    agree(linear.linear_attend_image(q, k, v, mask), mixed(a, v) / n, leaves)
    agree(linear.linear_attend(q, k, v, mask, eps=1e-3), mixed(a / n / (a.sum(-1, keepdim=True) / n + 1e-3), v), leaves)


def test_one_mask_serves_the_batch_and_no_key_is_zero() -> None:
    leaves = inputs(2, 2, 1, 3, 5)
    one = torch.tensor([[True, False, True, True, False]])
    agree(linear.linear_attend(*leaves, one), linear.linear_attend(*leaves, one.expand(2, 5)), leaves)
    for out in (linear.linear_attend(*leaves, ~one & one), linear.linear_attend_image(*leaves, ~one & one)):
        assert not out.any()
        assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_rows_sum_to_one() -> None:
    q, k, _ = inputs(2, 4, 2, 7, 9)
    ones = torch.ones(2, 2, 9, 1, dtype=torch.float64)
    torch.testing.assert_close(
        linear.linear_attend(q, k, ones, eps=0.0), torch.ones_like(q[..., :1]), rtol=0, atol=1e-14
    )


def test_sums_do_not_overflow() -> None:
    q, k, v = (torch.full((1, 1, 4096, 8), x) for x in (1.0, 1e18, 1e18))  # n k v is beyond float32, k v is not
    torch.testing.assert_close(linear.linear_attend_image(q, k, v), 8e18 * v, rtol=1e-3, atol=0)
    torch.testing.assert_close(linear.linear_attend(q, k, v), v, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [linear.linear_attend, linear.linear_attend_image])
def test_half_precision_is_rounded_once(function, dtype: torch.dtype) -> None:
    q, k, v = (torch.rand(1, 2, 300, 8).to(dtype) for _ in range(3))
    out = function(q, k, v)
    assert out.dtype == dtype
    assert torch.equal(out, function(q.float(), k.float(), v.float()).to(dtype))


DECAYS = {
    "none": lambda b, h, l: None,
    "head": lambda b, h, l: torch.rand(h, dtype=torch.float64),
    "step": lambda b, h, l: torch.rand(b, h, l, dtype=torch.float64),
    "resets": lambda b, h, l: torch.rand(b, h, l, dtype=torch.float64) * (torch.rand(b, h, l) < 0.7),
}


def quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, normalize: bool) -> Tensor:
    b, h, l, _ = q.shape
    steps = torch.ones(b, h, l, dtype=q.dtype) if decay is None else decay
    steps = steps[:, None].expand(b, h, l) if steps.ndim == 1 else steps
    rows = [[steps[..., s + 1 : t + 1].prod(-1) if s <= t else steps[..., 0] * 0 for s in range(l)] for t in range(l)]
    a = weights(q, k) * torch.stack([torch.stack(row, -1) for row in rows], -2)
    return mixed(a / a.sum(-1, keepdim=True) if normalize else a, v)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize("shape", [(2, 3, 3, 11, 11), (1, 4, 2, 7, 7), (1, 1, 1, 1, 1)])
def test_causal(shape: tuple[int, ...], decay, normalize: bool) -> None:
    q, k, v = leaves = inputs(*shape)
    b, h, _, l, _ = shape
    rate = decay(b, h, l)
    if rate is not None:
        leaves = [*leaves, rate.requires_grad_()]
    expected = quadratic(q, k, v, rate, normalize)
    states = []
    for chunk in (1, 3, 4, l, 64):
        out, state = linear.linear_attend_causal(q, k, v, rate, chunk=chunk, normalize=normalize)
        agree(out, expected, leaves)
        states.append(state)
    for state in states:
        torch.testing.assert_close(state, states[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize("cut", [1, 5, 10])
def test_causal_goes_on_from_its_state(decay, normalize: bool, cut: int) -> None:
    q, k, v = leaves = inputs(2, 4, 2, 11, 11)
    rate = decay(2, 4, 11)
    steps = [None, None] if rate is None else [rate, rate] if rate.ndim == 1 else [rate[..., :cut], rate[..., cut:]]
    whole, last = linear.linear_attend_causal(q, k, v, rate, chunk=4, normalize=normalize)
    first, state = linear.linear_attend_causal(
        q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], steps[0], chunk=4, normalize=normalize
    )
    second, end = linear.linear_attend_causal(
        q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], steps[1], state, chunk=4, normalize=normalize
    )
    agree(torch.cat([first, second], 2), whole, leaves)
    agree(end, last, leaves[1:])


def test_causal_state_is_the_decayed_sum() -> None:
    _, k, v = leaves = inputs(1, 2, 2, 5, 5)
    rate = torch.tensor([0.5, 1.0], dtype=torch.float64)
    expected = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    for t in range(5):
        expected = rate[:, None, None] * expected + k[:, :, t, :, None] * v[:, :, t, None]
    _, state = linear.linear_attend_causal(*leaves, rate, chunk=2)
    agree(state, expected, [k, v])


def test_causal_sees_no_future() -> None:
    q, k, v = inputs(1, 2, 2, 9, 9)
    out, _ = linear.linear_attend_causal(q, k, v, chunk=4)
    for gradient in torch.autograd.grad(out[:, :, :5].sum(), (q, k, v)):
        assert not gradient[:, :, 5:].any()
        assert gradient[:, :, :5].any()


def test_causal_row_of_weight_zero_is_zero() -> None:
    q, k, v = inputs(1, 1, 1, 4, 4)
    blind = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    out, _ = linear.linear_attend_causal(q * blind, k, v, normalize=True)
    assert not out[:, :, 1].any()
    assert out[:, :, [0, 2, 3]].all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


def test_causal_half_precision_keeps_a_wide_state() -> None:
    q, k, v = (torch.rand(1, 1, 300, 8).to(torch.bfloat16) for _ in range(3))
    out, state = linear.linear_attend_causal(q, k, v)
    exact, _ = linear.linear_attend_causal(q.double(), k.double(), v.double())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_no_token_leaves_the_state() -> None:
    q, k, v = inputs(1, 2, 1, 0, 0)
    state = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    out, same = linear.linear_attend_causal(q, k, v, state=state)
    assert out.shape == (1, 2, 0, 3)
    assert torch.equal(same, state)


def test_bad_input_is_named() -> None:
    q, k, v = inputs(1, 4, 2, 5, 5)
    for bad, names in [
        (lambda: linear.linear_attend_causal(q[:, :, 1:], k, v), "4 tokens but k has 5"),
        (lambda: linear.linear_attend_causal(q, k, v, chunk=0), "chunk=0"),
        (lambda: linear.linear_attend_causal(q, k, v, torch.ones(2)), "decay"),
        (lambda: linear.linear_attend_causal(q, k, v, torch.ones(1, 4, 4)), "decay"),
        (lambda: linear.linear_attend_causal(q, k, v, state=torch.zeros(1, 4, 4, 3), normalize=True), "state"),
        (lambda: linear.linear_attend(q[:, :3], k, v), "multiple"),
    ]:
        with pytest.raises(ValueError, match=names):
            bad()
