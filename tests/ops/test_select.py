"""Tables of chosen blocks against sorting in Python."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.ops import select


@pytest.mark.parametrize(("s", "size"), [(12, 4), (13, 4), (3, 5), (7, 1)])
def test_block_means(s: int, size: int) -> None:
    k = torch.randn(2, 3, s, 5, dtype=torch.float64, requires_grad=True)
    means = select.block_means(k, size)
    expected = torch.stack([part.mean(2) for part in k.split(size, 2)], 2)
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-14)
    cotangent = torch.randn_like(means)
    gradients = [torch.autograd.grad(y, k, cotangent)[0] for y in (means, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


def test_block_means_of_real_tokens_only() -> None:
    k = torch.randn(3, 2, 11, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([11, 6, 0])
    means = select.block_means(k, 4, lengths)
    for i, n in enumerate(lengths.tolist()):
        for block in range(3):
            real = k[i, :, 4 * block : min(4 * block + 4, n)]
            expected = real.mean(1) if real.numel() else torch.zeros(2, 4, dtype=torch.float64)
            torch.testing.assert_close(means[i, :, block], expected, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(means.sum(), k)
    assert not gradient[1, :, 6:].any()
    assert not gradient[2].any()
    assert gradient[1, :, :6].all()


def test_block_means_of_half_precision_are_float32() -> None:
    k = torch.randn(1, 1, 64, 8).to(torch.bfloat16)
    means = select.block_means(k, 32)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, k.float().unflatten(2, (2, 32)).mean(3), rtol=0, atol=1e-6)


def choose(row: list[float], k: int, eligible: list[bool], forced: list[bool]) -> list[int]:
    may = [i for i in range(len(row)) if eligible[i] or forced[i]]
    return sorted(may, key=lambda i: (not forced[i], -row[i], i))[:k]


@settings(deadline=None)
@given(data=st.data(), n=st.integers(1, 7), k=st.integers(1, 9))
def test_topk_blocks_sorts_by_force_affinity_and_index(data, n: int, k: int) -> None:
    few = st.sampled_from([-float("inf"), -1.0, 0.0, 1.0, float("inf")])
    row = data.draw(st.lists(few, min_size=n, max_size=n))
    eligible, forced = (data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(2))
    index, valid = select.topk_blocks(torch.tensor([row]), k, torch.tensor([eligible]), torch.tensor([forced]))
    expected = choose(row, k, eligible, forced)
    assert index.shape == valid.shape == (1, k)
    assert index.dtype == torch.int64
    assert valid[0].tolist() == [slot < len(expected) for slot in range(k)]
    assert index[0].tolist() == expected + [0] * (k - len(expected))


def test_topk_blocks_of_batches_with_broadcast_masks() -> None:
    affinity = torch.randn(2, 3, 5, 6)
    causal = torch.ones(5, 6, dtype=torch.bool).tril(-1)
    own = torch.eye(5, 6, dtype=torch.bool)
    index, valid = select.topk_blocks(affinity, 3, eligible=causal, forced=own)
    for i, j, t in product(range(2), range(3), range(5)):
        expected = choose(affinity[i, j, t].tolist(), 3, causal[t].tolist(), own[t].tolist())
        assert index[i, j, t][valid[i, j, t]].tolist() == expected
    assert valid.sum(-1).eq(torch.tensor([1, 2, 3, 3, 3])).all()


def test_ties_go_to_the_first_of_many() -> None:
    index, valid = select.topk_blocks(torch.zeros(1, 1, 2, 1000), 4)
    assert index.tolist() == [[[[0, 1, 2, 3]] * 2]]
    assert valid.all()


def test_choosing_carries_no_gradient() -> None:
    index, valid = select.topk_blocks(torch.randn(1, 4, requires_grad=True), 2)
    assert not index.requires_grad
    assert not valid.requires_grad


def test_to_dense_and_back() -> None:
    index = torch.tensor([[2, 0, 2], [1, 3, 0], [0, 0, 0]])
    valid = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    dense = select.to_dense(index, valid, 4)
    assert dense.tolist() == [[False, False, True, False], [True, True, False, True], [False] * 4]
    table, used = select.to_table(dense)
    assert table.tolist() == [[2, 0, 0], [0, 1, 3], [0, 0, 0]]
    assert used.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    assert select.to_table(dense[2:])[0].shape == (1, 1)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="k=0"):
        select.topk_blocks(torch.zeros(1, 3), 0)
    with pytest.raises(ValueError, match="size=0"):
        select.block_means(torch.zeros(1, 1, 4, 2), 0)
