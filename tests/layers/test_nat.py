"""Neighbourhood attention against keys gathered one query at a time, and what makes it a neighbourhood."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layers.vision.nat import NeighborhoodAttention, neighborhood_attention
from regard.nn import Attention
from regard.ops.sparse import gather_attend
from regard.ops.windows import neighborhood_grid_index, neighborhood_relative_index, partition, unpartition

CASES = [
    ((5, 9), 3, 1),
    ((7, 7), 7, 1),
    ((19, 11), 5, 1),
    ((7, 11), 3, (2, 3)),
    ((17, 10), 3, 3),
    ((6, 8), (2, 4), 1),
    ((1, 20), (1, 5), (1, 2)),
]


def heads(grid: tuple[int, int], batch: int = 2) -> list[Tensor]:
    n = grid[0] * grid[1]
    return [torch.randn(batch, 3, n, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize(("grid", "kernel", "dilation"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_gathered_keys(grid, kernel, dilation, masked: bool) -> None:
    q, k, v = heads(grid)
    y, x = (kernel, kernel) if isinstance(kernel, int) else kernel
    bias = torch.randn(3, 2 * y - 1, 2 * x - 1, dtype=torch.float64, requires_grad=True)
    index = neighborhood_grid_index(grid, kernel, dilation)
    mask = torch.rand(2, q.shape[2]) < 0.5 if masked else None
    valid = None if mask is None else mask[:, index][:, None]
    offsets = bias.flatten(1)[:, neighborhood_relative_index(grid, kernel, dilation)]
    expected = gather_attend(q, k, v, index, valid, bias=offsets[None])
    got = neighborhood_attention(q, k, v, grid, kernel, dilation, bias=bias, mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    pull, leaves = torch.randn_like(got), (q, k, v, bias)
    for a, b in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(expected, leaves, pull)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_without_bias_and_where_nothing_may_be_seen() -> None:
    q, k, v = heads((5, 6))
    got = neighborhood_attention(q, k, v, (5, 6), 3)
    torch.testing.assert_close(got, gather_attend(q, k, v, neighborhood_grid_index((5, 6), 3)), rtol=0, atol=1e-12)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 0] = True
    got = neighborhood_attention(q, k, v, (5, 6), 3, mask=mask)
    assert not got[1].any()
    near = torch.zeros(5, 6, dtype=torch.bool)
    near[:2, :2] = True  # the queries whose 3 x 3 neighbourhood holds the corner
    torch.testing.assert_close(got[0, :, near.flatten()], v[0, :, :1].expand(-1, 4, -1), rtol=0, atol=1e-12)
    assert not got[0, :, ~near.flatten()].any()


@pytest.mark.parametrize(("grid", "dilation"), [((9, 12), 1), ((9, 12), 2)])
def test_every_query_sees_k_squared_keys_and_itself(grid: tuple[int, int], dilation: int) -> None:
    n = grid[0] * grid[1]
    x = torch.zeros(1, 1, n, n, dtype=torch.float64)
    out = neighborhood_attention(x, x, torch.eye(n, dtype=torch.float64)[None, None], grid, 3, dilation)[0, 0]
    assert ((out > 0).sum(-1) == 9).all()
    assert (out.diagonal() > 0).all()
    torch.testing.assert_close(out[out > 0], torch.full((9 * n,), 1 / 9, dtype=torch.float64))


def make(kernel_size: int = 3, dilation: int = 1, dim: int = 12) -> NeighborhoodAttention:
    layer = NeighborhoodAttention(dim, 3, kernel_size, dilation).double()
    torch.nn.init.normal_(layer.rpb)
    return layer


def test_a_kernel_that_covers_the_map_is_plain_attention() -> None:
    layer, plain = make(5), Attention(12, 3).double()
    torch.nn.init.zeros_(layer.rpb)
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    state = {f"{name}.weight": w for name, w in zip("qkv", weights)} | {
        f"{name}.bias": b for name, b in zip("qkv", biases)
    }
    plain.load_state_dict(state | {"out.weight": layer.proj.weight, "out.bias": layer.proj.bias})
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    for grid in [(5, 3), (3, 5)]:
        torch.testing.assert_close(layer(x, grid=grid), plain(x), rtol=0, atol=1e-12)


def test_small_sides_slice_the_bias_table() -> None:
    layer, grid = make(5), (3, 4)
    x = torch.randn(1, 12, 12, dtype=torch.float64)
    q, k, v = layer.project(x)
    at = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    offset = at - at[:, None] + 4
    bias = layer.rpb[:, offset[..., 0], offset[..., 1]]
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid=grid), expected, rtol=0, atol=1e-12)


def test_a_dilation_longer_than_the_map_leaves_every_token_alone() -> None:
    layer, x = make(3, dilation=7), torch.randn(1, 12, 12, dtype=torch.float64)
    assert layer.clamped((3, 4)) == ((1, 1), (3, 4))
    alone = layer.proj(layer.project(x)[2].transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid=(3, 4)), alone, rtol=0, atol=1e-12)


def test_a_shifted_image_gives_shifted_outputs_and_fixed_windows_do_not() -> None:
    layer, side = make(3), 12
    image = torch.randn(1, side, side, 12, dtype=torch.float64)

    def neighbours(x: Tensor) -> Tensor:
        return layer(x.flatten(1, 2), grid=(side, side)).unflatten(1, (side, side))

    def windows(x: Tensor) -> Tensor:
        q, k, v = layer.project(partition(x, 3))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return unpartition(out, 3, (side, side))

    inner = slice(3, side - 2)
    for mixer, equivariant in ((neighbours, True), (windows, False)):
        moved = mixer(image.roll((1, 1), (1, 2)))[:, inner, inner]
        same = torch.allclose(moved, mixer(image).roll((1, 1), (1, 2))[:, inner, inner], rtol=0, atol=1e-12)
        assert same is equivariant


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_receptive_field_grows_by_half_a_kernel_a_layer(depth: int) -> None:
    layer, side = make(5), 17
    x = torch.randn(1, side * side, 12, dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(depth):
        y = layer(y, grid=(side, side))
    (grad,) = torch.autograd.grad(y[0, side * side // 2].sum(), x)
    seen = grad.abs().amax(-1).view(side, side) > 0
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[8 - 2 * depth : 9 + 2 * depth, 8 - 2 * depth : 9 + 2 * depth] = True
    assert torch.equal(seen, expected)


def test_work_is_linear_in_tokens() -> None:
    """Pairs computed for a map of four times the tokens are at most five times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(side: int) -> int:
        x = torch.randn(1, 1, side * side, 8, device="meta")
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            neighborhood_attention(x, x, x, (side, side), 7)
        return counter.get_total_flops()

    assert 3.2 <= flops(64) / flops(32) <= 5
    assert 3.2 <= flops(128) / flops(64) <= 5


