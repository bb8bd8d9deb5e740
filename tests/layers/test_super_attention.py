"""Three attentions with fewer projections against loops, against torch's own, and what the matrix over positions does."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from regard.layers.sequence.super_attention import (
    EfficientAttention,
    OptimisedAttention,
    SuperAttention,
    convert,
    naive,
)
from regard.nn import Attention, Rotary
from regard.ops.attend import attend

FORMS = [OptimisedAttention, EfficientAttention, SuperAttention]
three = pytest.mark.parametrize("form", FORMS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(form: type[OptimisedAttention], dtype: torch.dtype = torch.float64, **options) -> OptimisedAttention:
    if form is SuperAttention:
        options = {"context_length": 8, **options}
    layer = form(**{"dim": 12, "num_heads": 4, **options}).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


@three
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_loops(form: type, options: dict, batch: int) -> None:
    layer = build(form, **options)
    x = normal(batch, 5, 12).requires_grad_()
    keys = torch.rand(batch, 5) > 0.3
    keys[0] = False
    rows = torch.rand(batch, 5, 5) > 0.3
    rows[0, 2] = False
    for given in (None, keys) if form is SuperAttention else (None, keys, rows):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_alignments", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_matrices_for_groups_of_heads(num_alignments: int, causal: bool) -> None:
    layer = build(SuperAttention, num_alignments=num_alignments, causal=causal)
    x = normal(2, 7, 12)
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=0, atol=1e-10)


@three
def test_cross_attention(form: type) -> None:
    layer = build(form)
    x, context = normal(2, 3, 12), normal(2, 6, 12)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    torch.testing.assert_close(layer(x, context, mask=mask), naive(layer, x, context, mask=mask), rtol=0, atol=1e-10)
    assert layer(x[:1], context[:1]).shape == (1, 3, 12)


def test_weights_that_are_left() -> None:
    c, n, h = 24, 10, 4
    options = {"num_heads": h, "bias": False}

    def weights(layer: nn.Module) -> int:
        return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))

    assert weights(Attention(c, **options)) == 4 * c**2
    assert weights(OptimisedAttention(c, **options)) == 3 * c**2
    assert weights(EfficientAttention(c, **options)) == 2 * c**2
    assert weights(SuperAttention(c, context_length=n, **options)) == 2 * c**2 + n**2
    assert weights(SuperAttention(c, context_length=n, num_alignments=h, **options)) == 2 * c**2 + h * n**2


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("bias", [False, True])
def test_one_head_converts_exactly(form: type, bias: bool) -> None:
    """One of two consecutive linear maps is redundant."""
    mha = nn.MultiheadAttention(16, 1, bias=bias, batch_first=True)
    with torch.no_grad():
        for p in mha.parameters():
            p += 0.1 * torch.randn_like(p)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    layer = convert(mha, form, strict=True)
    torch.testing.assert_close(layer(x), mha(x, x, x)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x, context), mha(x, context, context)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS[:2])
def test_more_heads_convert_to_the_nearest(form: type) -> None:
    mha = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    with pytest.warns(UserWarning, match="num_heads=4"):
        layer = convert(mha, form)
    with torch.no_grad():
        assert not torch.allclose(layer(x), mha(x, x, x)[0], atol=1e-3)
        w_q, w_k, w_v = mha.in_proj_weight.chunk(3)
        for own in torch.arange(16).split(4):
            # What the slices can hold of the products of each head, which is all of their part and nothing else.
            pair, through = w_q[own].T @ w_k[own], w_v[own].T @ mha.out_proj.weight[:, own].T
            if form is EfficientAttention:
                torch.testing.assert_close(layer.q.weight[own].T, pair[:, own])
            torch.testing.assert_close(layer.out.weight[:, own].T, through[own])


def test_convert_refuses() -> None:
    mha = nn.MultiheadAttention(16, 4)
    with pytest.raises(ValueError, match="num_heads=4"):
        convert(mha, EfficientAttention, strict=True)
    with pytest.raises(ValueError, match="to=SuperAttention"):
        convert(mha, SuperAttention)
    with pytest.raises(ValueError, match="embed_dim"):
        convert(nn.MultiheadAttention(16, 1, kdim=8), EfficientAttention)


def test_identity_over_positions_is_efficient_attention() -> None:
    layer, plain = build(SuperAttention), build(EfficientAttention)
    layer.start_as_efficient()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("align", "shift")})
    x, mask = normal(2, 5, 12), torch.tensor([[True, False, True, True, True], [True] * 5])
    torch.testing.assert_close(layer(x, mask=mask), plain(x, mask=mask), rtol=0, atol=1e-14)


def test_identity_projections_leave_attention_itself() -> None:
    layer = EfficientAttention(9, 1, bias=False).double()
    with torch.no_grad():
        for linear in (layer.q, layer.out):
            linear.weight.copy_(torch.eye(9))
    x, context = normal(2, 5, 9), normal(2, 7, 9)
    expected = (x @ context.mT / 3).softmax(-1) @ context
    torch.testing.assert_close(layer(x, context), expected, rtol=0, atol=1e-14)


def test_softmax_is_over_keys() -> None:
    layer = build(OptimisedAttention)
    q, k, _ = layer.project(normal(2, 3, 12), normal(2, 6, 12))
    weights = layer.normalize(layer.scores(q, k), None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3).double(), rtol=0, atol=1e-14)


def test_only_super_attention_knows_of_places() -> None:
    x, order = normal(2, 8, 12), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    layer = build(SuperAttention, bias=False)
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order])
    with torch.no_grad():
        layer.align.copy_(0.7 * torch.eye(8) + 0.2)
    for one in (layer, build(OptimisedAttention), build(EfficientAttention)):
        torch.testing.assert_close(one(x[:, order]), one(x)[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS[:2])
def test_heads_see_their_slices_only(form: type) -> None:
    layer = build(form)
    x, context = normal(1, 3, 12), normal(1, 4, 12)
    _, k, v = layer.project(x, context)
    changed = context.clone()
    changed[..., 3:6] += 1
    _, k2, v2 = layer.project(x, changed)
    for old, new in [(v, v2), (k, k2)][: 1 + (form is EfficientAttention)]:
        torch.testing.assert_close(new[:, 1], old[:, 1] + 1, rtol=0, atol=0)
        torch.testing.assert_close(new[:, [0, 2, 3]], old[:, [0, 2, 3]], rtol=0, atol=0)
    order = torch.arange(12).roll(1)
    assert not torch.allclose(layer(x[..., order])[..., order.argsort()], layer(x))


def test_padding_does_not_reach_mixed_values() -> None:
    layer = build(SuperAttention)
    x, mask = normal(2, 6, 12), torch.tensor([[True] * 4 + [False] * 2, [True, False] * 3])
    spoiled = torch.where(mask[..., None], x, 50.0)
    torch.testing.assert_close(layer(spoiled, mask=mask)[mask], layer(x, mask=mask)[mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[:1], mask=mask[:1])[:, :4], layer(x[:1, :4]), rtol=0, atol=1e-12)


def test_leading_block_serves_shorter_inputs() -> None:
    long, short = build(SuperAttention, context_length=8), build(SuperAttention, context_length=5)
    state = long.state_dict()
    state["align"], state["shift"] = state["align"][:, :5, :5], state["shift"][:, :5]
    short.load_state_dict(state)
    x = normal(1, 5, 12)
    torch.testing.assert_close(short(x), long(x), rtol=0, atol=1e-14)


@three
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_equals_the_whole(form: type, masked: bool) -> None:
    layer = build(form, causal=True)
    x = normal(2, 7, 12)
    mask = torch.tensor([[False, False] + [True] * 5, [True] * 7]) if masked else None
    cache, got, end = layer.new_cache(2, 7, dtype=torch.float64), [], 0
    for part in x.split([3, 1, 1, 2], 1):
        end += part.shape[1]
        got.append(layer(part, cache=cache, mask=None if mask is None else mask[:, :end]))
    torch.testing.assert_close(torch.cat(got, 1), layer(x, mask=mask), rtol=0, atol=1e-12)


def test_causal_values_hold_no_later_token() -> None:
    layer = build(SuperAttention, causal=True)
    slices = normal(1, 4, 6, 3).requires_grad_()
    (grad,) = torch.autograd.grad(layer.mixed(slices, None)[:, :, 2].sum(), slices)
    assert grad[:, :, :3].all()
    assert not grad[:, :, 3:].any()


@three
def test_nothing_to_look_at(form: type) -> None:
    layer = build(form)
    x = normal(2, 3, 12).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=1e-15)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


@three
def test_rotary_turns_keys_and_leaves_values(form: type) -> None:
    layer = build(form, dim=16)
    layer.rotary = Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64))
    x = normal(2, 5, 16)
    q, k, v = layer.project(x, x)
    values = layer.mixed(v, None) if form is SuperAttention else v
    expected = layer.merge(attend(layer.rotary(q), layer.rotary(k), values))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_where_it_starts() -> None:
    layer = SuperAttention(64, 4, context_length=32)
    assert not any(p.any() for p in (layer.q.bias, layer.out.bias, layer.shift))
    for p, fan in ((layer.q.weight, 128), (layer.out.weight, 128), (layer.align, 64)):
        assert p.abs().max() <= (6 / fan) ** 0.5
        torch.testing.assert_close(p.var().item(), 2 / fan, rtol=0.1, atol=0)


def test_projections_cost_less() -> None:
    """Multiplications of one forward pass, counted by torch: 3 and 2 projections in the place of 4."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(layer: nn.Module, n: int, c: int) -> int:
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, n, c))
        return counter.get_total_flops()

    n, c = 32, 64
    four = flops(Attention(c, 4), n, c)
    one = 2 * n * c**2
    assert flops(OptimisedAttention(c, 4), n, c) == four - one
    assert flops(EfficientAttention(c, 4), n, c) == four - 2 * one
    assert flops(SuperAttention(c, 4, n), n, c) == four - 2 * one + 2 * n**2 * c


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dim=12"):
        EfficientAttention(12, 5)
    for form in FORMS:
        with pytest.raises(ValueError, match="dim=12 channels"):
            build(form)(normal(1, 3, 12), normal(1, 3, 10))
    layer = build(SuperAttention)
    with pytest.raises(ValueError, match="context_length=8"):
        layer(normal(1, 9, 12))
    with pytest.raises(ValueError, match="context_length=0"):
        SuperAttention(12, 4, 0)
    with pytest.raises(ValueError, match="num_alignments=3"):
        SuperAttention(12, 4, 8, num_alignments=3)
    with pytest.raises(ValueError, match="the same for every query"):
        layer(normal(1, 3, 12), mask=torch.ones(1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="causal"):
        build(SuperAttention, causal=True)(normal(1, 3, 12), normal(1, 3, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.MultiheadAttention(12, 1), EfficientAttention)
