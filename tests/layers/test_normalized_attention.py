"""Normalized attention against loops, and what follows from standardized weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.explainers.attention_flow import attention_rollout
from regard.layers.sequence.normalized_attention import NormalizedAttention, naive
from regard.nn import Attention
from regard.ops.normalizers import standardize


def build(dtype: torch.dtype = torch.float64, **options) -> NormalizedAttention:
    layer = NormalizedAttention(**{"dim": 12, "num_heads": 3, "init_std": 0.3, **options}).to(dtype)
    with torch.no_grad():
        for p in (layer.gain, layer.bias, layer.norm.weight, layer.norm.bias, layer.out.bias):
            p += 0.3 * torch.randn_like(p)
    return layer


def weights_of(layer: NormalizedAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, _ = layer.project(x, x)
    return layer.normalize(layer.scores(q, k), mask)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_kv_heads": 1, "head_dim": 5}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_loops(options: dict, batch: int) -> None:
    layer = build(**options)
    x = normal(batch, 5, 12).requires_grad_()
    mask = torch.rand(batch, 5, 5) > 0.3
    mask[0, 2] = False
    for given in (None, mask):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_formula_and_layer_norm() -> None:
    layer = build()
    x = normal(2, 7, 12)
    q, k, v = layer.project(x, x)
    z = torch.einsum("bhld,bhsd->bhls", q, k)
    root = z.std(-1, unbiased=False, keepdim=True)
    weights = layer.gain * (z - z.mean(-1, keepdim=True)) / (root + 1e-3) + layer.bias
    torch.testing.assert_close(weights_of(layer, x), weights, rtol=0, atol=1e-12)
    normed = F.layer_norm(z, (7,), eps=0.0) * root / (root + 1e-3)
    torch.testing.assert_close(weights, layer.gain * normed + layer.bias, rtol=0, atol=1e-12)
    hidden = F.layer_norm((weights @ v).transpose(1, 2).flatten(2), (12,), layer.norm.weight, layer.norm.bias, 1e-3)
    torch.testing.assert_close(layer(x), layer.out(F.gelu(hidden, approximate="tanh")), rtol=0, atol=1e-12)


def test_a_masked_key_is_as_good_as_none() -> None:
    layer = build()
    x, kept = normal(1, 7, 12), torch.tensor([0, 2, 3, 6])
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[:, kept] = True
    torch.testing.assert_close(layer(x, mask=mask)[:, kept], layer(x[:, kept]), rtol=0, atol=1e-10)
    assert not weights_of(layer, x, mask[:, None, None])[..., ~mask[0]].any(), "the bias leaks to masked keys"


def test_mean_and_variance_of_a_row() -> None:
    torch.manual_seed(3)
    layer = NormalizedAttention(12, 3, init_std=0.05).double()
    x = normal(2, 9, 12)
    weights = weights_of(layer, x)
    q, k, _ = layer.project(x, x)
    deviation = layer.scores(q, k).std(-1, unbiased=False)
    assert weights.mean(-1).abs().max() < 1e-12
    torch.testing.assert_close(weights.square().mean(-1), (deviation / (deviation + 1e-3)).square(), rtol=1e-12, atol=0)


def test_scores_may_be_scaled_and_shifted() -> None:
    layer = build()
    x = normal(2, 9, 12)
    q, k, v = layer.project(x, x)
    out = layer.attend(100 * q, k, v, None)
    for c in (3.0, 1000.0):
        torch.testing.assert_close(layer.attend(100 * c * q, k, v, None), out, rtol=1e-3, atol=1e-3)
    z = layer.scores(q, k)
    torch.testing.assert_close(layer.normalize(z + 5.0, None), layer.normalize(z, None), rtol=0, atol=1e-12)


def test_leaves_the_convex_hull_of_the_values() -> None:
    layer = NormalizedAttention(1, 1).double()
    q, k = torch.ones(1, 1, 1, 1).double(), torch.tensor([-1.0, 0.0, 1.0]).double().view(1, 1, 3, 1)
    v = torch.tensor([0.0, 0.5, 1.0]).double().view(1, 1, 3, 1)
    above, below = layer.attend(q, k, v, None).item(), layer.attend(-q, k, v, None).item()
    assert above == pytest.approx(1.5**0.5 / (1 + 1e-3 * 1.5**0.5))
    assert above > 1
    assert below < 0
    plain = Attention(1, 1).double()
    assert 0 < plain.attend(-q, k, v, None).item() < plain.attend(q, k, v, None).item() < 1


def test_a_lone_key_passes_through_the_bias_only() -> None:
    layer = build(causal=True)
    x = normal(1, 4, 12)
    weights = weights_of(layer, x[:, :1])
    torch.testing.assert_close(weights, layer.bias[None].expand(1, 3, 1, 1), rtol=0, atol=0)
    torch.testing.assert_close(layer(x)[:, :1], layer(x[:, :1]), rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.bias.zero_()
    torch.testing.assert_close(layer(x)[:, 0], layer.merge(x.new_zeros(1, 3, 1, 4))[:, 0], rtol=0, atol=1e-15)


def test_decoding_equals_the_whole() -> None:
    layer = build(causal=True)
    x = normal(2, 7, 12)
    cache = layer.new_cache(2, 7, dtype=torch.float64)
    got = torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 1, 2], 1)], 1)
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-12)


def test_nothing_to_look_at() -> None:
    layer = build()
    x = normal(2, 3, 12).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.merge(x.new_zeros(1, 3, 3, 4))[0], rtol=0, atol=1e-15)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_its_statistics_in_single(dtype: torch.dtype) -> None:
    logits = 300.0 + torch.arange(8).to(dtype) * 2
    wanted = standardize(logits.double())
    torch.testing.assert_close(standardize(logits).double(), wanted, rtol=0, atol=2e-2)
    layer = build(torch.float32, dim=32, num_heads=4)
    half = build(dtype, dim=32, num_heads=4)
    half.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 32)
    assert half(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half(x.to(dtype)).float(), layer(x), rtol=0, atol=0.1)


def test_equal_scores_and_small_ones() -> None:
    """Rows flatter than eps are damped and never amplified."""
    assert not standardize(torch.full((1, 5), 0.3)).any()
    assert standardize(torch.tensor([0.0, 1e-5])).abs().max() < 1e-2


def test_dropout_acts_on_weights() -> None:
    layer = build(dropout=0.5)
    x = normal(1, 5, 12)
    q, k, _ = layer.project(x, x)
    eye = torch.eye(5, dtype=torch.float64).expand(1, 3, 5, 5)
    kept, exact = layer.attend(q, k, eye, None), weights_of(layer, x)
    assert ((kept == 0) | ((kept - 2 * exact).abs() < 1e-12)).all()
    assert ((kept == 0) & (exact != 0)).any()


def test_where_it_starts() -> None:
    layer = NormalizedAttention(512, 8)
    for linear in (layer.q, layer.k, layer.v, layer.out):
        assert linear.weight.abs().max() <= 0.04
        # A normal number kept within two deviations has 0.88 of its deviation.
        assert linear.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.01)
        assert not linear.bias.any()
    assert (layer.gain == 1).all()
    assert not layer.bias.any()
    extra = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in Attention(512, 8).parameters())
    assert extra == 2 * 8 + 2 * 512


def test_rollout_refuses_its_weights() -> None:
    weights = weights_of(build(), normal(1, 5, 12))
    with pytest.raises(ValueError, match="negative"):
        attention_rollout([weights])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dim=12"):
        build(num_heads=5)
    for name in ("eps", "init_std"):
        with pytest.raises(ValueError, match=rf"{name}=0\.0"):
            build(**{name: 0.0})
    with pytest.raises(ValueError, match="int64"):
        build()(normal(1, 3, 12), mask=torch.ones(1, 3, dtype=torch.int64))
