"""Windows against loops over coordinates, and against the Swin tables of other libraries."""

from itertools import product
from math import prod

import pytest
import torch

from regard.ops import windows as W
from regard.ops.attend import attend

CASES = [((6,), (3,)), ((4, 9), (2, 3)), ((6, 4), (6, 1)), ((4, 2, 6), (2, 2, 3))]


def index_map(batch: int, grid: tuple[int, ...]) -> torch.Tensor:
    """Every token holds its own coordinates, the sample first."""
    axes = torch.meshgrid(*[torch.arange(n) for n in (batch, *grid)], indexing="ij")
    return torch.stack(axes, -1)


@pytest.mark.parametrize(("grid", "size"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_partition(grid: tuple[int, ...], size: tuple[int, ...], batch: int) -> None:
    counts = [n // s for n, s in zip(grid, size)]
    rows = [
        [[i, *(w * s + t for w, s, t in zip(window, size, token))] for token in product(*map(range, size))]
        for i in range(batch)
        for window in product(*map(range, counts))
    ]
    x = index_map(batch, grid)
    windows = W.partition(x, size)
    assert windows.tolist() == rows
    assert torch.equal(W.unpartition(windows, size, grid), x)


@pytest.mark.parametrize(("grid", "size"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_grid_partition(grid: tuple[int, ...], size: tuple[int, ...], batch: int) -> None:
    strides = [n // s for n, s in zip(grid, size)]
    rows = [
        [[i, *(t * stride + o for t, stride, o in zip(token, strides, offset))] for token in product(*map(range, size))]
        for i in range(batch)
        for offset in product(*map(range, strides))
    ]
    x = index_map(batch, grid)
    windows = W.grid_partition(x, size)
    assert windows.tolist() == rows
    assert torch.equal(W.grid_unpartition(windows, size, grid), x)


def test_one_integer_is_every_axis_and_no_sample_is_allowed() -> None:
    x = torch.randn(2, 4, 6, 3)
    assert torch.equal(W.partition(x, 2), W.partition(x, (2, 2)))
    empty = W.partition(x[:0], 2)
    assert empty.shape == (0, 4, 3)
    assert W.unpartition(empty, 2, (4, 6)).shape == (0, 4, 6, 3)


def test_shift_moves_tokens_and_back() -> None:
    x = index_map(2, (4, 5))
    moved = W.shift(x, (1, 3))
    assert moved[0, 0, 0].tolist() == [0, 1, 3]
    assert moved[1, 3, 4].tolist() == [1, 0, 2]
    assert torch.equal(W.unshift(moved, (1, 3)), x)
    assert torch.equal(W.shift(x, 0), x)


@pytest.mark.parametrize(("grid", "size", "amount"), [((9,), 3, 1), ((8, 12), 4, 2), ((6, 9), (2, 3), (1, 0))])
def test_shift_mask_keeps_true_neighbours(grid, size, amount) -> None:
    sizes = W.per_axis(size, len(grid), "size")
    windows = W.partition(W.shift(index_map(1, grid), amount), size)[..., 1:]
    distance = (windows[:, :, None] - windows[:, None]).abs()
    assert torch.equal(W.shift_mask(grid, size, amount), (distance < torch.tensor(sizes)).all(-1))


def test_shift_mask_is_that_of_timm() -> None:
    swin = pytest.importorskip("timm.models.swin_transformer")
    block = swin.SwinTransformerBlock(8, (12, 8), num_heads=2, window_size=4, shift_size=2, always_partition=True)
    assert torch.equal(W.shift_mask((12, 8), 4, 2), block.attn_mask == 0)


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (7, 4)])
def test_relative_index_is_that_of_timm(size: tuple[int, int]) -> None:
    swin = pytest.importorskip("timm.models.swin_transformer")
    assert torch.equal(W.relative_index(size), swin.get_relative_position_index(*size))


def test_relative_index_is_that_of_torchvision() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    layer = swin.ShiftedWindowAttention(8, [4, 3], [0, 0], 2)
    assert torch.equal(W.relative_index((4, 3)).flatten(), layer.relative_position_index)


@pytest.mark.parametrize("size", [(4,), (2, 3, 2)])
def test_relative_index_on_any_axes(size: tuple[int, ...]) -> None:
    table = torch.arange(prod(2 * s - 1 for s in size)).view([2 * s - 1 for s in size])
    tokens = list(product(*map(range, size)))
    expected = [[table[tuple(a - b + s - 1 for a, b, s in zip(i, j, size))].item() for j in tokens] for i in tokens]
    assert W.relative_index(size).tolist() == expected


@pytest.mark.parametrize(
    ("grid", "block", "border"), [((6,), 2, 1), ((4, 6), 2, 3), ((4, 9), (2, 3), (1, 0)), ((3, 5), 1, 2)]
)
def test_halo(grid, block, border) -> None:
    blocks, halos = W.per_axis(block, len(grid), "b"), W.per_axis(border, len(grid), "h", least=0)
    x = torch.randn(2, *grid, 3, dtype=torch.float64, requires_grad=True)
    keys, valid = W.halo(x, block, border)
    counts = [n // s for n, s in zip(grid, blocks)]
    seen = torch.zeros(grid, dtype=torch.float64)
    for i in range(2):
        for w, window in enumerate(product(*map(range, counts))):
            for t, token in enumerate(product(*(range(s + 2 * h) for s, h in zip(blocks, halos)))):
                at = tuple(o * s + j - h for o, s, j, h in zip(window, blocks, token, halos))
                inside = all(0 <= a < n for a, n in zip(at, grid))
                assert valid[w, t].item() is inside
                assert torch.equal(
                    keys[i * prod(counts) + w, t], x[(i, *at)] if inside else torch.zeros_like(keys[0, 0])
                )
                seen[at if inside else (0,) * len(grid)] += inside
    (gradient,) = torch.autograd.grad(keys.sum(), x)
    assert torch.equal(gradient, (seen / 2)[None, ..., None].expand_as(x))


def test_halo_of_nothing_is_partition() -> None:
    x = torch.randn(2, 6, 4, 3)
    keys, valid = W.halo(x, (3, 2), 0)
    assert torch.equal(keys, W.partition(x, (3, 2)))
    assert valid.all()


def neighbours(i: int, length: int, kernel: int, dilation: int) -> list[int]:
    """The rule by its mask: within the residue class, no further from the clamped centre than the kernel reaches."""
    left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
    group = [j for j in range(length) if j % dilation == i % dilation]
    centre = min(max(group.index(i), left), len(group) - 1 - right)
    return [j for step, j in enumerate(group) if centre - left <= step <= centre + right]


@pytest.mark.parametrize(
    ("length", "kernel", "dilation"),
    [(7, 3, 1), (7, 7, 1), (8, 4, 1), (5, 1, 1), (11, 3, 2), (10, 3, 3), (13, 2, 5), (9, 3, 3), (1, 1, 1)],
)
def test_neighborhood_index(length: int, kernel: int, dilation: int) -> None:
    index = W.neighborhood_index(length, kernel, dilation)
    assert index.tolist() == [neighbours(i, length, kernel, dilation) for i in range(length)]
    assert all(i in row and len(set(row)) == kernel for i, row in enumerate(index.tolist()))


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"),
    [((5, 7), 3, 1), ((6, 9), (3, 5), 1), ((7, 10), 3, (2, 3)), ((3, 4, 5), 3, 1), ((6,), 3, 2)],
)
def test_neighborhood_of_a_grid_and_its_biases(grid, kernel, dilation) -> None:
    kernels, dilations = W.per_axis(kernel, len(grid), "k"), W.per_axis(dilation, len(grid), "d")
    flat = torch.arange(prod(grid)).view(grid)
    table = torch.arange(prod(2 * k - 1 for k in kernels)).view([2 * k - 1 for k in kernels])
    index, relative = (
        W.neighborhood_grid_index(grid, kernel, dilation),
        W.neighborhood_relative_index(grid, kernel, dilation),
    )
    for n, at in enumerate(product(*map(range, grid))):
        keys = list(product(*(neighbours(i, *axis) for i, axis in zip(at, zip(grid, kernels, dilations)))))
        assert index[n].tolist() == [flat[key].item() for key in keys]
        offsets = [tuple((j - i) // d + k - 1 for i, j, d, k in zip(at, key, dilations, kernels)) for key in keys]
        assert relative[n].tolist() == [table[offset].item() for offset in offsets]


def test_padding_is_undone_and_absent_where_not_needed() -> None:
    x = torch.randn(2, 5, 6, 3)
    padded, valid, grid = W.pad_to_multiple(x, (4, 3))
    assert padded.shape == (2, 8, 6, 3)
    assert valid is not None
    assert valid.tolist() == [[y < 5] * 6 for y in range(8)]
    assert not padded[:, 5:].any()
    assert torch.equal(W.crop(padded, grid), x)
    same, none, _ = W.pad_to_multiple(x, (5, 2))
    assert same is x
    assert none is None


def test_padded_windows_attend_as_the_map_does() -> None:
    size, grid = 3, (5, 7)
    x = torch.randn(2, *grid, 4, dtype=torch.float64, requires_grad=True)
    padded, valid, _ = W.pad_to_multiple(x, size)
    tokens = W.partition(padded, size)[:, None]
    keys = W.partition(valid[None, ..., None], size)[..., 0].repeat(2, 1)
    out = attend(tokens, tokens, tokens, mask=keys[:, None, None])[:, 0]
    out = W.crop(W.unpartition(out, size, padded.shape[1:-1]), grid).flatten(1, 2)

    window = torch.tensor([[y // size, z // size] for y, z in product(*map(range, grid))])
    dense = x.flatten(1, 2)[:, None]
    expected = attend(dense, dense, dense, mask=(window[:, None] == window).all(-1), backend="reference")[:, 0]
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y, x, cotangent)[0] for y in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x: W.partition(x, 5), "size=5 must divide"),
        (lambda x: W.grid_partition(x, (2, 4)), "must divide"),
        (lambda x: W.partition(x, 0), "size=0"),
        (lambda x: W.partition(x, (2, 2, 2)), "2 grid axes"),
        (lambda x: W.unpartition(x[:, 0], 2, (4, 6)), "windows"),
        (lambda x: W.unpartition(torch.zeros(5, 4, 3), 2, (4, 6)), "windows"),
        (lambda x: W.shift(x, -1), "amount=-1"),
        (lambda x: W.shift_mask((4, 6), 2, 2), "amount=2 must be smaller"),
        (lambda x: W.halo(x, 5, 1), "block_size=5"),
        (lambda x: W.halo(x, 2, -1), "halo_size=-1"),
        (lambda x: W.neighborhood_index(5, 3, 2), "length=5"),
        (lambda x: W.neighborhood_index(5, 0), "kernel_size=0"),
        (lambda x: W.pad_to_multiple(x, (2, 0)), "size"),
        (lambda x: W.crop(x, (4, 7)), "grid="),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call(torch.zeros(2, 4, 6, 3))
