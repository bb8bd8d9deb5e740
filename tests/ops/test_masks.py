"""Mask functions against their rule, pair by pair, and the forms made of them."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from regard.ops.attend import attend
from regard.ops.masks import (
    Mask,
    block_mask,
    blocks,
    both,
    causal,
    count,
    dense,
    dilated,
    documents,
    either,
    grid_window,
    inverse,
    key_padding,
    neighborhood,
    prefix,
    window,
)

L, S = 9, 11
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]])
LEFT = torch.tensor([0, 2, 5])

RULES: list[tuple[Mask, Callable[[int, int, int, int], bool]]] = [
    (causal(), lambda b, h, i, j: j <= i),
    (causal(S - L), lambda b, h, i, j: j <= i + 2),
    (window(2, 1), lambda b, h, i, j: i - 2 <= j <= i + 1),
    (window(LEFT, 0), lambda b, h, i, j: i - int(LEFT[h]) <= j <= i),
    (dilated(2, 3), lambda b, h, i, j: j - i in (-6, -3, 0, 3, 6)),
    (blocks(4), lambda b, h, i, j: i // 4 == j // 4),
    (prefix(3), lambda b, h, i, j: j < 3),
    (documents(IDS[0]), lambda b, h, i, j: bool(IDS[0, i] == IDS[0, j])),
    (documents(IDS), lambda b, h, i, j: bool(IDS[b, i] == IDS[b, j])),
    (key_padding(torch.tensor([0, 7])), lambda b, h, i, j: j < (0, 7)[b]),
    (inverse(causal()), lambda b, h, i, j: j > i),
    (both(causal(), window(3, 3), blocks(5)), lambda b, h, i, j: i - 3 <= j <= i and i // 5 == j // 5),
    (either(prefix(2), causal()), lambda b, h, i, j: j < 2 or j <= i),
    (lambda b, h, q, kv: (kv - h) % 3 == 0, lambda b, h, i, j: (j - h) % 3 == 0),
]


@pytest.mark.parametrize(("mask", "rule"), RULES)
def test_rules(mask: Mask, rule: Callable[[int, int, int, int], bool]) -> None:
    got = dense(mask, 2, 3, L, S)
    assert got.shape == (2, 3, L, S)
    for b, h, i, j in itertools.product(range(2), range(3), range(L), range(S)):
        assert bool(got[b, h, i, j]) == rule(b, h, i, j), (b, h, i, j)


@pytest.mark.parametrize(("mask", "rule"), RULES)
def test_count_and_block_mask(mask: Mask, rule: Callable[[int, int, int, int], bool]) -> None:
    wanted = sum(rule(*at) for at in itertools.product(range(2), range(3), range(L), range(S)))
    assert count(mask, 2, 3, L, S, rows=4) == wanted
    made = block_mask(mask, 2, 3, L, S, block_size=4)
    allowed = dense(mask, 2, 3, L, S)
    cells = F.pad(allowed, (0, 1, 0, 3)).reshape(2, 3, 3, 4, 3, 4).any(3).any(-1)
    assert torch.equal(made.to_dense().bool(), cells)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs_on_it() -> None:
    mask = both(causal(), window(LEFT, 0), documents(IDS))
    q, k, v = torch.randn(2, 3, L, 16), torch.randn(2, 3, L, 16), torch.randn(2, 3, L, 16)
    out = flex_attention(q, k, v, block_mask=block_mask(mask, 2, 3, L, L))
    torch.testing.assert_close(out, attend(q, k, v, mask=dense(mask, 2, 3, L, L)))


def neighbors(length: int, k: int, step: int, i: int) -> set[int]:
    """The residue class of i as a list, and the window of k places nearest to it inside that list."""
    members = list(range(i % step, length, step))
    start = min(max(members.index(i) - k // 2, 0), len(members) - k)
    return set(members[start : start + k])


@pytest.mark.parametrize(
    ("grid", "kernel_size", "dilation"),
    [
        ((7,), 3, 1),
        ((7,), 7, 1),
        ((11,), 3, 3),
        ((8,), 4, 2),
        ((5, 7), 3, 1),
        ((5, 7), (5, 3), (1, 2)),
        ((3, 4, 5), 3, 1),
        ((4,), 1, 3),
    ],
)
def test_neighborhood(grid: tuple[int, ...], kernel_size: int, dilation: int) -> None:
    axes = len(grid)
    kernels = (kernel_size,) * axes if isinstance(kernel_size, int) else kernel_size
    steps = (dilation,) * axes if isinstance(dilation, int) else dilation
    cells = list(itertools.product(*map(range, grid)))
    got = dense(neighborhood(grid, kernel_size, dilation), 1, 1, len(cells), len(cells))[0, 0]
    for row, here in enumerate(cells):
        seen = {there for there, allowed in zip(cells, got[row]) if allowed}
        assert seen == set(itertools.product(*map(neighbors, grid, kernels, steps, here)))
        assert here in seen
        assert len(seen) == torch.tensor(kernels).prod()


def test_neighborhood_shifts_inward() -> None:
    got = dense(neighborhood((6,), 3), 1, 1, 6, 6)[0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in got] == [
        [0, 1, 2],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
        [3, 4, 5],
    ]


@pytest.mark.parametrize(
    ("grid", "size", "shift"), [((8,), 4, 2), ((8, 6), (4, 2), (2, 1)), ((6, 6), 3, 0), ((6, 9), 3, (0, 2))]
)
def test_grid_window_is_the_shifted_window_scheme(grid: tuple[int, ...], size: int, shift: int) -> None:
    """Roll, cut, and number the regions between the last two cuts, as shifted-window attention does."""
    axes = len(grid)
    sizes = (size,) * axes if isinstance(size, int) else size
    shifts = (shift,) * axes if isinstance(shift, int) else shift
    region, place = torch.zeros(grid, dtype=torch.long), torch.zeros(grid, dtype=torch.long)
    for axis, (length, n, t) in enumerate(zip(grid, sizes, shifts)):
        line = torch.arange(length)
        numbers = (line >= length - n).long() + (line >= length - t) if t else torch.zeros_like(line)
        shape = [-1 if a == axis else 1 for a in range(axes)]
        region = region * 3 + numbers.view(shape)
        place = place * 100 + (line // n).view(shape)
    region, place = (x.roll(tuple(shifts), tuple(range(axes))).flatten() for x in (region, place))
    wanted = (region[:, None] == region) & (place[:, None] == place)
    assert torch.equal(dense(grid_window(grid, size, shift), 1, 1, len(region), len(region))[0, 0], wanted)


def test_grid_window_with_odd_sides() -> None:
    assert dense(grid_window((5,), 2, 1), 1, 1, 5, 5)[0, 0].sum(-1).tolist() == [1, 2, 2, 2, 2]


def test_dense_takes_no_memory_where_it_does_not_depend() -> None:
    assert dense(causal(), 50, 40, 8, 8).untyped_storage().nbytes() == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: neighborhood((4, 4), 5), "kernel_size=5"),
        (lambda: neighborhood((8,), 3, 3), "dilation=3"),
        (lambda: neighborhood((8, 8), (3, 3, 3)), "kernel_size"),
        (lambda: neighborhood((8,), 0), "kernel_size=0"),
        (lambda: grid_window((8,), 4, 4), "shift=4"),
        (lambda: window(-1, 0), "left=-1"),
        (lambda: window(0, torch.tensor([1, -1])), "right"),
        (lambda: dilated(2, 0), "step=0"),
        (lambda: dilated(-1, 1), "window=-1"),
        (lambda: blocks(0), "size=0"),
        (lambda: both(), "both"),
        (lambda: either(), "either"),
    ],
)
def test_refusals(make: Callable[[], Mask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
