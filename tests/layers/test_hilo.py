"""HiLo attention against dense attention, window by window and mean by mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layers.vision.hilo import HiLoAttention
from regard.nn import Attention
from regard.ops.masks import dense, grid_window

GRID = (6, 4)


def layer(**options: object) -> HiLoAttention:
    return HiLoAttention(24, 4, bias=True, **options).double()  # type: ignore[arg-type]


def tokens(grid: tuple[int, int] = GRID, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], 24, dtype=torch.float64, requires_grad=True)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 6)).transpose(1, 2)


def same_with_gradients(got: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    pull = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(expected, leaves, pull)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (1, 4)])
def test_hifi_is_dense_attention_under_a_window_mask(size: int, grid: tuple[int, int]) -> None:
    one, x = layer(window_size=size, alpha=0.0), tokens(grid)
    assert (one.hi_heads, one.lo_heads) == (4, 0)
    q, k, v = (heads(y) for y in one.h_qkv(x).chunk(3, -1))
    mask = dense(grid_window(grid, size), 1, 1, x.shape[1], x.shape[1])
    expected = one.h_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    same_with_gradients(one(x, grid=grid), expected, x, *one.parameters())


@pytest.mark.parametrize("grid", [(6, 4), (4, 4)])
def test_lofi_is_attention_on_the_pooled_map(grid: tuple[int, int]) -> None:
    one, x = layer(alpha=1.0), tokens(grid)
    assert (one.hi_heads, one.lo_heads) == (0, 4)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), 2).flatten(2).transpose(1, 2)
    q, (k, v) = heads(one.l_q(x)), (heads(y) for y in one.l_kv(pooled).chunk(2, -1))
    expected = one.l_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    same_with_gradients(one(x, grid=grid), expected, x, *one.parameters())


def test_windows_at_the_border_are_the_mean_of_what_is_there() -> None:
    one, x = layer(alpha=1.0), tokens((3, 5), batch=1)
    image = x.transpose(1, 2).unflatten(2, (3, 5))
    pooled = F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
    q, (k, v) = heads(one.l_q(x)), (heads(y) for y in one.l_kv(pooled).chunk(2, -1))
    expected = one.l_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    same_with_gradients(one(x, grid=(3, 5)), expected, x)


def test_a_window_of_one_is_plain_attention() -> None:
    one, plain, x = layer(window_size=1, alpha=0.25), Attention(24, 4).double(), tokens()
    k, v = one.l_kv.weight.chunk(2), one.l_kv.bias.chunk(2)
    state = {"q.weight": one.l_q.weight, "q.bias": one.l_q.bias, "k.weight": k[0], "k.bias": v[0]}
    state |= {"v.weight": k[1], "v.bias": v[1], "out.weight": one.l_proj.weight, "out.bias": one.l_proj.bias}
    plain.load_state_dict(state)
    torch.testing.assert_close(one(x, grid=GRID), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("num_heads", "alpha", "lo"), [(12, 0.9, 10), (100, 0.29, 29), (4, 0.5, 2), (3, 0.5, 1), (3, 0.0, 0), (3, 1.0, 3)]
)
def test_share_of_the_heads(num_heads: int, alpha: float, lo: int) -> None:
    one = HiLoAttention(num_heads * 2, num_heads, alpha=alpha)
    assert (one.lo_heads, one.hi_heads) == (lo, num_heads - lo)


def test_hifi_comes_first_and_stays_in_its_window_lofi_reaches_everywhere() -> None:
    one, x = layer(), tokens(batch=1).detach()
    changed = x.clone()
    changed[0, 9] += 1.0
    moved = (one(changed, grid=GRID) - one(x, grid=GRID)).abs().view(*GRID, 24)
    hi, lo = moved[..., :12].amax(-1) > 0, moved[..., 12:].amin(-1) > 0
    assert hi.nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert lo.all()


def test_the_groups_do_not_mix() -> None:
    one, x = layer(), tokens()
    torch.nn.init.zeros_(one.h_proj.weight)
    torch.nn.init.zeros_(one.h_proj.bias)
    out = one(x, grid=GRID)
    assert not out[..., :12].any()
    assert out[..., 12:].all()


def test_parameters_are_those_of_the_official_layer() -> None:
    shapes = {name: tuple(p.shape) for name, p in HiLoAttention(384, 12, alpha=0.9, bias=True).state_dict().items()}
    assert shapes == {
        "h_qkv.weight": (192, 384),
        "h_qkv.bias": (192,),
        "h_proj.weight": (64, 64),
        "h_proj.bias": (64,),
        "l_q.weight": (320, 384),
        "l_q.bias": (320,),
        "l_kv.weight": (640, 384),
        "l_kv.bias": (640,),
        "l_proj.weight": (320, 320),
        "l_proj.bias": (320,),
    }


def test_multiplications() -> None:
    assert HiLoAttention(384, 12).macs((14, 14)) == 83_467_776
    n, c = 196, 384
    assert HiLoAttention(384, 12, window_size=1).macs((14, 14)) == 4 * n * c * c + 2 * n * n * c
    half = HiLoAttention(384, 12)
    assert half.macs((13, 14)) == half.macs((14, 14))


def test_masked_tokens_are_no_keys_and_count_in_no_mean() -> None:
    one, x = layer(), tokens((3, 4), batch=1)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 8:] = False
    torch.testing.assert_close(one(x, mask=mask, grid=(3, 4))[:, :8], one(x[:, :8], grid=(2, 4)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"dim": 24, "num_heads": 5}, "num_heads=5"),
        ({"dim": 24, "num_heads": 4, "window_size": 0}, "window_size=0"),
        ({"dim": 24, "num_heads": 4, "alpha": 1.5}, "alpha=1.5"),
        ({"dim": 24, "num_heads": 4, "alpha": -0.1}, "alpha=-0.1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        HiLoAttention(**arguments)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"grid": (5, 5)}, "grid="),
        ({"grid": None}, "grid=None"),
        ({"grid": GRID, "mask": torch.ones(2, 23, dtype=torch.bool)}, "mask must be boolean"),
        ({"grid": GRID, "mask": torch.ones(2, 24)}, "mask must be boolean"),
    ],
)
def test_bad_input_is_named(options: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        layer()(tokens(), **options)
    with pytest.raises(ValueError, match=r"x must be \(b, n, 24\)"):
        layer()(tokens()[..., :20], grid=GRID)