def test_half_precision_empty_batch_and_dropout() -> None:
    layer = NeighborhoodAttention(12, 3, 3, dropout=0.5)
    x = torch.randn(2, 35, 12)
    assert layer(x[:0], grid=(5, 7)).shape == (0, 35, 12)
    assert not torch.equal(layer(x, grid=(5, 7)), layer(x, grid=(5, 7)))
    layer.eval()
    exact = layer(x, grid=(5, 7))
    half = layer.half()(x.half(), grid=(5, 7))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=1e-2)


def test_parameters_are_those_of_the_official_layer() -> None:
    shapes = {name: tuple(p.shape) for name, p in NeighborhoodAttention(64, 2).state_dict().items()}
    assert shapes == {
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "rpb": (2, 13, 13),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
    }


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: NeighborhoodAttention(12, 5), "num_heads=5"),
        (lambda: NeighborhoodAttention(12, 3, 4), "kernel_size=4"),
        (lambda: NeighborhoodAttention(12, 3, 1), "kernel_size=1"),
        (lambda: NeighborhoodAttention(12, 3, dilation=0), "dilation=0"),
        (lambda: NeighborhoodAttention(12, 3, dropout=1.0), "dropout=1.0"),
        (lambda: make()(torch.zeros(1, 12, 35, dtype=torch.float64), grid=(5, 7)), r"x must be \(b, n, 12\)"),
        (lambda: make()(torch.zeros(1, 35, 12, dtype=torch.float64), grid=(5, 6)), "grid="),
        (lambda: neighborhood_attention(*heads((5, 7)), (5, 6), 3), "grid="),
        (lambda: neighborhood_attention(*heads((5, 7)), (5, 7), 3, 2), "kernel_size=3 times dilation=2"),
        (lambda: neighborhood_attention(*heads((5, 7)), (5, 7), 3, bias=torch.zeros(3, 3, 3)), "bias must be"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
