"""Focused linear attention against its n x n matrix, and what the map and the convolution are for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layers.vision.flatten import FocusedLinearAttention, focused_map


def make(
    dim: int = 12, num_heads: int = 3, size: tuple[int, int] = (3, 5), **options: object
) -> FocusedLinearAttention:
    layer = FocusedLinearAttention(dim, num_heads, size, **options).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.positional_encoding, std=0.3)
    torch.nn.init.normal_(layer.scale, std=0.3)
    return layer


def weights(layer: FocusedLinearAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The matrix of attention without the convolution, (b, h, n, n)."""
    q, k, _ = layer.qkv(x).chunk(3, -1)
    focus = []
    for y in (q, k + layer.positions(grid)):
        y = (F.relu(y) + 1e-6) / F.softplus(layer.scale)
        p = y**layer.power
        focus.append(
            (p * y.norm(dim=-1, keepdim=True) / p.norm(dim=-1, keepdim=True)).unflatten(-1, (layer.num_heads, -1))
        )
    products = torch.einsum("bihd,bjhd->bhij", *focus)
    return products / (products.sum(-1, keepdim=True) + 1e-6 * x.shape[1])


def local(layer: FocusedLinearAttention, grid: tuple[int, int]) -> Tensor:
    """The convolution as a matrix for every channel of a head, (d, n, n)."""
    n, d = grid[0] * grid[1], layer.dwc.in_channels
    basis = torch.eye(n, dtype=torch.float64).view(n, 1, *grid).expand(-1, d, -1, -1)
    return (
        F.conv2d(basis, layer.dwc.weight, padding=layer.dwc.kernel_size[0] // 2, groups=d).flatten(2).permute(1, 2, 0)
    )


@pytest.mark.parametrize(
    ("grid", "options"),
    [((3, 5), {}), ((1, 1), {}), ((4, 2), {"power": 2.5, "kernel_size": 3}), ((3, 5), {"power": 8})],
)
def test_equals_the_matrix(grid: tuple[int, int], options: dict) -> None:
    layer = make(**options)
    x = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)
    v = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (3, -1)).transpose(1, 2)
    out = weights(layer, x, grid) @ v + torch.einsum("dij,bhjd->bhid", local(layer, grid), v) + layer.dwc.bias
    expected = layer.proj(out.transpose(1, 2).flatten(2))
    got = layer(x, grid=grid)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    leaves, pull = (x, *layer.parameters()), torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(expected, leaves, pull)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_the_map_keeps_the_norm_and_scales_with_its_input() -> None:
    x = torch.rand(50, 7, dtype=torch.float64)
    for power in (0.5, 1, 2, 3, 7.5):
        torch.testing.assert_close(focused_map(x, power).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        torch.testing.assert_close(focused_map(3.7 * x, power), 3.7 * focused_map(x, power), rtol=1e-12, atol=0)
    torch.testing.assert_close(focused_map(x, 1), x, rtol=1e-12, atol=0)


def test_the_map_goes_to_the_largest_coordinate_as_the_power_grows() -> None:
    x = torch.tensor([[0.5, 1.0, 0.9, 0.1]], dtype=torch.float64)
    cosines = [float(focused_map(x, p)[0, 1] / x.norm()) for p in (1, 2, 4, 16, 200)]
    assert cosines == sorted(cosines)
    assert cosines[-1] > 1 - 1e-8


def test_the_map_is_finite_at_its_edges() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-6, 1e-6, 1e-6], [0.0, 3e4, 1e-6]], requires_grad=True)
    out = focused_map(x, 8)
    torch.testing.assert_close(out[:2], x[:2], rtol=1e-6, atol=0)
    assert out[2].tolist() == [0.0, 3e4, 0.0]
    (grad,) = torch.autograd.grad(out[1:].sum(), x)
    assert grad.isfinite().all()


def test_same_direction_gains_and_other_directions_lose() -> None:
    a, same, other = (
        torch.tensor([y], dtype=torch.float64) for y in ([1.0, 0.6, 0.2], [0.9, 0.5, 0.4], [0.3, 0.5, 1.0])
    )
    ratio = []
    for power in (1, 2, 3, 5, 8):
        q, k, l = (focused_map(y, power) for y in (a, same, other))
        ratio.append(float((q * k).sum() / (q * l).sum()))
    assert ratio == sorted(ratio)
    assert ratio[2] > 2 * ratio[0]


