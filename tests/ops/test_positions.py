"""Positions: invariances, closed forms and the tables of known models."""

import itertools
import math

import pytest
import torch

from regard.ops.positions import (
    alibi_bias,
    alibi_slopes,
    axial_angles,
    axial_sincos,
    fourier_features,
    grid_coordinates,
    grid_positions,
    relative_index,
    rotary_angles,
    rotate_halves,
    rotate_pairs,
    sincos,
)

ROTATIONS = [rotate_halves, rotate_pairs]


def test_grid_positions() -> None:
    assert grid_positions((2, 3)).tolist() == [list(at) for at in itertools.product(range(2), range(3))]
    assert grid_coordinates((2, 3)).tolist() == [list(at) for at in itertools.product((-1, 1), (-1, 0, 1))]
    assert grid_positions((2, 3, 4)).shape == (24, 3)


def test_rotary_angles() -> None:
    angles = rotary_angles(torch.tensor([0, 2, 5]), 6, base=100.0)
    for row, p in enumerate((0, 2, 5)):
        for i in range(3):
            assert angles[row, i].item() == pytest.approx(p * 100.0 ** (-2 * i / 6), rel=1e-6)
    assert rotary_angles(torch.zeros(2, 5, dtype=torch.bfloat16), 4).shape == (2, 5, 2)
    assert rotary_angles(torch.zeros(2, dtype=torch.bfloat16), 4).dtype == torch.float32
    assert rotary_angles(torch.zeros(2, dtype=torch.float64), 4).dtype == torch.float64


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_scores_depend_on_the_difference(rotate) -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def score(i: float, j: float) -> float:
        angles = rotary_angles(torch.tensor([[i], [j]], dtype=torch.float64), 8)
        return float(rotate(q, angles[0]) @ rotate(k, angles[1]).T)

    for i, j in ((0, 0), (3, 1), (1, 7)):
        assert score(i, j) == pytest.approx(score(i + 100, j + 100), abs=1e-11)
    assert score(0, 3) != pytest.approx(score(0, 4), abs=1e-3)
    assert score(0, 3) != pytest.approx(score(3, 0), abs=1e-3)
    assert score(5, 5) == pytest.approx(float(q @ k.T), abs=1e-12)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_grid_scores_depend_on_the_difference_along_each_axis(rotate) -> None:
    x = torch.randn(1, 12, dtype=torch.float64).expand(12, 12)
    turned = rotate(x, axial_angles(grid_positions((3, 4)).double(), 12, base=100.0))
    scores = (turned @ turned.T).view(3, 4, 3, 4)
    torch.testing.assert_close(scores[0, 1, 2, 2], scores[0, 2, 2, 3])
    torch.testing.assert_close(scores[0, 1, 1, 0], scores[1, 3, 2, 2])
    assert not torch.isclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_is_a_matrix_of_two_by_two_blocks(rotate) -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    angles = rotary_angles(torch.arange(5).double(), 6)
    wanted = x.clone()
    for n, i in itertools.product(range(5), range(3)):
        a, b = (i, i + 3) if rotate is rotate_halves else (2 * i, 2 * i + 1)
        c, s = math.cos(angles[n, i]), math.sin(angles[n, i])
        wanted[:, :, n, a] = c * x[:, :, n, a] - s * x[:, :, n, b]
        wanted[:, :, n, b] = s * x[:, :, n, a] + c * x[:, :, n, b]
    out = rotate(x, angles)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(out[..., 6], x[..., 6])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(out, -angles), x)
    assert torch.autograd.gradcheck(lambda z: rotate(z, angles), x.requires_grad_())


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_dtype_and_batched_positions(rotate) -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.randint(50, (2, 5))
    out = rotate(x, rotary_angles(positions, 8)[:, None])
    for b in range(2):
        torch.testing.assert_close(out[b], rotate(x[b], rotary_angles(positions[b], 8)))
    half = rotate(x.bfloat16(), rotary_angles(positions, 8)[:, None])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.float(), rotate(x.bfloat16().float(), rotary_angles(positions, 8)[:, None]), rtol=1e-2, atol=1e-2
    )


