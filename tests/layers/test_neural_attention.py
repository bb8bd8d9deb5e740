"""Scores by a perceptron: against loops over pairs, on weights that are known by hand, and what it keeps in memory."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from regard.layers.sequence.neural_attention import NeuralAttention, naive
from regard.nn import KVCache
from regard.ops import scores as functions

exact = {"rtol": 0, "atol": 1e-12}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(dim: int = 12, num_heads: int = 4, score_dim: int = 8, **options) -> NeuralAttention:
    layer = NeuralAttention(dim, num_heads, score_dim=score_dim, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"causal": True}, {"activation": F.gelu}], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("score_dim", [8, 9])
def test_equals_loops(options: dict, chunk: int, score_dim: int) -> None:
    layer = build(score_dim=score_dim, chunk=chunk, **options)
    for b, n in ((1, 1), (2, 7)):
        x = normal(b, n, 12).requires_grad_()
        mask = torch.rand(b, 4, n, n) > 0.3
        mask[0, :, 0] = False
        context = None if layer.causal else normal(b, 5, 12)
        for given in ({}, {"mask": mask}, {"context": context}):
            fast, slow = layer(x, **given), naive(layer, x, **given)
            torch.testing.assert_close(fast, slow, **exact)
            leaves, pull = [x, *layer.parameters()], torch.randn_like(fast)
            grads = [torch.autograd.grad((y * pull).sum(), leaves, materialize_grads=True) for y in (fast, slow)]
            for got, expected in zip(*grads):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_gradcheck() -> None:
    layer = build(chunk=3, activation=F.gelu)
    q, k = normal(1, 4, 4, 3).requires_grad_(), normal(1, 4, 5, 3).requires_grad_()
    torch.autograd.gradcheck(layer.scores, (q, k))
    torch.autograd.gradgradcheck(layer.scores, (q, k))


def test_scores_are_those_of_a_deep_score() -> None:
    layer = build(num_kv_heads=2, chunk=3)
    q, k = normal(2, 4, 5, 3), normal(2, 2, 6, 3)
    chain = (layer.first, layer.second, layer.last)
    wide = layer.key(k).repeat_interleave(2, 1)
    expected = functions.deep(layer.query(q), wide, [m.weight for m in chain], [m.bias for m in chain], F.relu)
    torch.testing.assert_close(layer.scores(q, k), expected, **exact)


def test_on_weights_known_by_hand() -> None:
    """Four units that are the positive and negative parts of q + k and q - k give |q + k| - |q - k|, no division."""
    with pytest.warns(UserWarning, match="2 units"):
        layer = NeuralAttention(1, 1, score_dim=4).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.query.weight[0] = layer.key.weight[0] = 1.0
        layer.first.weight[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
        layer.first.weight[:, 4] = torch.tensor([1.0, -1.0, -1.0, 1.0])
        layer.second.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
        layer.last.weight.copy_(torch.tensor([[1.0, -1.0]]))
    q, k = normal(1, 1, 6, 1), normal(1, 1, 7, 1)
    expected = (q + k.mT).abs() - (q - k.mT).abs()
    torch.testing.assert_close(layer.scores(q, k), expected, **exact)
    product = (q * k.mT).flatten()
    assert (expected.flatten().sign() == product.sign()).all()
    ranked = layer.scores(torch.full_like(q[:, :, :1], 9.0), k).flatten()
    assert torch.equal(ranked.argsort(), k.flatten().argsort())


def test_a_key_that_is_not_read_leaves_uniform_attention() -> None:
    layer = build()
    with torch.no_grad():
        layer.first.weight[:, 8:] = 0.0
    x = normal(2, 7, 12)
    mean = layer.v(x).mean(1, keepdim=True).expand(-1, 7, -1)
    torch.testing.assert_close(layer(x), layer.out(mean), **exact)


def test_dead_units_leave_uniform_attention() -> None:
    layer = build()
    with torch.no_grad():
        layer.second.bias.fill_(-1e3)
    q, k, _ = layer.project(normal(1, 5, 12), normal(1, 5, 12))
    assert (layer.scores(q, k) == layer.last.bias).all()


@pytest.mark.parametrize("score_dim", [2, 3, 7])
def test_few_units_warn(score_dim: int) -> None:
    with pytest.warns(UserWarning, match=f"score_dim={score_dim}"):
        NeuralAttention(12, 4, score_dim=score_dim)


def test_enough_units_do_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuralAttention(12, 4, score_dim=8)
        assert NeuralAttention(12, 4).second.out_features == 8


@pytest.mark.parametrize(("heads", "m"), [(1, 8), (4, 16), (8, 9)])
def test_parameters(heads: int, m: int) -> None:
    """Whatever the number of heads."""
    layer, d, half = NeuralAttention(64, heads, head_dim=8, score_dim=m), 8, m // 2
    extra = sum(p.numel() for name, p in layer.named_parameters() if name.split(".")[0] not in ("q", "k", "v", "out"))
    assert extra == 2 * (d * m + m) + (2 * m * m + m) + (m * half + half) + (half + 1)
    assert layer.q.bias is None


def test_rows_sum_to_one() -> None:
    layer = build()
    q, k, _ = layer.project(normal(2, 7, 12), normal(2, 9, 12))
    weights = layer.normalize(layer.scores(q, k), None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7).double(), **exact)


def test_masks_combine_with_causality() -> None:
    layer = build(causal=True)
    x, mask = normal(2, 6, 12), torch.tensor([[True] * 6, [False, True, True, False, True, True]])
    out = layer(x, mask=mask)
    changed = torch.where(mask[..., None], x, 7.0)
    torch.testing.assert_close(layer(changed, mask=mask)[mask], out[mask], **exact)
    torch.testing.assert_close(out[1, 0], layer.out.bias, **exact)
    changed = x.clone()
    changed[:, 4:] = 7.0
    torch.testing.assert_close(layer(changed, mask=mask)[:, :4], out[:, :4], **exact)


@pytest.mark.parametrize("chunks", [[1] * 7, [4, 1, 2], [7]], ids=str)
def test_decoding_equals_the_whole(chunks: list[int]) -> None:
    layer = build(causal=True, num_kv_heads=2, chunk=3)
    x = normal(2, 7, 12)
    cache = layer.new_cache(2, 7, dtype=torch.float64)
    assert isinstance(cache, KVCache)
    got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(got, layer(x), **exact)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_pairs_are_never_all_in_memory() -> None:
    h, n, m, chunk = 2, 64, 16, 8
    layer = NeuralAttention(16, h, score_dim=m, chunk=chunk)
    q, k = torch.randn(1, h, n, 8, requires_grad=True), torch.randn(1, h, n, 8)
    with Largest() as largest:
        layer.scores(q, k).sum().backward()
    assert largest.numel == h * chunk * n * m
    chain = (layer.first, layer.second, layer.last)
    with Largest() as whole:
        functions.deep(layer.query(q), layer.key(k), [p.weight for p in chain], [p.bias for p in chain], F.relu)
    assert whole.numel == h * n * n * 2 * m


def test_what_is_kept_for_the_backward_pass() -> None:
    """Nothing of the pairs, however many there are."""
    h, n, m = 2, 64, 16
    layer = NeuralAttention(16, h, score_dim=m, chunk=8)
    q, k = torch.randn(1, h, n, 8, requires_grad=True), torch.randn(1, h, n, 8)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def kept_by(work) -> int:  # type: ignore[no-untyped-def]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = work()
        return out.numel() and sum(kept.values())

    chain = (layer.first, layer.second, layer.last)
    whole = kept_by(
        lambda: functions.deep(layer.query(q), layer.key(k), [p.weight for p in chain], [p.bias for p in chain], F.relu)
    )
    assert whole > 4 * (kept_by(lambda: layer.scores(q, k)) + 3 * 4 * h * n * n)


def test_operations_of_a_pair() -> None:
    m, n, h = 16, 32, 4
    layer = NeuralAttention(32, h, score_dim=m)
    q = torch.randn(1, h, n, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer.scores(q, q)
    tokens = 2 * 2 * h * n * (8 * m + m * m)
    assert counter.get_total_flops() == tokens + h * n * n * (m * m + m)


def test_scores_start_small() -> None:
    """Without a scale weights start near uniform."""
    layer = NeuralAttention(64, 4)
    q, k, _ = layer.project(torch.randn(4, 32, 64), torch.randn(4, 32, 64))
    assert (32 * layer.normalize(layer.scores(q, k), None) - 1).abs().max() < 0.3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dim=12"):
        NeuralAttention(12, 5)
    with pytest.raises(ValueError, match="score_dim=1"):
        NeuralAttention(12, 4, score_dim=1)
    with pytest.raises(ValueError, match="chunk=0"):
        NeuralAttention(12, 4, chunk=0)
    with pytest.raises(ValueError, match="boolean"):
        build()(normal(1, 3, 12), mask=torch.ones(1, 3))
