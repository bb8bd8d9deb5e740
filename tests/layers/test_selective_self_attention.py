"""Selective self-attention against loops, against scaled scores and weights, and at the edges of its temperatures."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from regard.layers.sequence.selective_self_attention import (
    GompertzSelfAttention,
    GompertzSlope,
    ProjectedFeature,
    SelectiveSelfAttention,
    SigmoidSlope,
    Temperature,
    naive,
)
from regard.nn import Attention
from regard.ops.attend import attend, causal_mask, reference
from regard.ops.positions import rotary_angles, rotate_halves

FORMS = [SelectiveSelfAttention, GompertzSelfAttention]
both = pytest.mark.parametrize("form", FORMS)


def build(form: type = SelectiveSelfAttention, dtype: torch.dtype = torch.float64, **options) -> SelectiveSelfAttention:
    """A layer whose temperatures have moved from where they start."""
    layer = form(**{"dim": 12, "num_heads": 4, **options}).to(dtype)
    with torch.no_grad():
        for temperature in (layer.q_temperature, layer.v_temperature):
            temperature.token.weight.normal_()
            for slope in temperature.slope.parameters():
                slope.fill_(0.5)
    return layer


def start(layer: SelectiveSelfAttention) -> Attention:
    """Plain attention with the layer's projections."""
    host = Attention(layer.dim, layer.num_heads, layer.num_kv_heads, layer.head_dim, causal=layer.causal).to(
        layer.q.weight
    )
    host.load_state_dict({name: p for name, p in layer.state_dict().items() if "temperature" not in name})
    return host


@both
@pytest.mark.parametrize("options", [{"causal": True}, {"num_kv_heads": 2, "head_dim": 5}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_loops(form: type, options: dict, batch: int) -> None:
    layer = build(form, **options)
    x = torch.randn(batch, 5, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(batch, 5, 5) > 0.3
    mask[0, 2] = False
    positions = torch.randint(0, 50, (batch, 5))
    for given in ({}, {"mask": mask}, {"positions": positions}):
        out, expected = layer(x, **given), naive(layer, x, **given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_cross_attention_takes_each_sides_own_positions() -> None:
    layer = build(context_dim=7)
    x, context = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    later = torch.tensor([[4, 5, 6], [0, 1, 2]])
    for given in ({}, {"positions": later}):
        torch.testing.assert_close(layer(x, context, **given), naive(layer, x, context, **given), rtol=0, atol=1e-10)
    moved = layer(x, context, positions=later)
    assert not torch.allclose(moved[0], layer(x, context)[0])
    torch.testing.assert_close(moved[1], layer(x, context)[1], rtol=0, atol=1e-12)


def test_scores_and_weights_are_what_is_scaled() -> None:
    layer = build(causal=True)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = Attention.project(layer, x, x)
    tau_q, tau_v = (t(heads, torch.arange(7)) for t, heads in ((layer.q_temperature, q), (layer.v_temperature, v)))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(3)) * tau_q[..., None]
    weights = scores.masked_fill(~causal_mask(7, 7), -torch.inf).softmax(-1) * tau_v[..., None, :]
    torch.testing.assert_close(layer(x), layer.merge(weights @ v), rtol=0, atol=1e-12)
    assert layer.fused


def test_official_score_factor() -> None:
    """1 + exp(-exp(beta)) log n on the scores of row n, nothing on values and tokens."""
    layer = GompertzSelfAttention(12, 4, causal=True)
    with torch.no_grad():
        layer.v_temperature.slope.beta.fill_(20.0)
    x = torch.randn(2, 9, 12)
    q, k, v = Attention.project(layer, x, x)
    row = torch.arange(1, 10)[:, None]
    scores = q @ k.transpose(-1, -2) / math.sqrt(3) * (1 + math.exp(-math.exp(1.5)) * row.log())
    expected = scores.masked_fill(~causal_mask(9, 9), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.merge(expected), rtol=0, atol=1e-7)


def test_slopes_at_the_start() -> None:
    assert GompertzSlope()().item() == pytest.approx(0.0113, abs=5e-5)
    assert GompertzSlope(2.0)().item() == pytest.approx(0.00062, abs=5e-6)
    assert SigmoidSlope()().item() == pytest.approx(1 / (1 + math.exp(6)))


def test_fresh_layer_on_a_trained_host_changes_nothing() -> None:
    layer = SelectiveSelfAttention(12, 4, causal=True)
    x = torch.randn(2, 9, 12)
    host = start(layer)
    torch.testing.assert_close(layer(x), host(x), rtol=0, atol=0.01)
    assert not torch.equal(layer(x), host(x))
    for temperature in (layer.q_temperature, layer.v_temperature):
        nn.init.constant_(temperature.slope.alpha, -40.0)
    torch.testing.assert_close(layer(x), host(x), rtol=0, atol=1e-6)
    first = SelectiveSelfAttention(12, 4)
    torch.testing.assert_close(first(x[:, :1]), start(first)(x[:, :1]), rtol=0, atol=1e-6)


def test_sharpness_orders_entropy() -> None:
    q, k = torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.randn(1, 2, 9, 4, dtype=torch.float64)
    entropies = []
    for tau in (0.0, 0.3, 1.0, 2.0, 8.0):
        weights = reference(tau * q, k, torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9))
        entropies.append(torch.special.entr(weights).sum(-1))
    torch.testing.assert_close(entropies[0], torch.full_like(entropies[0], math.log(9)), rtol=0, atol=1e-12)
    assert all((sharper < flatter).all() for flatter, sharper in pairwise(entropies))


def test_value_temperature_of_zero_silences_a_token() -> None:
    """A token with tanh(f) = -1 stands at position 0: its value is gone and its weight stays taken."""
    layer = build()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.v_temperature.token.weight.copy_(-1e6 * layer.v(x[:, 0]).view(4, 1, 3))
    assert (layer.v_temperature(layer.split(layer.v(x), 4), torch.arange(5))[..., 0].abs() < 1e-12).all()
    q, k, v = layer.project(x, x)
    weights = layer.normalize(layer.scores(q, k), None)
    torch.testing.assert_close(layer(x), layer.merge(weights[..., 1:] @ v[:, :, 1:]), rtol=0, atol=1e-12)
    assert (weights[..., 0] > 0).all()


@both
def test_decoding_uses_the_absolute_position(form: type) -> None:
    layer = build(form, causal=True, num_kv_heads=2)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    cache = layer.new_cache(2, 8, dtype=torch.float64)
    got = torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 1, 3], 1)], 1)
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-12)


