"""Collinear attention against keys built pair by pair, and what a zero angle between query and key entails."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from regard import create, swap
from regard.bench.cost import flops, parameters, peak_memory
from regard.hosts.tiny import tiny_vit
from regard.layers.sequence.coca import (
    Collinear,
    CollinearAttention,
    DynamicNTK,
    Linear,
    OfficialCollinearAttention,
    naive,
)
from regard.nn import Attention
from regard.ops.positions import rotary_angles, rotate_halves

both = pytest.mark.parametrize("form", [CollinearAttention, OfficialCollinearAttention])


def build(form: type[Collinear], dtype: torch.dtype = torch.float64, **options) -> Collinear:
    return form(**{"dim": 24, "num_heads": 3, **options}).to(dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def coefficients(layer: Collinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """q (b, h, n, d) and t (b, g, n, d / 2) of a layer that rotates all of its channels."""
    t = layer.split(layer.t(x), layer.num_kv_heads)
    return layer.split(layer.q(x), layer.num_heads), (
        (t[..., : t.shape[-1] // 2] + t[..., t.shape[-1] // 2 :]) / 2
    ).relu()


def score_of(layer: Collinear, q: Tensor, t: Tensor, i: int, j: int) -> float:
    """One score of one head, from q_i (d,) and t_j (d / 2,) at positions i and j."""
    rates = rotary_angles(torch.tensor([i, j], dtype=torch.float64), layer.head_dim)
    features = layer.features(q.expand(1, 1, 2, -1), t.repeat(2).expand(1, 1, 2, -1), rates)
    return layer.scores(*features)[0, 0, 0, 1].item()


@both
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"num_kv_heads": 1, "head_dim": 6}, {"rotary_dim": 4, "bias": True}], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_keys_built_pair_by_pair(form: type, options: dict, batch: int) -> None:
    layer = build(form, **options)
    x = normal(batch, 7, 24).requires_grad_()
    mask = torch.rand(batch, 7, 7) > 0.3
    mask[0, 2] = False
    for given in (None, mask):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_closed_form_is_the_rotated_product_of_query_and_its_own_key() -> None:
    layer = build(CollinearAttention)
    x = normal(1, 9, 24)
    q, t = coefficients(layer, x)
    angles = rotary_angles(torch.arange(9, dtype=torch.float64), 8)
    keys = q[:, :, :, None] * torch.cat((t, t), -1)[:, :, None]
    brute = torch.einsum("bhid,bhijd->bhij", rotate_halves(q, angles), rotate_halves(keys, angles[None])) / 8**0.5
    torch.testing.assert_close(layer.scores(*layer.project(x, x)[:2]), brute, rtol=0, atol=1e-10)


def test_official_form_is_the_product_of_three() -> None:
    layer = build(OfficialCollinearAttention, num_kv_heads=1)
    x = normal(2, 9, 24)
    q, t = coefficients(layer, x)
    angles = rotary_angles(torch.arange(9, dtype=torch.float64), 8)
    t = rotate_halves(torch.cat((t, t), -1), angles).expand(-1, 3, -1, -1)
    product = torch.einsum("bpnd,bpsd,bpnd->bpns", q, t, rotate_halves(q, angles)) / 8**0.5
    torch.testing.assert_close(layer.scores(*layer.project(x, x)[:2]), product, rtol=0, atol=1e-10)


def test_a_score_by_hand() -> None:
    """Planes (0, 2) and (1, 3) of q at rates 1 and 0.01: squares 4 and 10."""
    q, t = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)
    layer = build(CollinearAttention, head_dim=4)
    by_hand = (3 * 4 * math.cos(2) + 0.5 * 10 * math.cos(0.02)) / 2
    assert score_of(layer, q, t, 5, 3) == pytest.approx(by_hand, abs=1e-12)


def test_the_two_forms_differ_and_only_one_is_relative() -> None:
    q, t = normal(8), normal(4).abs()
    exact, official = build(CollinearAttention), build(OfficialCollinearAttention)
    assert score_of(exact, q, t, 5, 3) == pytest.approx(score_of(exact, q, t, 105, 103), abs=1e-10)
    assert abs(score_of(official, q, t, 5, 3) - score_of(official, q, t, 105, 103)) > 1e-2
    assert abs(score_of(official, q, t, 5, 3) - score_of(exact, q, t, 5, 3)) > 1e-2
    assert score_of(official, q, t, 0, 0) == pytest.approx(score_of(exact, q, t, 0, 0), abs=1e-12)


def test_nearest_scores_highest_and_both_sides_alike() -> None:
    layer = build(CollinearAttention, dim=64, num_heads=8)
    q, t = normal(1, 8, 1, 8).expand(-1, -1, 41, -1), normal(1, 8, 1, 4).abs().repeat(1, 1, 41, 2)
    scores = layer.scores(*layer.features(q, t, rotary_angles(torch.arange(41, dtype=torch.float64), 8)))[0]
    assert (scores.diagonal(0, 1, 2) >= 0).all()
    assert (scores.argmax(-1) == torch.arange(41)).all()
    torch.testing.assert_close(scores, scores.mT, rtol=0, atol=1e-12)


def test_rotary_attention_scores_a_farther_token_higher() -> None:
    """The headache: with an angle between query and key the largest score is not at distance 0."""
    angles = rotary_angles(torch.arange(41, dtype=torch.float64), 8)
    q = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64).expand(41, 8)
    ahead = torch.tensor([0.8] * 4 + [0.6] * 4, dtype=torch.float64).expand(41, 8)
    scores = rotate_halves(q, angles) @ rotate_halves(ahead, angles).mT
    assert (scores[40].argmax() < 40).item()
    assert scores[40].max() > scores[40, 40] + 0.1


def test_only_differences_of_positions_matter() -> None:
    exact, official = build(CollinearAttention, causal=True), build(OfficialCollinearAttention, causal=True)
    x, later = normal(2, 7, 24), torch.arange(91, 98).expand(2, -1)
    torch.testing.assert_close(exact(x, positions=later), exact(x), rtol=0, atol=1e-8)
    assert (official(x, positions=later) - official(x)).abs().max() > 1e-3
    here = torch.arange(7).expand(2, -1)
    torch.testing.assert_close(official(x, positions=here), official(x), rtol=0, atol=1e-12)


@both
def test_padding_on_the_left(form: type) -> None:
    layer = build(form, causal=True)
    x = normal(1, 5, 24)
    padded, mask = torch.cat((normal(1, 3, 24), x), 1), torch.arange(8)[None] >= 3
    positions = (torch.arange(8)[None] - 3).clamp(min=0)
    torch.testing.assert_close(layer(padded, mask=mask, positions=positions)[:, 3:], layer(x), rtol=0, atol=1e-12)
    cache, steps = layer.new_cache(1, 8, dtype=torch.float64), []
    for i in range(8):
        here = slice(i, i + 1)
        steps.append(layer(padded[:, here], mask=mask[:, : i + 1], positions=positions[:, here], cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], layer(x), rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("stretch", [None, Linear(4.0), DynamicNTK(4.0, 16)], ids=str)
def test_decoding_equals_the_whole(form: type, stretch) -> None:
    layer = build(form, torch.float32, causal=True, num_kv_heads=1, stretch=stretch)
    x = torch.randn(2, 11, 24)
    for chunks in ([1] * 11, [4, 1, 1, 5]):
        cache = layer.new_cache(2, 11)
        got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-5)


def test_stretched_positions() -> None:
    q, t = normal(1, 1, 40, 8), normal(1, 1, 40, 8)
    plain = build(CollinearAttention, num_heads=1, head_dim=8)
    linear = build(CollinearAttention, num_heads=1, head_dim=8, stretch=Linear(4.0))
    at = torch.arange(40, dtype=torch.float64)
    torch.testing.assert_close(linear.angles(at, 40), plain.angles(at / 4, 40), rtol=0, atol=1e-12)
    dynamic = build(CollinearAttention, num_heads=1, head_dim=8, stretch=DynamicNTK(4.0, 16))
    assert torch.equal(dynamic.angles(at, 16), plain.angles(at, 16))
    base = 10000 * (4 * 40 / 16 - 3) ** (8 / 6)
    torch.testing.assert_close(dynamic.angles(at, 40), rotary_angles(at, 8, base), rtol=1e-12, atol=0)
    assert not torch.allclose(
        plain.features(q, t, plain.angles(at, 40))[0], plain.features(q, t, linear.angles(at, 40))[0]
    )


def test_rotated_channels_pair_among_themselves() -> None:
    """With 4 of 8 channels rotated, plane 0 is channels 0 and 2: coefficients of both forms see different partners."""
    exact, official = build(CollinearAttention, rotary_dim=4), build(OfficialCollinearAttention, rotary_dim=4)
    t = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    t[..., 2], t[..., 5] = 2.0, -1.0
    angles = torch.zeros(1, 2, dtype=torch.float64)
    q = normal(1, 1, 1, 8)
    _, k = exact.features(q, t, angles)
    assert k.flatten().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    _, k = official.features(q, t, angles)
    assert k.flatten().tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@both
def test_no_positive_coefficient_is_uniform_attention(form: type) -> None:
    layer = build(form, bias=True)
    layer.t.weight.data.zero_()
    layer.t.bias.data.fill_(-1.0)
    x = normal(2, 5, 24)
    v = layer.project(x, x)[2].mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(layer(x), layer.merge(v), rtol=0, atol=1e-12)


@both
def test_nothing_to_look_at_and_one_token(form: type) -> None:
    layer = build(form)
    x = normal(2, 3, 24).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
    one = x[:, :1].detach()
    torch.testing.assert_close(layer(one), layer.out(layer.v(one)), rtol=0, atol=1e-12)


def test_half_precision_far_out() -> None:
    """Angles and sizes are taken in single precision: position 5,000 is not rounded."""
    exact, half = build(CollinearAttention, causal=True), build(CollinearAttention, torch.bfloat16, causal=True)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x, far = torch.randn(1, 5, 24, dtype=torch.bfloat16), torch.arange(5001, 5006)[None]
    out = half(x, positions=far)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(x.double(), positions=far), rtol=0, atol=0.02)


@both
def test_cost_is_that_of_attention(form: type) -> None:
    ours, plain = form(64, 4, 2, causal=True), Attention(64, 4, 2, causal=True, bias=False)
    assert parameters(ours) == parameters(plain)
    x = torch.randn(1, 96, 64)
    assert flops(ours, x).total == flops(plain, x).total
    assert ours.new_cache(2, 96).nbytes == plain.new_cache(2, 96).nbytes


def test_memory_is_far_below_that_of_keys_for_every_pair() -> None:
    layer, plain = CollinearAttention(16, 1), Attention(16, 1)
    x = torch.randn(1, 1024, 16)

    def pairs() -> Tensor:
        q, t = coefficients(layer, x)
        keys = q[:, :, :, None] * torch.cat((t, t), -1)[:, :, None]
        return torch.einsum("bhid,bhijd->bhij", q, keys).softmax(-1) @ q

    with torch.no_grad():
        ours, theirs, standard = (peak_memory(call) for call in (lambda: layer(x), pairs, lambda: plain(x)))
    assert theirs >= 16 * ours
    assert ours <= 3 * standard


def test_a_pretrained_key_projection_is_not_taken_for_coefficients() -> None:
    model, _ = tiny_vit()
    handle = swap(model, "blocks.0.attn", "coca", bias=True)
    assert "k" not in handle.carried["blocks.0.attn"]
    assert {"q", "v", "out"} <= set(handle.carried["blocks.0.attn"])


def test_names() -> None:
    assert type(create("coca", dim=32, num_heads=4)) is CollinearAttention
    assert type(create("coca-official", dim=32, num_heads=4)) is OfficialCollinearAttention
    assert not CollinearAttention.takes_rotary


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head_dim": 5}, "head_dim=5"),
        ({"rotary_dim": 3}, "rotary_dim=3"),
        ({"rotary_dim": 10}, "rotary_dim=10"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"rope_base": 0.0}, r"rope_base=0\.0"),
        ({"rotary_dim": 2, "stretch": DynamicNTK(4.0, 16)}, "rotary_dim=2"),
    ],
)
def test_bad_arguments(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(CollinearAttention, **options)


def test_unknown_stretch() -> None:
    with pytest.raises((ValueError, TypeCheckError), match="stretch"):
        build(CollinearAttention, stretch="yarn")


def test_bad_input() -> None:
    layer = build(CollinearAttention, causal=True, stretch=DynamicNTK(4.0, 4))
    x = normal(2, 3, 24)
    with pytest.raises(ValueError, match="context"):
        build(CollinearAttention)(x, x.clone())
    with pytest.raises(ValueError, match="counted from 0; got -1"):
        layer(x, positions=torch.tensor([[-1, 0, 1]] * 2))
    with pytest.raises(ValueError, match=r"positions must be \(2, 3\); got \(1, 3\)"):
        layer(x, positions=torch.arange(3)[None])
    cache = layer.new_cache(2, 8, dtype=torch.float64)
    layer(x, cache=cache)
    layer(x[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"5 tokens at other rates than the 4.*rope_base="):
        layer(x[:, :1], cache=cache)
