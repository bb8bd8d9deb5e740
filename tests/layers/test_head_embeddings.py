"""Head embeddings against one head after the other, and the multi-head attention that they stand for."""

import pytest
import torch
from torch import Tensor

from regard import create
from regard.bench.cost import flops
from regard.layers.sequence.head_embeddings import (
    HeadEmbeddingAdded,
    HeadEmbeddingAttention,
    HeadEmbeddingMultiplied,
    naive,
    projection_parameters,
)
from regard.nn import Attention, Rotary
from regard.ops.positions import rotary_angles

both = pytest.mark.parametrize("form", [HeadEmbeddingMultiplied, HeadEmbeddingAdded])


def build(form: type[HeadEmbeddingAttention], dtype: torch.dtype = torch.float64, **options) -> HeadEmbeddingAttention:
    """A layer whose heads differ clearly."""
    return form(**{"dim": 12, "num_heads": 3, "init_std": 0.7, **options}).to(dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rotary(head_dim: int) -> Rotary:
    return Rotary(rotary_angles(torch.ones((), dtype=torch.float64), head_dim))


def multi_head(layer: HeadEmbeddingMultiplied) -> Attention:
    """Multi-head attention with the rows of the shared projections multiplied out for every head."""
    full = Attention(layer.dim, layer.num_heads, head_dim=layer.head_dim, causal=layer.causal).to(layer.out.weight)
    for name in "qkv":
        shared, ours = getattr(layer, name), getattr(full, name)
        gain = 1 + getattr(layer, f"{name}_embed")
        ours.weight.data = (gain[:, :, None] * shared.weight).flatten(0, 1).detach()
        ours.bias.data = (gain * shared.bias).flatten().detach()
    full.out.load_state_dict(layer.out.state_dict())
    return full


@both
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_heads": 1, "head_dim": 5}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_one_head_after_the_other(form: type, options: dict, batch: int) -> None:
    layer = build(form, **options)
    x = normal(batch, 5, 12).requires_grad_()
    mask = torch.rand(batch, 5, 5) > 0.3
    mask[0, 2] = False
    for given in (None, mask):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        leaves = [
            x,
            *(p for name, p in layer.named_parameters() if name != "k_embed" or form is not HeadEmbeddingAdded),
        ]
        cotangent = torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@both
def test_cross_attention(form: type) -> None:
    layer = build(form, context_dim=7)
    x, context = normal(2, 3, 12), normal(2, 6, 7)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    torch.testing.assert_close(layer(x, context, mask=mask), naive(layer, x, context, mask=mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, context), naive(layer, x, context), rtol=0, atol=1e-12)


@both
def test_masks_of_single_heads_and_of_causal_rows(form: type) -> None:
    layer = build(form, causal=True)
    x, mask = normal(2, 5, 12), torch.rand(2, 3, 5, 5) > 0.5
    mask[:, 1, 3] = False
    torch.testing.assert_close(layer(x, mask=mask), naive(layer, x, mask=mask), rtol=0, atol=1e-12)
    padded = torch.arange(5).expand(2, -1) >= 2
    torch.testing.assert_close(layer(x, mask=padded), naive(layer, x, mask=padded), rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("turned", [False, True])
def test_decoding_equals_the_whole(form: type, turned: bool) -> None:
    layer = build(form, causal=True)
    layer.rotary = rotary(4) if turned else None
    x, mask = normal(2, 7, 12), torch.arange(7).expand(2, -1) >= torch.tensor([[0], [2]])
    cache, steps, at = layer.new_cache(2, 7, dtype=torch.float64), [], 0
    for part in x.split([3, 1, 1, 2], 1):
        at += part.shape[1]
        steps.append(layer(part, mask=mask[:, :at], cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, mask=mask), rtol=0, atol=1e-12)
    assert cache.k.shape[1] == (3 if turned else 1)


def test_multiplied_heads_are_multi_head_attention() -> None:
    layer = build(HeadEmbeddingMultiplied, causal=True)
    x = normal(2, 6, 12)
    torch.testing.assert_close(layer(x), multi_head(layer)(x), rtol=0, atol=1e-10)


def test_multiplied_heads_are_multi_head_attention_under_rotary_positions() -> None:
    """Keys cannot be shared there: a gain moved to the queries would be turned by another angle."""
    layer = build(HeadEmbeddingMultiplied)
    full = multi_head(layer)
    layer.rotary = full.rotary = rotary(4)
    x = normal(2, 6, 12)
    torch.testing.assert_close(layer(x), full(x), rtol=0, atol=1e-10)
    q, k = layer.queries(layer.split(layer.q(x), 1)), layer.split(layer.k(x), 1)
    folded = layer.scores(layer.rotary(q), layer.rotary(k))
    assert (folded - full.scores(*(full.rotary(y) for y in full.project(x, x)[:2]))).abs().max() > 1e-3


def test_without_embeddings_all_heads_are_one() -> None:
    layer = build(HeadEmbeddingMultiplied, init_std=0.0)
    single = Attention(12, 1, head_dim=4).double()
    state = layer.state_dict()
    single.load_state_dict(
        {name: state[name] for name in single.state_dict() if not name.startswith("out")}, strict=False
    )
    x = normal(2, 5, 12)
    head = single.attend(*single.project(x, x), None)
    torch.testing.assert_close(layer(x), layer.merge(head.expand(-1, 3, -1, -1)), rtol=0, atol=1e-12)


def weights_of(layer: HeadEmbeddingAttention, x: Tensor) -> Tensor:
    return layer.normalize(layer.scores(*layer.project(x, x)[:2]), None)


def test_added_heads_differ_by_their_query_embeddings_alone() -> None:
    layer, x = build(HeadEmbeddingAdded), normal(1, 5, 12)
    assert (weights_of(layer, x).std(1) > 1e-4).any()
    layer.q_embed.data.zero_()
    weights = weights_of(layer, x)
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights), rtol=0, atol=1e-15)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_added_key_embedding_has_no_gradient_and_a_multiplied_one_has(causal: bool, masked: bool) -> None:
    x = normal(2, 6, 12)
    mask = torch.arange(6).expand(2, -1) < torch.tensor([[4], [6]]) if masked else None
    sizes = {}
    for form in (HeadEmbeddingAdded, HeadEmbeddingMultiplied):
        layer = build(form, causal=causal)
        (grad,) = torch.autograd.grad((naive(layer, x, mask=mask) * normal(2, 6, 12)).sum(), layer.k_embed)
        sizes[form] = grad.abs().max().item()
    assert sizes[HeadEmbeddingAdded] <= 1e-10
    assert sizes[HeadEmbeddingMultiplied] > 1e-3


