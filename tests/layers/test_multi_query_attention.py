"""Multi-query attention against multi-head attention with copied heads, the kernels' own grouping, and two hosts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from regard.layers.sequence.multi_query_attention import MultiQueryAttention, convert, first_head, mean_head, naive
from regard.nn import Attention, KVCache
from regard.ops.attend import attend


def build(dtype: torch.dtype = torch.float64, **options) -> MultiQueryAttention:
    return MultiQueryAttention(**{"dim": 24, "num_heads": 6, **options}).to(dtype)


def repeated(layer: MultiQueryAttention) -> Attention:
    """Multi-head attention whose key heads are copies of the shared ones."""
    full = Attention(layer.dim, layer.num_heads, head_dim=layer.head_dim, causal=layer.causal, bias=False).to(
        layer.q.weight
    )
    state = layer.state_dict()
    for name in ("k.weight", "v.weight"):
        heads = state[name].unflatten(0, (layer.num_kv_heads, layer.head_dim))
        state[name] = heads.repeat_interleave(layer.num_heads // layer.num_kv_heads, 0).flatten(0, 1)
    full.load_state_dict(state)
    return full


def agree(out: Tensor, expected: Tensor, leaves: list[Tensor], atol: float = 1e-12) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    cotangent = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_multi_head_attention_with_copied_heads(num_kv_heads: int, causal: bool) -> None:
    layer = build(num_kv_heads=num_kv_heads, causal=causal)
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 7, 7) > 0.3
    mask[1, 3] = False
    full = repeated(layer)
    agree(layer(x, mask=mask), full(x, mask=mask), [x])
    agree(layer(x, mask=mask), naive(layer, x, mask=mask), [x, *layer.parameters()])


def test_grouping_is_that_of_the_kernel() -> None:
    layer = build(torch.float32, num_kv_heads=2)
    x = torch.randn(2, 9, 24)
    q, k, v = layer.project(x, x)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(layer(x), layer.merge(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_decoding_equals_the_whole(rope: bool, num_kv_heads: int) -> None:
    layer = build(torch.float32, num_kv_heads=num_kv_heads, causal=True, rope=rope)
    x = torch.randn(3, 11, 24)
    expected = layer(x)
    for chunks in ([1] * 11, [4, 1, 1, 5]):
        cache = layer.new_cache(3, 11)
        got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_beams_that_change_places() -> None:
    layer = build(causal=True, rope=True)
    x, rows = torch.randn(3, 8, 24, dtype=torch.float64), torch.tensor([2, 0, 0])
    cache = layer.new_cache(3, 8, dtype=torch.float64)
    layer(x[:, :5], cache=cache)
    cache.reorder(rows)
    got = torch.cat([layer(token, cache=cache) for token in x[:, 5:].split(1, 1)], 1)
    expected = layer(torch.cat((x[rows, :5], x[:, 5:]), 1))[:, 5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    cache.crop(6)
    torch.testing.assert_close(layer(x[:, 6:], cache=cache), expected[:, 1:], rtol=0, atol=1e-12)


def test_padding_on_the_left() -> None:
    layer = build(causal=True, rope=True)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    padded = torch.cat((torch.randn(1, 3, 24, dtype=torch.float64), x), 1)
    mask = torch.arange(8)[None] >= 3
    torch.testing.assert_close(layer(padded, mask=mask)[:, 3:], layer(x), rtol=0, atol=1e-12)
    cache = layer.new_cache(1, 8, dtype=torch.float64)
    steps = [layer(padded[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in range(8)]
    torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], layer(x), rtol=0, atol=1e-12)


def test_rotation_sees_distances_only() -> None:
    layer = build(rope=True)
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    (q, k, _), (later_q, later_k, _) = layer.project(x, x), layer.project(x, x, start=9)
    assert not torch.allclose(k, later_k)
    torch.testing.assert_close(layer.scores(later_q, later_k), layer.scores(q, k), rtol=0, atol=1e-12)
    torch.testing.assert_close(k[:, :, 0], layer.split(layer.k(x), 1)[:, :, 0])


@pytest.mark.parametrize("mask", [None, (1, 1, 1, 9), (2, 6, 1, 9), (9,)], ids=str)
def test_one_query_reads_each_key_head_once(mask: tuple[int, ...] | None) -> None:
    q, k, v = (
        torch.randn(2, heads, n, 4, dtype=torch.float64, requires_grad=True) for heads, n in ((6, 1), (2, 9), (2, 9))
    )
    allowed = None if mask is None else torch.rand(mask) > 0.4
    wide = [x.repeat_interleave(3, 1) for x in (k, v)]
    agree(attend(q, k, v, mask=allowed, causal=True), attend(q, *wide, mask=allowed, backend="reference"), [q, k, v])


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_decoding_allocates_less_than_the_cache_holds(num_kv_heads: int) -> None:
    layer = build(torch.float32, num_kv_heads=num_kv_heads, head_dim=64, causal=True)
    cache = layer.new_cache(4, 1024)
    cache.append(*(torch.randn(4, num_kv_heads, 1023, 64) for _ in range(2)))
    mask = torch.ones(4, 1024, dtype=torch.bool)
    with torch.no_grad(), profile(profile_memory=True, acc_events=True) as seen:
        layer(torch.randn(4, 1, 24), cache=cache, mask=mask)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.events())
    assert 0 < allocated < cache.nbytes / 4


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_cost_is_what_is_counted(num_kv_heads: int) -> None:
    layer, full = (build(torch.float32, num_kv_heads=g, causal=True) for g in (num_kv_heads, 6))
    cache = layer.new_cache(3, 17)
    with torch.no_grad():
        layer(torch.randn(3, 16, 24), cache=cache)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(torch.randn(3, 1, 24), cache=cache)
    cost, most = layer.decode_cost(17, batch=3), full.decode_cost(17, batch=3)
    assert 2 * cost.multiply_adds == counter.get_total_flops()
    assert cost.cache_bytes == cache.nbytes
    assert most.cache_bytes * num_kv_heads == cost.cache_bytes * 6
    assert layer.k.weight.numel() * 6 == full.k.weight.numel() * num_kv_heads


def test_memory_per_compute_follows_the_papers_terms() -> None:
    """One more token costs 1 / c per multiplication with all heads, and 1 / (c h) with one."""
    dim, heads, batch = 4096, 32, 1 << 20
    with torch.device("meta"):
        one, all_heads = (MultiQueryAttention(dim, heads, g) for g in (1, heads))
    slopes = []
    for layer in (one, all_heads):
        short, long = layer.decode_cost(1, batch), layer.decode_cost(65, batch)
        slopes.append((long.numbers_moved - short.numbers_moved) / (64 * batch))
    assert slopes[1] == 2 * dim
    assert slopes[0] == 2 * dim / heads
    assert all_heads.decode_cost(1, 1).memory_per_compute > 0.99
    assert one.decode_cost(1024, batch).memory_per_compute < all_heads.decode_cost(1024, batch).memory_per_compute / 15


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_convert_pools_whole_heads(num_kv_heads: int) -> None:
    full = Attention(24, 6, causal=True, dropout=0.1).double()
    for pool, expected in ((mean_head, lambda w: w.mean(0)), (first_head, lambda w: w[0])):
        grouped = convert(full, num_kv_heads, pool)
        share = 6 // num_kv_heads
        for g in range(num_kv_heads):
            for name in ("k", "v"):
                ours, theirs = getattr(grouped, name), getattr(full, name)
                heads = theirs.weight.unflatten(0, (6, 4))[g * share : (g + 1) * share]
                torch.testing.assert_close(ours.weight.unflatten(0, (-1, 4))[g], expected(heads), rtol=0, atol=0)
                biases = theirs.bias.unflatten(0, (6, 4))[g * share : (g + 1) * share]
                torch.testing.assert_close(ours.bias.unflatten(0, (-1, 4))[g], expected(biases), rtol=0, atol=0)
        assert grouped.causal
        assert grouped.dropout == 0.1


def test_convert_of_equal_heads_changes_nothing() -> None:
    layer = build(num_kv_heads=2, rope=True)
    full = build(num_kv_heads=6, rope=True)
    full.load_state_dict(repeated(layer).state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for pool in (mean_head, first_head):
        torch.testing.assert_close(convert(full, 2, pool)(x), full(x), rtol=0, atol=1e-12)
    before = full.k.weight.clone()
    convert(full).k.weight.data.zero_()
    assert torch.equal(full.k.weight, before)


def test_transformers_multi_query_layers() -> None:
    """GPT-BigCode and Falcon keep one fused matrix: all query heads, then the key head, then the value head."""
    bigcode = pytest.importorskip("transformers.models.gpt_bigcode.modeling_gpt_bigcode")
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    config = bigcode.GPTBigCodeConfig(n_embd=24, n_head=6, attn_pdrop=0.0, attn_implementation="eager")
    host = bigcode.GPTBigCodeAttention(config, layer_idx=0).eval()
    layer = build(torch.float32, bias=True)
    x = torch.randn(2, 7, 24)
    load_fused(layer, host.c_attn, host.c_proj)
    torch.testing.assert_close(layer(x), host(x)[0], rtol=0, atol=1e-6)

    config = falcon.FalconConfig(
        hidden_size=24, num_attention_heads=6, multi_query=True, new_decoder_architecture=False, bias=True, alibi=False
    )
    config._attn_implementation = "eager"
    host = falcon.FalconAttention(config, layer_idx=0).eval()
    rotary = falcon.FalconRotaryEmbedding(config)
    layer = build(torch.float32, bias=True, rope=True)
    load_fused(layer, host.query_key_value, host.dense)
    embedded = rotary(x, torch.arange(7)[None])
    out = host(x, alibi=None, attention_mask=torch.zeros(2, 1, 7, 7), position_embeddings=embedded)[0]
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-6)


def load_fused(layer: MultiQueryAttention, fused: torch.nn.Module, out: torch.nn.Module) -> None:
    state = {"out.weight": out.weight, "out.bias": out.bias}
    for kind in ("weight", "bias"):
        parts = getattr(fused, kind).split((24, 4, 4))
        state |= {f"{name}.{kind}": part for name, part in zip("qkv", parts)}
    layer.load_state_dict(state)


def test_context_without_tokens_gives_zero() -> None:
    layer = build(context_dim=10)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    out = layer(x, x.new_zeros(2, 0, 10))
    torch.testing.assert_close(out, layer.out.bias.expand_as(out))
    out.sum().backward()
    assert not x.grad.any()


def test_fully_masked_rows_are_zero() -> None:
    layer = build(num_kv_heads=2)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 3, [False] * 3])
    out = layer(x, mask=mask)
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1))
    out.sum().backward()
    assert x.grad[0].any()
    assert not x.grad[1].any()


def test_half_precision_and_one_sample() -> None:
    exact, half = build(rope=True, causal=True), build(torch.bfloat16, rope=True, causal=True)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x = torch.randn(1, 5, 24, dtype=torch.bfloat16)
    out = half(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"num_heads": 5}, "dim=24"),
        ({"head_dim": 3, "rope": True}, "head_dim=3"),
    ],
)
def test_bad_arguments(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**options)


def test_bad_input() -> None:
    layer = build(causal=True, rope=True)
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    for cache in (
        KVCache(3, 1, 8, 4, dtype=torch.float64),
        KVCache(2, 1, 8, 4),
        KVCache(2, 1, 3, 4, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="cache"):
            layer(x, cache=cache)
        assert cache.length == 0
    with pytest.raises(ValueError, match="context"):
        layer(x, x)
    with pytest.raises(ValueError, match="context"):
        build(rope=True)(x, x.clone())
    q, k = torch.randn(1, 6, 5, 4), torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="causal"):
        attend(q, k, k, causal=True)
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        convert(Attention(24, 6), 4)
