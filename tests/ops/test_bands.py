"""Banded attention: equal to the dense mask, with work that follows the allowed pairs."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regard.ops.attend import attend
from regard.ops.bands import attend_banded, bands
from regard.ops.masks import Mask, both, causal, count, dense, dilated, documents, key_padding, neighborhood, window


def inputs(b: int, h: int, g: int, l: int, s: int, d: int = 4, e: int = 4) -> list[Tensor]:
    shapes = ((b, h, l, d), (b, g, s, d), (b, g, s, e))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


IDS = torch.tensor([0] * 5 + [1] * 9 + [2] * 21)
MASKS = {
    "window": window(3, 2),
    "causal": causal(),
    "per head": window(torch.tensor([0, 1, 4, 9]), 0),
    "dilated": dilated(2, 5),
    "documents": documents(IDS),
    "neighborhood": neighborhood((5, 7), 3),
    "padded": both(causal(), key_padding(torch.tensor([0, 13]))),
    "far keys only": lambda b, h, q, kv: ((kv < 2) | (kv >= 33)) & (q % 3 > 0),
    "nothing": lambda b, h, q, kv: (q < 0) & (kv < 0),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equals_dense(name: str, rows: int, backend: str) -> None:
    mask, l, s = MASKS[name], 35, 35
    leaves = inputs(2, 4, 2, l, s, e=4 if backend == "sdpa" else 3)
    plan = bands(mask, l, s, rows, b=2, h=4)
    out = attend_banded(*leaves, plan, scale=0.8, backend=backend)
    wanted = attend(*leaves, mask=dense(mask, 2, 4, l, s), scale=0.8, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    up = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, up), torch.autograd.grad(wanted, leaves, up)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("l", "s"), [(6, 17), (17, 6), (1, 17), (0, 5)])
def test_other_numbers_of_keys(l: int, s: int) -> None:
    leaves = inputs(1, 1, 1, l, s)
    mask = window(4, 4)
    torch.testing.assert_close(
        attend_banded(*leaves, bands(mask, l, s, 5)), attend(*leaves, mask=dense(mask, 1, 1, l, s))
    )


def test_twice_differentiable() -> None:
    leaves = inputs(1, 2, 1, 5, 5, d=2, e=2)
    plan = bands(dilated(1, 2), 5, 5, 2)
    assert torch.autograd.gradgradcheck(lambda *x: attend_banded(*x, plan, backend="reference"), leaves, fast_mode=True)


def test_plan() -> None:
    plan = bands(window(2, 0), 12, 12, 4)
    assert [(p.rows, p.keys) for p in plan.parts] == [
        (slice(0, 4), slice(0, 4)),
        (slice(4, 8), slice(2, 8)),
        (slice(8, 12), slice(6, 12)),
    ]
    assert plan.pairs == 4 * (4 + 6 + 6)
    full = bands(window(12, 12), 12, 12, 4)
    assert all(p.mask is None for p in full.parts)
    scattered = bands(lambda b, h, q, kv: kv % 10 == 0, 4, 31, 4).parts[0]
    assert scattered.keys.tolist() == [0, 10, 20, 30]
    assert scattered.mask is None


def work(mask: Mask, n: int) -> tuple[int, int]:
    """Matrix products and elements written, forward and backward."""

    class Written(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not is_view:
                self.total += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    leaves, plan = inputs(1, 1, 1, n, n), bands(mask, n, n, 16)
    with FlopCounterMode(display=False) as flops, Written() as written:
        attend_banded(*leaves, plan, backend="reference").sum().backward()
    return flops.get_total_flops(), written.total


@pytest.mark.parametrize("mask", [window(15, 0), window(8, 8)])
def test_work_follows_the_allowed_pairs(mask: Mask) -> None:
    flops, written = zip(*(work(mask, n) for n in (256, 1024)))
    pairs = [count(mask, 1, 1, n, n) for n in (256, 1024)]
    assert flops[1] / flops[0] == pytest.approx(pairs[1] / pairs[0], rel=0.05)
    assert written[1] / written[0] == pytest.approx(pairs[1] / pairs[0], rel=0.05)
    assert bands(mask, 1024, 1024, 16).pairs < 2.1 * pairs[1]
    assert flops[1] == 6 * 2 * 4 * bands(mask, 1024, 1024, 16).pairs


def test_neighborhood_work_is_a_few_rows_of_the_grid() -> None:
    mask = neighborhood((32, 32), 5)
    assert bands(mask, 1024, 1024, 32).pairs == 1024 * 5 * 32


def test_refusals() -> None:
    q, k, v = inputs(1, 1, 1, 8, 8)
    with pytest.raises(ValueError, match="plan is for l=8, s=9"):
        attend_banded(q, k, v, bands(causal(), 8, 9))
    with pytest.raises(ValueError, match="rows=0"):
        bands(causal(), 8, 8, 0)
