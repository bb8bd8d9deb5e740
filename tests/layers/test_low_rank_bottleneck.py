"""Heads of any size against loops and torch's own; what a head can represent, and how standard heads are contained."""

import pytest
import torch
from torch import Tensor, nn

from regard import create
from regard.bench.cost import flops, parameters
from regard.layers.sequence.low_rank_bottleneck import FixedHeadAttention, naive, realize, widen
from regard.nn import Attention


def build(dtype: torch.dtype = torch.float64, **options) -> FixedHeadAttention:
    return FixedHeadAttention(**{"dim": 12, "num_heads": 3, "head_dim": 7, **options}).to(dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"v_head_dim": 2, "num_kv_heads": 1}, {"head_dim": 40, "bias": False}], ids=str
)
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


def test_cross_attention_equals_loops() -> None:
    layer = build(context_dim=5, v_head_dim=4)
    x, context = normal(2, 3, 12), normal(2, 6, 5)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    torch.testing.assert_close(layer(x, context, mask=mask), naive(layer, x, context, mask=mask), rtol=0, atol=1e-12)


def test_decoding_equals_the_whole() -> None:
    layer = build(causal=True, num_kv_heads=1, v_head_dim=3)
    x = normal(2, 7, 12)
    cache = layer.new_cache(2, 7, dtype=torch.float64)
    got = torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 1, 2], 1)], 1)
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-12)
    assert cache.k.shape[-1] == 7
    assert cache.v.shape[-1] == 3


def test_heads_that_make_up_the_width_are_those_of_torch() -> None:
    layer, host = build(torch.float32, head_dim=4), nn.MultiheadAttention(12, 3, batch_first=True)
    host.in_proj_weight.data = torch.cat([part.weight for part in (layer.q, layer.k, layer.v)]).detach()
    host.in_proj_bias.data = torch.cat([part.bias for part in (layer.q, layer.k, layer.v)]).detach()
    host.out_proj.load_state_dict(layer.out.state_dict())
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(layer(x), host(x, x, x, need_weights=False)[0], rtol=0, atol=1e-6)


