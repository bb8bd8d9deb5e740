"""Multi-axis attention against dense attention under masks, and against timm's blocks with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layers.vision.maxvit import (
    BlockAttention,
    GridAttention,
    MaxAttention,
    PartitionAttention,
    RelativeAttention,
)


def make(kind: type, dim: int = 12, size: int = 2) -> PartitionAttention:
    block = kind(dim, 3, size).double()
    torch.nn.init.normal_(block.attn.table)
    return block


def dense(block: PartitionAttention, x: Tensor, part: Tensor, place: Tensor) -> Tensor:
    """Attention over all tokens of a map where ``part`` agrees, biased by the difference of ``place``, both (n, 2)."""
    q, k, v = block.attn.project(x.flatten(1, 2))
    size = block.attn.window_size
    bias = torch.full((3, len(part), len(part)), float("-inf"), dtype=x.dtype)
    for i in range(len(part)):
        for j in range(len(part)):
            if (part[i] == part[j]).all():
                dy, dx = (place[j] - place[i]).tolist()
                bias[:, i, j] = block.attn.table[:, dy + size - 1, dx + size - 1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return block.attn.proj(out.transpose(1, 2).flatten(2)).view_as(x)


@pytest.mark.parametrize("kind", [BlockAttention, GridAttention])
@pytest.mark.parametrize(("grid", "size"), [((4, 6), 2), ((6, 3), 3), ((3, 3), 3), ((4, 4), 1)])
def test_a_part_is_dense_attention_under_a_mask(kind: type, grid: tuple[int, int], size: int) -> None:
    block = make(kind, size=size)
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)
    at = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2)
    stride = torch.tensor(grid) // size
    part, place = (at // size, at % size) if kind is BlockAttention else (at % stride, at // stride)
    got, expected = block.mix(x), dense(block, x, part, place)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    leaves, pull = (x, *block.attn.parameters()), torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(expected, leaves, pull)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "name"), [(BlockAttention, "block"), (GridAttention, "grid")])
def test_equals_timm(kind: type, name: str) -> None:
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    sizes = {"dim_head": 4, "window_size": (3, 3), "grid_size": (3, 3)}
    config = maxxvit.MaxxVitTransformerCfg(**sizes, head_first=False, rel_pos_type="bias_tf", norm_eps=1e-5)
    theirs = maxxvit.PartitionAttentionCl(12, name, config).double()
    ours = make(kind, size=3)
    state = {key.replace("rel_pos.relative_position_bias_table", "table"): v for key, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


def reach(layer: MaxAttention, grid: tuple[int, int]) -> Tensor:
    """Which outputs depend on which tokens."""
    n = grid[0] * grid[1]
    x = torch.randn(1, n, 12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda y: layer(y, grid=grid).sum(-1)[0], x)
    return jacobian[:, 0].abs().amax(-1) > 0


def test_a_block_and_a_grid_reach_everywhere_where_strides_fit_into_windows() -> None:
    assert reach(MaxAttention(12, 3, 2).double(), (4, 4)).all()
    assert reach(MaxAttention(12, 3, 3).double(), (6, 9)).all()
    # A stride of 4 leaves tokens between the windows of 2: neither axis alone, nor both, sees everything.
    assert not reach(MaxAttention(12, 3, 2).double(), (8, 8)).all()


@pytest.mark.parametrize(("height", "width", "sizes"), [(4, 5, (2, 3)), (2, 5, (3, 6)), (1, 1, (6, 2))])
def test_odd_maps_are_larger_maps_with_the_rest_masked(height: int, width: int, sizes: tuple[int, int]) -> None:
    layer, x = MaxAttention(12, 3, *sizes).double(), torch.randn(1, height, width, 12, dtype=torch.float64)
    for block in (layer.block, layer.grid):
        torch.nn.init.normal_(block.attn.table)
    larger = torch.randn(1, 6, 6, 12, dtype=torch.float64)
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    larger[:, :height, :width], mask[:, :height, :width] = x, True
    out = layer(larger.flatten(1, 2), mask=mask.flatten(1), grid=(6, 6)).unflatten(1, (6, 6))[:, :height, :width]
    torch.testing.assert_close(layer(x.flatten(1, 2), grid=(height, width)), out.flatten(1, 2), rtol=0, atol=1e-12)


def test_the_bias_grows_with_the_window() -> None:
    attention = RelativeAttention(12, 3, 4)
    before = attention.table.detach().clone()
    attention.resize(7)
    assert attention.bias().shape == (3, 49, 49)
    # Corners and centre of the table stay where they are: offsets of -(P - 1), 0 and P - 1.
    torch.testing.assert_close(attention.table[:, ::6, ::6], before[:, ::3, ::3], rtol=0, atol=1e-6)
    attention.resize(4)
    assert attention.table.shape == before.shape
    assert attention.table.requires_grad


def test_dropout_reaches_the_weights() -> None:
    layer, x = MaxAttention(12, 3, 2, dropout=0.5), torch.randn(1, 16, 12)
    assert not torch.equal(layer(x, grid=(4, 4)), layer(x, grid=(4, 4)))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: MaxAttention(12, 5), "num_heads=5"),
        (lambda: MaxAttention(12, 3, 0), "window_size=0"),
        (lambda: MaxAttention(12, 3, 2, 0), "window_size=0"),
        (lambda: MaxAttention(12, 3, dropout=1.0), "dropout=1.0"),
        (lambda: RelativeAttention(12, 3, 2).resize(0), "window_size=0"),
        (lambda: MaxAttention(12, 3)(torch.zeros(1, 15, 12), grid=(4, 4)), "grid="),
        (lambda: MaxAttention(12, 3)(torch.zeros(1, 16, 9), grid=(4, 4)), r"x must be \(b, n, 12\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