def test_rows_are_weights_and_focusing_sharpens_them() -> None:
    x = torch.randn(1, 196, 64, dtype=torch.float64)
    entropy = []
    for power in (1, 3):
        torch.manual_seed(0)
        layer = make(64, 2, (14, 14), power=power)
        torch.nn.init.zeros_(layer.positional_encoding)
        torch.nn.init.zeros_(layer.scale)
        a = weights(layer, x, (14, 14)).detach()
        assert (a >= 0).all()
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)), rtol=0, atol=1e-4)
        entropy.append(float(-(a * a.clamp(min=1e-300).log()).sum(-1).mean()))
    assert entropy[1] < entropy[0] - 0.1


def test_the_convolution_restores_the_rank() -> None:
    layer, x = make(64, 2, (14, 14)), torch.randn(1, 196, 64, dtype=torch.float64)
    plain = weights(layer, x, (14, 14))[0, 0]
    assert torch.linalg.matrix_rank(plain) <= 32
    assert torch.linalg.matrix_rank(plain + local(layer, (14, 14))[0]) >= 150


def test_without_positions_and_convolution_the_order_of_tokens_does_not_matter() -> None:
    layer, x = make(), torch.randn(2, 15, 12, dtype=torch.float64)
    torch.nn.init.zeros_(layer.positional_encoding)
    torch.nn.init.zeros_(layer.dwc.weight)
    order = torch.randperm(15)
    torch.testing.assert_close(layer(x[:, order], grid=(3, 5)), layer(x, grid=(3, 5))[:, order], rtol=0, atol=1e-12)


def test_positions_are_interpolated_for_another_grid() -> None:
    layer = make(size=(2, 2))
    assert layer.positions((2, 2)) is layer.positional_encoding
    table = layer.positional_encoding.detach().view(2, 2, 12).permute(2, 0, 1)[None]
    expected = F.interpolate(table, (3, 5), mode="bicubic")[0].permute(1, 2, 0).reshape(1, 15, 12)
    torch.testing.assert_close(layer.positions((3, 5)), expected, rtol=0, atol=1e-12)
    torch.nn.init.ones_(layer.positional_encoding)
    torch.testing.assert_close(layer.positions((3, 5)), torch.ones(1, 15, 12, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_negative_inputs_attend_evenly(dtype: torch.dtype) -> None:
    layer = FocusedLinearAttention(12, 3, (3, 5)).to(dtype)
    torch.nn.init.zeros_(layer.qkv.weight)
    torch.nn.init.constant_(layer.qkv.bias[:24], -1.0)
    torch.nn.init.zeros_(layer.dwc.weight)
    out = layer(torch.randn(2, 15, 12, dtype=dtype), grid=(3, 5))
    assert out.dtype == dtype
    assert out.isfinite().all()
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_work_is_linear_in_tokens() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(side: int) -> int:
        with torch.device("meta"):
            layer, x = FocusedLinearAttention(64, 2, (side, side)), torch.randn(1, side * side, 64)
        with FlopCounterMode(display=False) as counter:
            layer(x, grid=(side, side))
        return counter.get_total_flops()

    n, c, d = 1024, 64, 32
    assert flops(32) == 2 * (4 * n * c * c + 2 * n * c * d + n * c + 25 * n * c)
    assert flops(64) == 4 * flops(32)


def test_parameters_are_those_of_the_official_layer() -> None:
    shapes = {name: tuple(p.shape) for name, p in FocusedLinearAttention(96, 3, (56, 56)).state_dict().items()}
    assert shapes == {
        "scale": (1, 1, 96),
        "positional_encoding": (1, 3136, 96),
        "qkv.weight": (288, 96),
        "qkv.bias": (288,),
        "dwc.weight": (32, 1, 5, 5),
        "dwc.bias": (32,),
        "proj.weight": (96, 96),
        "proj.bias": (96,),
    }


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: FocusedLinearAttention(12, 5), "num_heads=5"),
        (lambda: FocusedLinearAttention(12, 3, (0, 4)), r"size=\(0, 4\)"),
        (lambda: FocusedLinearAttention(12, 3, power=0), "power=0"),
        (lambda: FocusedLinearAttention(12, 3, kernel_size=4), "kernel_size=4"),
        (lambda: focused_map(torch.ones(1, 3), -1), "power=-1"),
        (lambda: make()(torch.zeros(1, 15, 12, dtype=torch.float64), grid=(4, 4)), "grid="),
        (lambda: make()(torch.zeros(1, 15, 9, dtype=torch.float64), grid=(3, 5)), r"x must be \(b, n, 12\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