def test_halves_equal_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_theta=500.0)
    q, k, ids = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randint(90, (2, 5))
    cos, sin = LlamaRotaryEmbedding(config)(q, ids)
    base = config.rope_parameters["rope_theta"]
    angles = rotary_angles(ids, 8, base)[:, None]
    for mine, theirs in zip((rotate_halves(q, angles), rotate_halves(k, angles)), apply_rotary_pos_emb(q, k, cos, sin)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_pairs_equal_halves_on_reordered_channels() -> None:
    x, angles = torch.randn(3, 8), rotary_angles(torch.arange(3), 8)
    order = torch.arange(8).view(2, 4).T.flatten()
    torch.testing.assert_close(rotate_pairs(x[:, order], angles), rotate_halves(x, angles)[:, order])


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 16, 20])
def test_alibi_slopes_equal_bloom(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    if num_heads & (num_heads - 1) == 0:
        torch.testing.assert_close(slopes, 2.0 ** (-8 / num_heads * torch.arange(1, num_heads + 1)))
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(slopes, theirs)


def test_alibi_bias() -> None:
    slopes = alibi_slopes(4)
    bias = alibi_bias(slopes, torch.arange(3, 5), torch.arange(5))
    assert bias.shape == (4, 2, 5)
    for h, i, j in itertools.product(range(4), range(2), range(5)):
        assert bias[h, i, j] == -slopes[h] * abs(3 + i - j)


def test_relative_index() -> None:
    index = relative_index(torch.arange(4), torch.arange(6), 3)
    for i, j in itertools.product(range(4), range(6)):
        assert index[i, j] == min(max(j - i, -2), 2) + 2
    shifted = relative_index(torch.arange(4) + 50, torch.arange(6) + 50, 3)
    assert torch.equal(shifted, index)


@pytest.mark.parametrize("limit", [(3, 4), (2, 3), 2])
def test_relative_index_on_a_grid(limit) -> None:
    m = (limit, limit) if isinstance(limit, int) else limit
    cells = list(itertools.product(range(3), range(4)))
    places = grid_positions((3, 4))
    index = relative_index(places, places[:7], limit)
    for (row, i), (column, j) in itertools.product(enumerate(cells), enumerate(cells[:7])):
        y, x = (min(max(b - a, 1 - n), n - 1) + n - 1 for a, b, n in zip(i, j, m))
        assert index[row, column] == y * (2 * m[1] - 1) + x
    if m == (3, 4):
        assert len(relative_index(places, places, m).unique()) == 5 * 7


def test_sincos_equals_diffusers() -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(16, 5, base_size=5, output_type="pt").double().view(5, 5, 16)
    mine = axial_sincos(grid_positions((5, 5)).double(), 16).view(5, 5, 16)
    # Theirs, like MAE's, encodes the column first.
    torch.testing.assert_close(mine.transpose(0, 1), theirs, rtol=0, atol=1e-6)
    line = sincos(torch.tensor([0.0, 3.0]), 4, base=100.0)
    torch.testing.assert_close(line[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(line[1], torch.tensor([math.sin(3), math.sin(0.3), math.cos(3), math.cos(0.3)]))


def test_fourier_features_equal_perceiver() -> None:
    from transformers.models.perceiver.modeling_perceiver import generate_fourier_features

    x = grid_coordinates((3, 5))
    theirs = generate_fourier_features(x[None], 4, max_resolution=(16, 24), concat_pos=True, sine_only=False)[0]
    torch.testing.assert_close(fourier_features(x, 4, (16, 24)), theirs)


def test_fourier_features_closed_form() -> None:
    out = fourier_features(torch.tensor([[0.25]], dtype=torch.float64), 3, 10.0)
    rates = [1.0, 3.0, 5.0]
    wanted = [0.25, *(math.sin(math.pi * f * 0.25) for f in rates), *(math.cos(math.pi * f * 0.25) for f in rates)]
    torch.testing.assert_close(out[0], torch.tensor(wanted, dtype=torch.float64))
    assert fourier_features(torch.zeros(2, 7, 2), 64, 224).shape == (2, 7, 258)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary_angles(torch.arange(3), 5), "dim=5"),
        (lambda: axial_angles(grid_positions((2, 2)), 6), "dim=6"),
        (lambda: axial_sincos(grid_positions((2, 2)), 6), "dim=6"),
        (lambda: rotate_halves(torch.zeros(3, 4), torch.zeros(3, 3)), "angles"),
        (lambda: rotate_pairs(torch.zeros(3, 4), torch.zeros(3, 3)), "angles"),
        (lambda: alibi_slopes(0), "num_heads=0"),
        (lambda: relative_index(torch.arange(3), torch.arange(3), 0), "max_distance=0"),
        (lambda: relative_index(torch.arange(3), grid_positions((2, 2)), 2), "max_distance=2"),
        (lambda: relative_index(grid_positions((2, 2)), grid_positions((2, 2)), (2, 2, 2)), "max_distance"),
        (lambda: fourier_features(torch.zeros(3, 2), 0, 8), "bands=0"),
        (lambda: fourier_features(torch.zeros(3, 2), 4, (8, 8, 8)), "max_freq"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