def test_scale_is_that_of_the_head_and_not_of_the_width() -> None:
    layer = build()
    x = normal(1, 4, 12)
    q, k, v = layer.project(x, x)
    weights = torch.softmax(q @ k.mT / 7**0.5, -1)
    torch.testing.assert_close(layer(x), layer.merge(weights @ v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_dim", [1, 3, 8])
def test_rank_of_scores_is_at_most_the_head_size(head_dim: int) -> None:
    """The same holds of centred log weights, so a pattern whose own rank is larger is out of reach."""
    layer = build(head_dim=head_dim, dim=24)
    x = normal(1, 16, 24)
    scores = layer.scores(*layer.project(x, x)[:2])[0]
    size = torch.linalg.svdvals(scores)
    assert (size[:, head_dim:] <= 1e-10 * size[:, :1]).all()
    logs = scores.log_softmax(-1)
    size = torch.linalg.svdvals(logs - logs.mean(-1, keepdim=True))
    assert (size[:, head_dim:] <= 1e-10 * size[:, :1]).all()
    pattern = normal(16, 16).softmax(-1).log()
    size = torch.linalg.svdvals(pattern - pattern.mean(-1, keepdim=True))
    assert size[head_dim] > 0.1


def attend_with(w_q: Tensor, w_k: Tensor, x: Tensor) -> Tensor:
    """The weights of a layer whose only head has these projections."""
    layer = FixedHeadAttention(x.shape[1], 1, head_dim=len(w_q), bias=False).to(x.dtype)
    layer.q.weight.data, layer.k.weight.data = w_q, w_k
    return layer.normalize(layer.scores(*layer.project(x[None], x[None])[:2]), None)[0, 0]


@pytest.mark.parametrize(("n", "dim", "head_dim"), [(32, 64, 32), (32, 64, 31), (16, 16, 16), (9, 20, 50), (1, 3, 1)])
def test_any_pattern_can_be_realized(n: int, dim: int, head_dim: int) -> None:
    pattern, x = (3 * normal(n, n)).softmax(-1), normal(n, dim)
    torch.testing.assert_close(attend_with(*realize(pattern, x, head_dim), x), pattern, rtol=0, atol=1e-8)


def test_patterns_of_low_rank_and_with_zeros() -> None:
    x = normal(6, 8)
    uniform = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(attend_with(*realize(uniform, x, 1), x), uniform, rtol=0, atol=1e-12)
    low = (normal(6, 2) @ normal(2, 6)).softmax(-1)
    torch.testing.assert_close(attend_with(*realize(low, x, 2), x), low, rtol=0, atol=1e-10)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(attend_with(*realize(eye, x, 6, eps=1e-9), x), eye, rtol=0, atol=1e-8)


def test_a_causal_pattern_is_what_the_mask_leaves_of_a_full_one() -> None:
    x, scores = normal(7, 9), normal(7, 7)
    past = torch.ones(7, 7, dtype=torch.bool).tril()
    w_q, w_k = realize(scores.softmax(-1), x, 7)
    layer = FixedHeadAttention(9, 1, head_dim=7, bias=False, causal=True).double()
    layer.q.weight.data, layer.k.weight.data = w_q, w_k
    got = layer.normalize(layer.scores(*layer.project(x[None], x[None])[:2]), past)[0, 0]
    torch.testing.assert_close(got, scores.masked_fill(~past, -torch.inf).softmax(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_kv_heads": 1}, {"bias": False}, {"context_dim": 5}])
@pytest.mark.parametrize("head_dim", [4, 5, 32])
def test_standard_heads_are_contained(options: dict, head_dim: int) -> None:
    layer = Attention(12, 3, dropout=0.1, **options).double().eval()
    wide = widen(layer, head_dim)
    x, context = normal(2, 6, 12), normal(2, 4, 5) if "context_dim" in options else None
    torch.testing.assert_close(wide(x, context), layer(x, context), rtol=0, atol=1e-10)
    assert wide.head_dim == head_dim
    assert wide.dropout == 0.1
    assert not wide.training


def test_cost_grows_with_heads_times_their_size() -> None:
    x = torch.randn(1, 17, 24)
    for heads, size in ((3, 8), (3, 40), (6, 40)):
        layer = FixedHeadAttention(24, heads, head_dim=size, bias=False)
        assert parameters(layer) == 4 * 24 * heads * size + 24
        assert flops(layer, x).total == 2 * 17 * heads * size * (4 * 24 + 2 * 17)
    same = Attention(24, 3, bias=False), FixedHeadAttention(24, 3, head_dim=8, bias=False)
    assert parameters(same[0]) == parameters(same[1])


def test_default_size_of_a_head() -> None:
    assert FixedHeadAttention(32, 4).head_dim == 128
    assert FixedHeadAttention(32, 4, max_length=64).head_dim == 64
    assert FixedHeadAttention(32, 4, max_length=512).head_dim == 128
    assert FixedHeadAttention(32, 4, head_dim=5, max_length=512).head_dim == 5
    assert type(create("low-rank-bottleneck", dim=32, num_heads=4)) is FixedHeadAttention


def test_nothing_to_look_at_and_one_token() -> None:
    layer = build(v_head_dim=3)
    x = normal(2, 3, 12).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert not x.grad[1].any()
    one = x[:, :1].detach()
    torch.testing.assert_close(layer(one), layer.out(layer.v(one)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: build(head_dim=0), "head_dim=0"),
        (lambda: build(v_head_dim=0), "v_head_dim=0"),
        (lambda: build(num_heads=0), "num_heads=0"),
        (lambda: build(head_dim=None, max_length=0), "max_length=0"),
        (lambda: realize(normal(4, 4).softmax(-1), normal(4, 3), 4), "n=4 tokens of c=3"),
        (lambda: realize(normal(4, 4).softmax(-1), normal(1, 6).expand(4, -1), 4), "linearly independent"),
        (lambda: realize(torch.eye(4, dtype=torch.float64), normal(4, 6), 4), "give eps"),
        (lambda: realize(torch.ones(4, 4, dtype=torch.float64), normal(4, 6), 4), "sum to 1"),
        (lambda: realize(normal(6, 6).softmax(-1), normal(6, 8), 4), "head_dim=4.*rank 5"),
        (lambda: widen(Attention(12, 3), 3), "head_dim=3"),
    ],
)
def test_bad_input(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
