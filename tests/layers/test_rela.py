"""Rectified linear attention against loops, and what follows from the absence of a row sum."""

import pytest
import torch
from torch import Tensor

from regard import create
from regard.layers.sequence.rela import (
    GatedRMSNorm,
    RectifiedLinearAttention,
    ReLAGated,
    ReLAInit,
    alignment_error_rate,
    head_diversity,
    naive,
    null_rate,
    sparsity,
)

FORMS = [ReLAGated, ReLAInit]
both = pytest.mark.parametrize("form", FORMS)


def build(
    form: type[RectifiedLinearAttention], dtype: torch.dtype = torch.float64, **options
) -> RectifiedLinearAttention:
    return form(**{"dim": 12, "num_heads": 3, **options}).to(dtype)


def weights_of(layer: RectifiedLinearAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, _ = layer.project(x, x)
    return layer.normalize(layer.scores(q, k), mask)


@both
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_kv_heads": 1, "head_dim": 5}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_loops(form: type, options: dict, batch: int) -> None:
    layer = build(form, **options)
    x = torch.randn(batch, 5, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(batch, 5, 5) > 0.3
    mask[0, 2] = False
    for given in (None, mask):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@both
def test_cross_attention_equals_loops(form: type) -> None:
    layer = build(form, context_dim=7)
    x, context = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    torch.testing.assert_close(layer(x, context, mask=mask), naive(layer, x, context, mask=mask), rtol=0, atol=1e-12)


@both
def test_decoding_equals_the_whole(form: type) -> None:
    layer = build(form, causal=True)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    cache = layer.new_cache(2, 7, dtype=torch.float64)
    got = torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 1, 2], 1)], 1)
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-12)


@both
def test_keys_in_parts_add_up(form: type) -> None:
    layer = build(form)
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    q, k, v = layer.project(x, x)
    parts = [
        layer.mix(layer.normalize(layer.scores(q, some), None), values)
        for some, values in zip(k.split(4, 2), v.split(4, 2))
    ]
    torch.testing.assert_close(layer.merge(torch.stack(parts).sum(0)), layer(x), rtol=0, atol=1e-10)


def test_norm_ignores_the_size_of_values_and_of_a_row_of_scores() -> None:
    layer = build(ReLAInit)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = layer.project(x, x)
    out = layer.attend(q, k, v, None)
    expected = layer.merge(out)
    torch.testing.assert_close(layer.merge(layer.attend(q, k, 7 * v, None)), expected, rtol=1e-6, atol=1e-6)
    row = torch.tensor([1.0, 3.0, 0.2, 1.0, 9.0], dtype=torch.float64)[:, None]
    scaled = layer.attend(q * row, k, v, None)
    torch.testing.assert_close(scaled, out * row, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.merge(scaled), expected, rtol=1e-5, atol=1e-5)


def test_gate_sees_the_size() -> None:
    norm = GatedRMSNorm(6, 1e-8).double()
    o = torch.randn(4, 6, dtype=torch.float64)
    plain = norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(norm(o), plain * torch.sigmoid(norm.gate * o), rtol=0, atol=1e-12)
    assert not torch.allclose(norm(5 * o), norm(o), atol=1e-2)


@both
def test_key_with_a_negative_score_changes_nothing(form: type) -> None:
    layer = build(form)
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    q, k, v = layer.project(x, x)
    against = -10 * torch.linalg.pinv(q[0]).sum(-1)[None, :, None]
    assert (layer.scores(q, against) < 0).all()
    more = layer.attend(q, torch.cat((k, against), 2), torch.cat((v, torch.randn_like(v[:, :, :1])), 2), None)
    torch.testing.assert_close(more, layer.attend(q, k, v, None), rtol=0, atol=0)
    alone = layer.merge(layer.attend(q, against, v[:, :, :1], None))
    torch.testing.assert_close(alone, layer.out.bias.expand_as(alone), rtol=0, atol=0)