def test_an_added_key_embedding_counts_under_rotary_positions() -> None:
    layer, x = build(HeadEmbeddingAdded), normal(1, 6, 12)
    layer.rotary = rotary(4)
    out = layer(x)
    (grad,) = torch.autograd.grad(out.square().sum(), layer.k_embed)
    assert grad.abs().max() > 1e-3
    angles = torch.arange(6, dtype=torch.float64)[:, None] * layer.rotary.rates
    turn = torch.polar(torch.ones_like(angles), angles)
    for head in range(3):
        q, k = (
            torch.complex(y[..., :2], y[..., 2:]) * turn
            for y in (layer.q(x)[0] + layer.q_embed[head], layer.k(x)[0] + layer.k_embed[head])
        )
        weights = (q @ k.conj().T).real.div(2).softmax(-1)
        heads = weights @ layer.v(x)[0] + layer.v_embed[head]
        part = layer.out.weight[:, 4 * head : 4 * head + 4]
        out = out - heads @ part.T
    torch.testing.assert_close(out, layer.out.bias.expand_as(out), rtol=0, atol=1e-12)


@both
def test_nothing_to_look_at(form: type) -> None:
    layer = build(form)
    x = normal(2, 3, 12).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert not x.grad[1].any()
    empty = layer(x.detach(), x.new_zeros(2, 0, 12))
    torch.testing.assert_close(empty, layer.out.bias.expand_as(empty), rtol=0, atol=0)


@both
def test_dropout_acts_on_weights(form: type) -> None:
    layer = build(form, dropout=0.5)
    x = normal(1, 5, 12)
    q, k, _ = layer.project(x, x)
    eye = torch.eye(5, dtype=torch.float64).expand(1, 1, 5, 5)
    kept, exact = layer.attend(q, k, eye, None), weights_of(layer, x)
    assert ((kept == 0) | ((kept - 2 * exact).abs() < 1e-12)).all()
    assert (kept == 0).any()


def test_parameters_of_the_papers_model() -> None:
    """Width 768 with 12 heads of 64, counted in the paper's formula and in the layer."""
    table = projection_parameters(768, 12, 64)
    assert table["multi-head"] == 1_769_472
    assert table["single head"] == 147_456
    assert table["head embeddings"] == 147_456 + 2_304
    assert table["multi-query"] == 14 * 768 * 64
    n, d = 12, 64
    assert table["multi-head"] - table["head embeddings"] == (3 * n * n - 3 * n) * d * d - 3 * n * d
    for form in (HeadEmbeddingMultiplied, HeadEmbeddingAdded):
        layer = form(768, 12, bias=False)
        count = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("out"))
        assert count == table["head embeddings"]
    full = Attention(768, 12, bias=False)
    assert sum(part.weight.numel() for part in (full.q, full.k, full.v)) == table["multi-head"]


@both
def test_projections_and_cache_take_one_part_in_h(form: type) -> None:
    layer, full, x = form(24, 6, causal=True), Attention(24, 6, causal=True), torch.randn(1, 10, 24)
    saved = 3 * 2 * 10 * 24 * (24 - 4)
    shift = 2 * 24 * 24 if form is HeadEmbeddingAdded else 0
    assert flops(full, x).total - flops(layer, x).total == saved - shift
    assert layer.new_cache(2, 10).nbytes * 6 == full.new_cache(2, 10).nbytes


@both
def test_half_precision(form: type) -> None:
    exact, half = build(form), build(form, torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x = torch.randn(1, 5, 12, dtype=torch.bfloat16)
    out = half(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=0, atol=0.05)


def test_names_and_start() -> None:
    layer = create("head-embeddings", dim=768, num_heads=12)
    assert type(layer) is HeadEmbeddingMultiplied
    assert layer.q_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert type(create("head-embeddings-add", dim=32, num_heads=4)) is HeadEmbeddingAdded


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_heads": 5}, "dim=12"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"init_std": -1.0}, r"init_std=-1\.0"),
    ],
)
def test_bad_arguments(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(HeadEmbeddingMultiplied, **options)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="context"):
        build(HeadEmbeddingAdded, causal=True)(normal(1, 3, 12), normal(1, 3, 12))
    with pytest.raises((ValueError, RuntimeError), match="7"):
        build(HeadEmbeddingMultiplied)(normal(1, 3, 12), normal(1, 4, 7))
