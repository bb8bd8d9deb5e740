"""Attention in parts: equal to the whole, in values and gradients."""

import pytest
import torch
from torch import Tensor

from regard.ops.attend import causal_mask, reference, scores
from regard.ops.merge import attend_lse, logsumexp, merge_lse


def inputs(b: int = 2, h: int = 4, g: int = 2, l: int = 7, s: int = 9, d: int = 3, e: int = 5) -> list[Tensor]:
    shapes = ((b, h, l, d), (b, g, s, d), (b, g, s, e))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, **kw) -> tuple[Tensor, Tensor]:
    """Out from the reference; log-sum-exp from a sum of exponentials."""
    mask, causal = kw.pop("mask", None), kw.pop("causal", False)
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask
    if causal:
        allowed = allowed & causal_mask(q.shape[2], k.shape[2])
    total = (scores(q, k, **kw).exp() * allowed).sum(-1)
    return reference(q, k, v, mask=allowed, **kw), torch.where(total > 0, total, 1.0).log().masked_fill(
        total == 0, -torch.inf
    )


def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    """Values of both outputs, and gradients through both at once; gradients of -inf are not asked for."""
    up = [torch.randn_like(x) for x in wanted]
    up[1] = up[1].masked_fill(wanted[1].isinf(), 0.0)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, leaves, up), torch.autograd.grad(wanted, leaves, up)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_shape", [None, (9,), (7, 9), (2, 1, 7, 9), (2, 4, 1, 9)])
def test_attend_lse(chunk: int, causal: bool, mask_shape: tuple | None) -> None:
    leaves = inputs()
    bias = torch.randn(4, 7, 9, dtype=torch.float64, requires_grad=True)
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.5
    kw = {"mask": mask, "bias": bias, "causal": causal, "scale": 0.6}
    same(attend_lse(*leaves, chunk=chunk, **kw), plain(*leaves, **kw), [*leaves, bias])


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 3, 5], [0, 9, 0]])
@pytest.mark.parametrize("b", [1, 2])
def test_parts_merge_to_the_whole(sizes: list[int], b: int) -> None:
    q, k, v = inputs(b=b)
    mask = torch.rand(b, 4, 7, 9) < 0.4
    mask[..., 2, :] = False
    mask[:, 0, :, 4:] = False
    parts = zip(k.split(sizes, 2), v.split(sizes, 2), mask.split(sizes, -1))
    outs, lses = zip(*(attend_lse(q, x, y, mask=m, chunk=2) for x, y, m in parts))
    same(merge_lse(outs, lses), plain(q, k, v, mask=mask), [q, k, v])


def test_empty_parts_add_nothing() -> None:
    out, lse = torch.randn(3, 2), torch.tensor([0.5, -torch.inf, 2.0])
    nothing = torch.full((3,), -torch.inf)
    merged, total = merge_lse([out, torch.full((3, 2), torch.nan)], [lse, nothing])
    torch.testing.assert_close(total, lse)
    torch.testing.assert_close(merged, out * torch.tensor([[1.0], [0.0], [1.0]]))


def test_all_parts_empty() -> None:
    q, k, v = inputs()
    nothing = torch.zeros(9, dtype=torch.bool)
    out, lse = merge_lse(*zip(*(attend_lse(q, k, v, mask=nothing) for _ in range(2))))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v)):
        assert (grad == 0).all()


def test_far_apart_parts() -> None:
    outs, lses = [torch.tensor([[1.0]]), torch.tensor([[5.0]])], [torch.tensor([2000.0]), torch.tensor([-2000.0])]
    out, lse = merge_lse(outs, lses)
    assert out.item() == 1.0
    assert lse.item() == 2000.0


def test_no_keys_and_no_queries() -> None:
    q, k, v = inputs(s=0)
    out, lse = attend_lse(q, k, v)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all(x.shape[2] == 0 for x in attend_lse(*inputs(l=0)))


def test_twice_differentiable() -> None:
    leaves = inputs(b=1, h=2, g=1, l=3, s=4, d=2, e=2)
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend_lse(*x, mask=mask, chunk=2)
        return out, lse.exp()

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(both, leaves, fast_mode=True)


def test_half_precision_keeps_the_log_precise() -> None:
    q, k, v = (x.detach() for x in inputs(s=200))
    out, lse = attend_lse(*(x.bfloat16() for x in (q, k, v)))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wanted = plain(*(x.bfloat16().double() for x in (q, k, v)))[1]
    torch.testing.assert_close(lse.double(), wanted, rtol=0, atol=1e-5)
    assert merge_lse([out, out], [lse, lse])[0].dtype == torch.bfloat16


def test_logsumexp_of_scores() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(logsumexp(x), x.exp().sum(-1).log())
    mask = torch.tensor([True, False, True, False])
    torch.testing.assert_close(logsumexp(x, mask), x[..., ::2].exp().sum(-1).log())
    assert torch.autograd.gradcheck(lambda z: logsumexp(z, mask), x)


def test_refusals() -> None:
    q, k, v = inputs(l=10)
    with pytest.raises(ValueError, match="causal"):
        attend_lse(q, k, v, causal=True)
    with pytest.raises(ValueError, match="chunk=0"):
        attend_lse(q, k, v, chunk=0)
    with pytest.raises(ValueError, match="outs and lses"):
        merge_lse([], [])