@both
@pytest.mark.parametrize("n", [64, 4096])
def test_size_does_not_grow_with_the_number_of_keys(form: type, n: int) -> None:
    torch.manual_seed(1)
    layer = build(form, torch.float32)
    x, context = torch.randn(1, 8, 12), torch.randn(1, n, 12) + 1.0
    q, k, v = layer.project(x, context)
    o = layer.attend(q, k, v, None).transpose(1, 2).flatten(2)
    size = (o / layer.norm.weight.numel() ** 0.5).norm(dim=-1)
    assert size.min() > 0.01 * n
    plain = torch.nn.functional.rms_norm(o, o.shape[-1:], eps=1e-8).square().mean(-1).sqrt()
    torch.testing.assert_close(plain, torch.ones_like(plain), rtol=0, atol=1e-3)
    half = build(form, torch.float16)
    half.load_state_dict(layer.state_dict())
    out = half(x.half(), context.half())
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), layer(x, context), rtol=0, atol=0.02)


@both
def test_nothing_to_look_at(form: type) -> None:
    layer = build(form)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
    empty = layer(x.detach(), x.new_zeros(2, 0, 12))
    torch.testing.assert_close(empty, layer.out.bias.expand_as(empty), rtol=0, atol=0)
    assert layer(x[:, :1]).isfinite().all()


def test_dropout_acts_on_weights() -> None:
    layer = build(ReLAInit, dropout=0.5)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    q, k, _ = layer.project(x, x)
    eye = torch.eye(5, dtype=torch.float64).expand(1, 3, 5, 5)
    kept, exact = layer.attend(q, k, eye, None), weights_of(layer, x)
    assert ((kept == 0) | ((kept - 2 * exact).abs() < 1e-12)).all()
    assert ((kept == 0) & (exact > 0)).any()


def test_where_the_two_forms_start() -> None:
    torch.manual_seed(0)
    gated, init = build(ReLAGated, dim=768, num_heads=12), build(ReLAInit, dim=768, num_heads=12)
    assert (gated.norm.weight == 1).all()
    assert gated.norm.gate.abs().max() <= (3 / 768) ** 0.5
    torch.testing.assert_close(gated.norm.gate.var().item(), 1 / 768, rtol=0.1, atol=0)
    assert init.norm.weight.abs().max() <= (3 / 64) ** 0.5
    torch.testing.assert_close(init.norm.weight.var().item(), 1 / 64, rtol=0.1, atol=0)


def test_parameters_of_the_papers_model() -> None:
    """Transformer-base has 18 attentions of width 512: the gated form adds 18 432 parameters to 72.31 M."""
    from regard.nn import Attention

    count = [sum(p.numel() for p in layer.parameters()) for layer in (ReLAGated(512, 8), Attention(512, 8))]
    assert 18 * (count[0] - count[1]) == 18 * 2 * 512


def test_measures_of_weights() -> None:
    weights = torch.tensor([[[[0.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]]])
    torch.testing.assert_close(sparsity(weights), torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(
        sparsity(weights, torch.tensor([[True, False], [True, True]])), torch.tensor([1.0, 1 / 3])
    )
    torch.testing.assert_close(null_rate(weights), torch.tensor([0.5, 0.0]))
    # Query 0: two heads on different keys, log 2; query 1: one head alone, 0.
    torch.testing.assert_close(head_diversity(weights), torch.tensor(2.0).log() / 2)
    alike = weights[:, :1].expand(1, 4, 2, 2)
    assert head_diversity(alike) == 0
    assert head_diversity(torch.zeros(1, 2, 2, 2)) == 0


def test_alignment_error_rate() -> None:
    links = torch.tensor([[True, True], [False, True]])
    sure = torch.tensor([[True, False], [False, False]])
    possible = torch.tensor([[True, True], [False, False]])
    assert alignment_error_rate(links, sure, possible) == pytest.approx(1 - (1 + 2) / (3 + 1))
    assert alignment_error_rate(sure, sure, possible) == 0.0


def test_names() -> None:
    assert type(create("rela", dim=32, num_heads=4)) is ReLAGated
    assert type(create("rela-init", dim=32, num_heads=4)) is ReLAInit


@both
def test_bad_input(form: type) -> None:
    with pytest.raises(ValueError, match="dim=12"):
        build(form, num_heads=5)
    with pytest.raises(ValueError, match=r"eps=0\.0"):
        build(form, eps=0.0)
    with pytest.raises(ValueError, match="float64"):
        build(form)(torch.randn(1, 3, 12, dtype=torch.float64), mask=torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(TypeError):
        RectifiedLinearAttention(12, 3)