@both
def test_padding_on_the_left_with_positions(form: type) -> None:
    layer = build(form, causal=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    padded = torch.cat((torch.randn(2, 3, 12, dtype=torch.float64), x), 1)
    mask = (torch.arange(8) >= 3).expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = layer(x)
    torch.testing.assert_close(layer(padded, mask=mask, positions=positions)[:, 3:], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(layer(padded, mask=mask)[:, 3:], expected, atol=1e-3)
    cache = layer.new_cache(2, 8, dtype=torch.float64)
    steps = [
        layer(padded[:, i : i + 1], mask=mask[:, : i + 1], cache=cache, positions=positions[:, i : i + 1])
        for i in range(8)
    ]
    torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], expected, rtol=0, atol=1e-12)


def test_temperature_commutes_with_rotation() -> None:
    temperature = Temperature(ProjectedFeature(2, 6), SigmoidSlope(0.0)).double()
    nn.init.normal_(temperature.token.weight)
    q, k, v = (torch.randn(1, 2, 7, 6, dtype=torch.float64) for _ in range(3))
    tau, angles = temperature(q, torch.arange(7))[..., None], rotary_angles(torch.arange(7.0).double(), 6)
    before = attend(rotate_halves(tau * q, angles), rotate_halves(k, angles), v)
    after = attend(tau * rotate_halves(q, angles), rotate_halves(k, angles), v)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_temperature_of_any_feature() -> None:
    mlp = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2))
    temperature = Temperature(mlp, SigmoidSlope(0.0))
    x, positions = torch.randn(3, 7, 5), torch.tensor([0, 1, 2, 3, 4, 5, 100])
    expected = mlp(x).tanh() + 1 + 0.5 * torch.log(positions + 1.0)[:, None]
    torch.testing.assert_close(temperature(x, positions[:, None]), expected)


def test_new_parameters() -> None:
    layer = SelectiveSelfAttention(768, 12)
    count = [sum(p.numel() for p in m.parameters()) for m in (layer, start(layer))]
    assert count[0] - count[1] == 2 * 768 + 2 == 1538
    block = count[1] + 8 * 768**2 + 5 * 768 + 4 * 768
    assert 1538 / block < 0.005


def test_temperatures_are_single_precision_in_half_precision() -> None:
    layer = build(dtype=torch.bfloat16, causal=True)
    exact = build(causal=True)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, 12, dtype=torch.bfloat16)
    heads = layer.split(layer.q(x), 4)
    assert layer.q_temperature(heads, torch.arange(6)).dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0, atol=0.03)
    far = Temperature(ProjectedFeature(1, 2).bfloat16(), SigmoidSlope(0.0).bfloat16())
    tau = far(torch.zeros(1, 1, 2, 2).bfloat16(), torch.tensor([9999, 10019]))
    assert tau[0, 0, 0] != tau[0, 0, 1]


@both
def test_nothing_to_look_at(form: type) -> None:
    layer = build(form)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()))
    assert not x.grad[1].any()


def test_bad_input() -> None:
    layer = build(causal=True)
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    cache = layer.new_cache(1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="got -1"):
        layer(x, positions=torch.tensor([[-1, 0, 1]]), cache=cache)
    with pytest.raises(ValueError, match="context"):
        layer(x, x, positions=torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="float64"):
        layer(x, mask=torch.zeros(1, 3, dtype=torch.float64))
    assert cache.length == 0
    with pytest.raises(ValueError, match="num_heads=5"):
        SelectiveSelfAttention(12, 5)
