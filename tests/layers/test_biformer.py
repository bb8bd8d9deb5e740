"""Bi-level routing attention against loops over regions and tokens, its limits, and what carries no gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layers.vision.biformer import BiLevelRoutingAttention
from regard.ops.masks import dense, grid_window


def make(regions: int = 3, topk: int = 2, **options: object) -> BiLevelRoutingAttention:
    return BiLevelRoutingAttention(8, 2, regions, topk, **options).double()  # type: ignore[arg-type]


def tokens(grid: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)


def by_loops(layer: BiLevelRoutingAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The paper's seven steps, one region and one head at a time; H and W are multiples of the regions."""
    s, (height, width) = layer.regions, grid
    h, w, d = height // s, width // s, layer.qk_dim // layer.num_heads
    out = torch.zeros(*x.shape, dtype=x.dtype)
    q, k, v = layer.qkv(x).split([layer.qk_dim, layer.qk_dim, layer.dim], -1)
    of = [
        [(r // s * h + a) * width + r % s * w + c for a in range(h) for c in range(w)] for r in range(s * s)
    ]  # tokens of each region
    for i in range(len(x)):
        q_mean, k_mean = (torch.stack([y[i, of[r]].mean(0) for r in range(s * s)]).detach() for y in (q, k))
        for r in range(s * s):
            chosen = (k_mean @ q_mean[r]).topk(layer.topk).indices.tolist()
            keys = [t for c in chosen for t in of[c]]
            rows = []
            for head in range(layer.num_heads):
                at, e = slice(head * d, (head + 1) * d), layer.dim // layer.num_heads
                weights = (q[i, of[r], at] @ k[i, keys, at].T / layer.qk_dim**0.5).softmax(-1)
                rows.append(weights @ v[i, keys, head * e : (head + 1) * e])
            out = out.index_put((torch.tensor(i), torch.tensor(of[r])), torch.cat(rows, -1))
    image = v.transpose(1, 2).unflatten(2, grid)
    local = F.conv2d(
        image, layer.lepe.weight, layer.lepe.bias, padding=layer.lepe.kernel_size[0] // 2, groups=layer.dim
    )
    return layer.wo(out + local.flatten(2).transpose(1, 2))


def agree(got: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    pull = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(expected, leaves, pull)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((6, 6), {}),
        ((3, 9), {"topk": 4}),
        ((3, 3), {"topk": 1}),
        ((4, 8), {"regions": 2, "topk": 3, "qk_dim": 4, "kernel_size": 3}),
        ((5, 3), {"regions": 1, "topk": 1}),
    ],
)
def test_equals_the_steps_of_the_paper(grid: tuple[int, int], options: dict) -> None:
    layer, x = make(**options), tokens(grid)
    agree(layer(x, grid=grid), by_loops(layer, x, grid), x, *layer.parameters())


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_all_regions_are_plain_attention_at_the_same_scale(grid: tuple[int, int]) -> None:
    layer, x = make(topk=9), tokens(grid)
    torch.nn.init.zeros_(layer.lepe.weight)
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).flatten(2)
    agree(layer(x, grid=grid), layer.wo(out + layer.lepe.bias), x)


def test_a_token_reads_the_chosen_regions_and_its_surroundings_only() -> None:
    layer, grid = make(kernel_size=1), (6, 6)
    x = tokens(grid, batch=1)
    q, k, _ = layer.qkv(x).chunk(3, -1)
    region = dense(grid_window(grid, 2), 1, 1, 36, 36)[0, 0]
    means = [region.double() @ y[0] / 4 for y in (q, k)]  # of every token's region
    first = [0, 2, 4, 12, 14, 16, 24, 26, 28]
    chosen = (means[0][21] @ means[1][first].T).topk(2).indices.tolist()
    expected = region[first][chosen].any(0)
    expected[21] = True
    (grad,) = torch.autograd.grad(layer(x, grid=grid)[0, 21].sum(), x)
    assert torch.equal(grad[0].abs().amax(-1) > 0, expected)


def test_choosing_has_no_gradient() -> None:
    layer = make()
    q = torch.randn(2, 9, 4, 8, dtype=torch.float64, requires_grad=True)
    index, used = layer.route(q, q * 2)
    assert not index.requires_grad
    assert not used.requires_grad
    assert used.all()
    assert index.shape == (2, 9, 2)


def test_ties_go_to_the_lowest_region() -> None:
    index, _ = make(topk=3).route(torch.ones(1, 9, 2, 8), torch.ones(1, 9, 2, 8))
    assert index.tolist() == [[[0, 1, 2]] * 9]


def test_moving_whole_regions_moves_the_outputs() -> None:
    """Without the convolution no region knows where it is."""
    layer, grid = make(), (6, 6)
    torch.nn.init.zeros_(layer.lepe.weight)
    x = tokens(grid).detach()
    order = torch.randperm(9)

    def moved(y: Tensor) -> Tensor:
        parts = y.view(2, 3, 2, 3, 2, 8).transpose(2, 3).reshape(2, 9, 2, 2, 8)[:, order]
        return parts.view(2, 3, 3, 2, 2, 8).transpose(2, 3).reshape(2, 36, 8)

    torch.testing.assert_close(layer(moved(x), grid=grid), moved(layer(x, grid=grid)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "regions", "topk"), [((5, 7), 3, 2), ((4, 9), 3, 2), ((2, 3), 4, 2), ((2, 3), 4, 9), ((1, 1), 2, 2)]
)
def test_padding_is_neither_chosen_nor_seen(grid: tuple[int, int], regions: int, topk: int) -> None:
    """A padded map gives what the same map gives inside a larger one whose other tokens are masked."""
    layer = make(regions, topk=topk)
    sides = [-(-side // regions) * regions for side in grid]
    x = tokens(grid)
    larger = torch.randn(2, *sides, 8, dtype=torch.float64)
    larger[:, : grid[0], : grid[1]] = x.detach().unflatten(1, grid)
    mask = torch.zeros(2, *sides, dtype=torch.bool)
    mask[:, : grid[0], : grid[1]] = True
    out = layer(larger.flatten(1, 2), mask=mask.flatten(1), grid=tuple(sides)).unflatten(1, sides)
    expected = out[:, : grid[0], : grid[1]].flatten(1, 2)
    torch.testing.assert_close(layer(x, grid=grid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_cost_is_linear_in_the_regions_chosen(topk: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        layer, x = BiLevelRoutingAttention(64, 2, 7, topk), torch.randn(1, 3136, 64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        layer(x, grid=(56, 56))
    n, c, s2 = 3136, 64, 49
    assert counter.get_total_flops() == 2 * (4 * n * c * c + s2**2 * c + 25 * n * c + 2 * n * c * (n // s2) * topk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = BiLevelRoutingAttention(8, 2, 3, 9), torch.randn(2, 35, 8)
    exact = layer(x, grid=(5, 7))
    half = layer.to(dtype)(x.to(dtype), grid=(5, 7))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: make(topk=10), "topk=10 must be between 1 and the number of regions, 9"),
        (lambda: make(topk=0), "topk=0"),
        (lambda: make(regions=0), "regions=0"),
        (lambda: make(qk_dim=5), "qk_dim=5"),
        (lambda: make(kernel_size=4), "kernel_size=4"),
        (lambda: BiLevelRoutingAttention(9, 2), "dim=9"),
        (lambda: make()(tokens((5, 7)), grid=(5, 6)), "grid="),
        (lambda: make()(tokens((5, 7))[..., :4], grid=(5, 7)), r"x must be \(b, n, 8\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
