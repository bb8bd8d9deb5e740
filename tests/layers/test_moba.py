"""Mixture of block attention against one query at a time and dense masks, its limits, and what it must not see."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from regard.layers.sparse.moba import MoBA, moba_attention, moba_gate, naive
from regard.nn import KVCache
from regard.ops import masks
from regard.ops.attend import attend, causal_mask, reference
from regard.ops.select import to_dense


def inputs(
    b: int = 2, h: int = 4, g: int = 2, n: int = 23, d: int = 5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [torch.randn(b, heads, n, d, dtype=dtype, requires_grad=True) for heads in (h, g, g)]


def dense_gate(q: Tensor, k: Tensor, block_size: int, topk: int) -> Tensor:
    """The published listing: scores of block means, +inf for the own block, -inf for later ones, the best ``topk``."""
    (b, h, l, _), n = q.shape, -(-k.shape[2] // block_size)
    keys = k.repeat_interleave(h // k.shape[1], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    means = torch.stack([block.to(wide).mean(2) for block in keys.split(block_size, 2)], 2)
    gate = q.detach().to(wide) @ means.transpose(-1, -2).detach()
    own, block = torch.arange(l)[:, None] // block_size, torch.arange(n)
    gate = gate.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)
    chosen = gate.topk(min(topk, n), -1).indices
    return torch.zeros(b, h, l, n, dtype=torch.bool).scatter(-1, chosen, True) & (block <= own)


def dense(q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int) -> Tensor:
    seen = dense_gate(q, k, block_size, topk).repeat_interleave(block_size, -1)[..., : k.shape[2]]
    return reference(q, k, v, mask=seen, causal=True)


def agree(out: Tensor, expected: Tensor, leaves: list[Tensor], atol: float = 1e-12) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (out, expected))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(("block_size", "topk"), [(4, 2), (4, 3), (5, 4), (1, 3), (7, 9)], ids=str)
def test_equals_dense_mask(heads: tuple[int, int], block_size: int, topk: int) -> None:
    q, k, v = inputs(2, *heads)
    out = moba_attention(q, k, v, block_size=block_size, topk=topk)
    agree(out, dense(q, k, v, block_size, topk), [q, k, v])


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_usual_head_sizes(d: int) -> None:
    q, k, v = inputs(1, 4, 2, 70, d, torch.float32)
    out = moba_attention(q, k, v, block_size=16, topk=3)
    agree(out, dense(q, k, v, 16, 3), [q, k, v], 1e-5)


def test_half_precision() -> None:
    q, k, v = inputs(1, 2, 2, 256, 64, torch.bfloat16)
    q32, k32, v32 = (x.detach().float().requires_grad_() for x in (q, k, v))
    out, expected = moba_attention(q, k, v, block_size=32, topk=3), dense(q32, k32, v32, 32, 3)
    cotangent = torch.randn_like(expected)
    got = [out, *torch.autograd.grad(out, [q, k, v], cotangent.bfloat16())]
    wanted = [expected, *torch.autograd.grad(expected, [q32, k32, v32], cotangent.bfloat16().float())]
    for ours, theirs in zip(got, wanted):
        gap = (ours.float() - theirs).abs()
        assert ours.dtype == torch.bfloat16
        assert gap.max() <= 2e-2 * max(1.0, theirs.abs().max().item())
        assert gap.mean() <= 4e-4


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "head_dim": 5}, {"topk": 1}, {"full": True}], ids=str)
@pytest.mark.parametrize("n", [1, 3, 18])
def test_layer_equals_one_query_at_a_time(options: dict, n: int) -> None:
    layer = MoBA(**{"dim": 12, "num_heads": 4, "block_size": 4, "topk": 3, **options}).double()
    x = torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, n) > 0.4
    mask[0], mask[1, :2] = True, False
    for given in (None, mask):
        agree(layer(x, mask=given), naive(layer, x, mask=given), [x, *layer.parameters()])


@pytest.mark.parametrize(("block_size", "topk"), [(4, 6), (4, 100), (23, 1), (64, 2)], ids=str)
def test_enough_blocks_are_full_attention(block_size: int, topk: int) -> None:
    q, k, v = inputs()
    out = moba_attention(q, k, v, block_size=block_size, topk=topk)
    agree(out, reference(q, k, v, causal=True), [q, k, v])


def test_one_block_is_local_attention() -> None:
    q, k, v = inputs()
    local = masks.dense(masks.both(masks.blocks(4), masks.causal()), 1, 1, 23, 23)
    agree(moba_attention(q, k, v, block_size=4, topk=1), reference(q, k, v, mask=local), [q, k, v])


@pytest.mark.parametrize("kind", ["latest", "first"])
def test_window_and_sink_are_special_cases(kind: str) -> None:
    """Keys along one channel whose size orders the blocks; queries that agree with it look where it is largest."""
    q, k, v = (x.detach() for x in inputs(1, 1, 1, 24))
    size = torch.arange(24.0, dtype=torch.float64).floor_divide(4) if kind == "latest" else -torch.arange(24.0).double()
    k[..., 0], q[..., 0] = 100 * size, 1.0
    block, own = torch.arange(24) // 4, torch.arange(24)[:, None] // 4
    past = block == own - 1 if kind == "latest" else block == 0
    allowed = (past | (block == own)) & causal_mask(24, 24)
    out = moba_attention(q, k, v, block_size=4, topk=2, scale=0.01)
    torch.testing.assert_close(out, reference(q, k, v, mask=allowed, scale=0.01), rtol=0, atol=1e-12)


def test_gate_is_that_of_the_listing() -> None:
    q, k, _ = inputs(2, 6, 3, 50)
    for block_size, topk in ((8, 3), (7, 2), (50, 4), (3, 30)):
        index, valid = moba_gate(q, k, block_size=block_size, topk=topk)
        gate = to_dense(index, valid, -(-50 // block_size))
        assert torch.equal(gate, dense_gate(q, k, block_size, topk))
        own = torch.arange(50) // block_size
        assert torch.equal(gate.sum(-1), (own + 1).clamp(max=topk).expand(2, 6, 50))
        assert (index[..., 0] == own).all()
        seen = gate.repeat_interleave(block_size, -1)[..., :50] & causal_mask(50, 50)
        assert seen.sum(-1).max() <= topk * block_size


def test_equal_blocks_are_not_all_taken() -> None:
    q, k = torch.ones(1, 1, 20, 3), torch.ones(1, 1, 20, 3)
    index, valid = moba_gate(q, k, block_size=4, topk=3)
    assert index[0, 0, 19].tolist() == [4, 0, 1]
    assert valid.sum(-1).max() == 3


def test_choice_is_made_in_single_precision() -> None:
    """Two blocks whose means differ by less than bfloat16 can tell."""
    k = torch.ones(1, 1, 512, 1, dtype=torch.bfloat16)
    k[:, :, 255] = 1.25
    index, _ = moba_gate(torch.ones(1, 1, 512, 1, dtype=torch.bfloat16), k, block_size=128, topk=2)
    assert index[0, 0, 511].tolist() == [3, 1]


@pytest.mark.parametrize("t", [0, 3, 4, 13, 21])
def test_later_tokens_change_nothing(t: int) -> None:
    q, k, v = (x.detach() for x in inputs())
    out = moba_attention(q, k, v, block_size=4, topk=3)
    for x in (q, k, v):
        x[:, :, t + 1 :] = 10 * torch.randn_like(x[:, :, t + 1 :])
    changed = moba_attention(q, k, v, block_size=4, topk=3)
    torch.testing.assert_close(changed[:, :, : t + 1], out[:, :, : t + 1], rtol=0, atol=1e-14)
    assert not torch.equal(changed[:, :, t + 1 :], out[:, :, t + 1 :])


def test_packed_sequences_do_not_meet() -> None:
    q, k, v = inputs(1, 4, 2, 30)
    bounds = [0, 1, 12, 17, 30]
    packed = moba_attention(q, k, v, block_size=4, topk=2, cu_seqlens=torch.tensor(bounds))
    alone = [dense(*(x[:, :, i:j] for x in (q, k, v)), 4, 2) for i, j in pairwise(bounds)]
    agree(packed, torch.cat(alone, 2), [q, k, v])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_decoding_equals_the_whole(full: bool, num_kv_heads: int) -> None:
    layer = MoBA(12, 4, num_kv_heads, block_size=3, topk=2, full=full).double()
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    expected = layer(x)
    for chunks in ([1] * 17, [7, 1, 4, 5]):
        cache = layer.new_cache(2, 17, dtype=torch.float64)
        got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_full_decoding_after_a_sparse_prompt() -> None:
    layer = MoBA(12, 4, block_size=3, topk=2).double()
    x = torch.randn(1, 18, 12, dtype=torch.float64)
    cache = layer.new_cache(1, 18, dtype=torch.float64)
    prompt = layer(x[:, :17], cache=cache)
    torch.testing.assert_close(prompt, naive(layer, x[:, :17]), rtol=0, atol=1e-12)
    layer.set_full(True)
    last = layer(x[:, 17:], cache=cache)
    q, k, v = layer.project(x, x)
    torch.testing.assert_close(last, layer.merge(attend(q, k, v, causal=True))[:, 17:], rtol=0, atol=1e-12)
    layer.set_full(False)
    assert not torch.allclose(layer(x)[:, 17:], last)


def test_padding_of_whole_blocks_on_the_left() -> None:
    layer = MoBA(12, 4, block_size=4, topk=2).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    padded = torch.cat((torch.randn(2, 8, 12, dtype=torch.float64), x), 1)
    mask = (torch.arange(18) >= 8).expand(2, -1)
    torch.testing.assert_close(layer(padded, mask=mask)[:, 8:], layer(x), rtol=0, atol=1e-12)


def test_nothing_to_look_at() -> None:
    layer = MoBA(12, 4, block_size=4, topk=2).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1] = False
    out = layer(x, mask=mask)
    torch.testing.assert_close(out[1], layer.out.bias.expand(10, -1), rtol=0, atol=0)
    out.sum().backward()
    assert x.grad[0].any()
    assert not x.grad[1].any()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"topk": 0}, "topk=0"), ({"block_size": 0}, "block_size=0"), ({"num_kv_heads": 3}, "num_kv_heads=3")],
)
def test_bad_arguments(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoBA(12, 4, **options)
    with pytest.raises(TypeError):
        MoBA(12, 4, causal=False)


def test_bad_input() -> None:
    q, k, v = (x.detach() for x in inputs(n=8))
    sizes = {"block_size": 4, "topk": 2}
    for bounds in ([0, 4, 4, 8], [0, 5], [1, 8], [0], [0, 9, 8]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            moba_attention(q, k, v, **sizes, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="multiple of key heads"):
        moba_attention(q[:, :3], k, v, **sizes)
    with pytest.raises(ValueError, match="l=8, s=5"):
        moba_attention(q, k[:, :, :5], v[:, :, :5], **sizes)
    with pytest.raises(ValueError, match="topk=0"):
        moba_attention(q, k, v, block_size=4, topk=0)
    with pytest.raises(ValueError, match="mask must be"):
        moba_attention(q, k, v, **sizes, mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
    layer = MoBA(12, 4, **sizes)
    x = torch.randn(2, 8, 12)
    with pytest.raises(ValueError, match="context"):
        layer(x, x)
    with pytest.raises(ValueError, match="mask must be"):
        layer(x, mask=torch.ones(2, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="cache"):
        layer(x, cache=KVCache(2, 4, 7, 3))
