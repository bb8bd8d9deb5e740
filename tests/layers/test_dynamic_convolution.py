"""Convolutions whose kernels are normalised, and predicted: against loops, against torch's own convolution, step by step."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import regard as rg
from regard.hosts.tiny import tiny_llama
from regard.layers.sequence.dynamic_convolution import (
    DynamicConvolution,
    LightweightConvolution,
    SequenceConvolution,
    convolve,
    naive,
)
from regard.nn import Cache, KVCache
from regard.ops.attend import causal_mask

FORMS = [DynamicConvolution, LightweightConvolution]
both = pytest.mark.parametrize("form", FORMS)
exact = {"rtol": 0, "atol": 1e-12}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(form: type[SequenceConvolution], kernel_size: int = 5, dim: int = 12, **options) -> SequenceConvolution:
    layer = form(dim, 4, kernel_size=kernel_size, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def bare(layer: SequenceConvolution) -> SequenceConvolution:
    """The layer without its projections."""
    layer.input, layer.out = nn.Identity(), nn.Identity()
    return layer


@both
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"glu": False, "head_dim": 2}], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 31])
@pytest.mark.parametrize("renorm", [False, True])
def test_equals_loops(form: type, options: dict, kernel_size: int, renorm: bool) -> None:
    layer = build(form, kernel_size, renorm_padding=renorm, **options)
    for b, n in ((1, 1), (2, 7)):
        x = normal(b, n, 12).requires_grad_()
        mask = torch.rand(b, 1, n, n) > 0.3
        mask[0, :, 0] = False
        for kind in (None, mask, mask[:, 0, -1]):
            fast, slow = layer(x, mask=kind), naive(layer, x, mask=kind)
            torch.testing.assert_close(fast, slow, **exact)
            leaves = [x, *layer.parameters()]
            pull = torch.randn_like(fast)
            grads = [torch.autograd.grad((y * pull).sum(), leaves, materialize_grads=True) for y in (fast, slow)]
            for a, e in zip(*grads):
                torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel_size", [1, 3, 4, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_lightweight_is_a_depthwise_convolution(kernel_size: int, causal: bool, n: int) -> None:
    layer = bare(build(LightweightConvolution, kernel_size, causal=causal, glu=False))
    x = normal(2, n, 12)
    left = kernel_size - 1 if causal else (kernel_size - 1) // 2
    kernel = layer.kernel.softmax(-1).repeat_interleave(3, 0)[:, None]
    expected = F.conv1d(F.pad(x.mT, (left, kernel_size - 1 - left)), kernel, groups=12).mT
    torch.testing.assert_close(layer(x), expected, **exact)


def test_a_head_for_every_channel() -> None:
    layer = bare(LightweightConvolution(6, 6, kernel_size=3, glu=False).double())
    conv = nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(layer.kernel.softmax(-1)[:, None])
    x = normal(2, 9, 6)
    torch.testing.assert_close(layer(x), conv(x.mT).mT, **exact)


def test_on_numbers() -> None:
    """Two heads of one channel, causal, kernels (1/4, 3/4) and (1/2, 1/2); the channels are 1, 2, 3 and 4, 0, 8."""
    layer = bare(LightweightConvolution(2, 2, kernel_size=2, causal=True, glu=False).double())
    with torch.no_grad():
        layer.kernel.copy_(torch.tensor([[0.0, torch.tensor(3.0).log()], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 4.0], [2.0, 0.0], [3.0, 8.0]], dtype=torch.float64)[None]
    expected = torch.tensor([[0.75, 2.0], [1.75, 2.0], [2.75, 4.0]], dtype=torch.float64)[None]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-7)


def test_predicting_nothing_is_averaging() -> None:
    layer = bare(build(DynamicConvolution, 3, glu=False))
    nn.init.zeros_(layer.kernel.weight)
    x = normal(2, 9, 12)
    torch.testing.assert_close(layer(x), F.avg_pool1d(x.mT, 3, 1, 1).mT, **exact)


@both
def test_a_window_of_one_is_the_token(form: type) -> None:
    layer = bare(build(form, 1, glu=False))
    x = normal(2, 9, 12)
    torch.testing.assert_close(layer(x), x, **exact)


def test_without_a_softmax_it_is_linear_in_the_kernel() -> None:
    class Plain(LightweightConvolution):
        def normalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
            return logits

    one, two, sum_ = (bare(build(Plain, glu=False)) for _ in range(3))
    with torch.no_grad():
        sum_.kernel.copy_(one.kernel - 2 * two.kernel)
    x = normal(2, 9, 12)
    torch.testing.assert_close(sum_(x), one(x) - 2 * two(x), **exact)


def test_parameters() -> None:
    count = {}
    with torch.device("meta"):
        for form in FORMS:
            layer = form(1024, 16, kernel_size=31)
            count[form] = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("kernel"))
    assert count == {LightweightConvolution: 496, DynamicConvolution: 507_904}


def test_where_it_starts() -> None:
    layer, fixed = DynamicConvolution(64, 8), LightweightConvolution(64, 8)
    for p, fan in ((layer.kernel.weight, 64 + 248), (layer.input.weight, 64 + 128), (fixed.kernel, 31 * 9)):
        assert p.abs().max() <= (6 / fan) ** 0.5
        torch.testing.assert_close(p.var().item(), 2 / fan, rtol=0.25, atol=0)


@both
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_outside_the_window_is_read(form: type, causal: bool) -> None:
    layer = build(form, 5, causal=causal)
    x = normal(1, 12, 12)
    reach = torch.autograd.functional.jacobian(lambda x: layer(x).sum((0, 2)), x)[:, 0].abs().amax(-1)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    torch.testing.assert_close(reach > 0, (j >= i - (4 if causal else 2)) & (j <= i + (0 if causal else 2)))


def test_a_predicted_kernel_depends_on_its_own_token() -> None:
    layer, x = build(DynamicConvolution), normal(1, 12, 12)
    kernels = torch.autograd.functional.jacobian(lambda u: layer.logits(u).sum((0, 1, 3)), x)[:, 0].abs().amax(-1)
    torch.testing.assert_close(kernels > 0, torch.eye(12, dtype=torch.bool))


def test_kernels_belong_to_blocks_of_channels() -> None:
    for form in FORMS:
        layer = bare(build(form, glu=False))
        u = normal(1, 9, 12)
        changed = layer.logits(u).expand(1, 4, 9, 5).clone()
        changed[:, 1] += normal(9, 5)
        heads = u.unflatten(-1, (4, 3)).transpose(1, 2)
        new = convolve(heads, changed.softmax(-1), 9, 2).transpose(1, 2).flatten(2)
        touched = ((new - layer(u)).abs() > 1e-9).any(1)[0]
        assert touched.tolist() == [False] * 3 + [True] * 3 + [False] * 6


@both
def test_outputs_shrink_at_the_ends_unless_renormalised(form: type) -> None:
    """Where every token is one, an output is the sum of the weights that hit something."""
    ones, mask = torch.ones(1, 6, 12, dtype=torch.float64), torch.tensor([[True] * 5 + [False]])
    layer = bare(build(form, 5, glu=False))
    share = layer.logits(ones).softmax(-1).expand(1, 4, 6, 5)
    out = layer(ones)[0, :, ::3].T
    torch.testing.assert_close(out[:, 0], share[0, :, 0, 2:].sum(-1), **exact)
    torch.testing.assert_close(out[:, 3], torch.ones(4).double(), rtol=0, atol=0.5)
    torch.testing.assert_close(layer(ones, mask=mask)[0, 4, ::3], share[0, :, 4, :3].sum(-1), **exact)
    layer.renorm_padding = True
    torch.testing.assert_close(layer(ones), ones, **exact)
    torch.testing.assert_close(layer(ones, mask=mask)[:, :5], ones[:, :5], **exact)


@both
def test_a_window_longer_than_the_sequence_keeps_its_sum(form: type) -> None:
    """The softmax is over all taps, of which three are there: what is left of it is not brought back to one."""
    layer = bare(build(form, 7, glu=False, causal=True))
    x = normal(1, 3, 12)
    share = layer.logits(x).softmax(-1).expand(1, 4, 3, 7)[0, :, 2, 4:]
    expected = torch.einsum("hk,khd->hd", share, x[0].unflatten(-1, (4, 3))).flatten()
    torch.testing.assert_close(layer(x)[0, 2], expected, **exact)
    assert (share.sum(-1) < 0.9).all()


@both
@pytest.mark.parametrize("kernel_size", [1, 2, 5])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
def test_decoding_equals_the_whole(form: type, kernel_size: int, renorm: bool, chunks: list[int]) -> None:
    layer = build(form, kernel_size, causal=True, renorm_padding=renorm)
    x = normal(2, 9, 12)
    mask = torch.tensor([[False, False] + [True] * 7, [True] * 9])
    caches: list[Cache] = [layer.new_cache(2, 9, dtype=torch.float64), KVCache(2, 4, 9, 3, dtype=torch.float64)]
    for known in (None, mask):
        for cache in caches if known is None else [layer.new_cache(2, 9, dtype=torch.float64)]:
            got, end = [], 0
            for part in x.split(chunks, 1):
                end += part.shape[1]
                got.append(layer(part, cache=cache, mask=None if known is None else known[:, :end]))
            torch.testing.assert_close(torch.cat(got, 1), layer(x, mask=known), **exact)
            assert cache.position == 9


@both
def test_a_cache_holds_the_window(form: type) -> None:
    layer = build(form, 5, causal=True)
    x = normal(2, 9, 12)
    cache = layer.new_cache(2, 10**9, dtype=torch.float64)
    assert isinstance(cache, Cache)
    layer(x[:, :7], cache=cache)
    assert cache.nbytes == 2 * 4 * 12 * 8
    assert cache.held.untyped_storage().nbytes() == cache.nbytes
    cache.reorder(torch.tensor([1, 1]))
    torch.testing.assert_close(layer(x[[1, 1], 7:], cache=cache), layer(x[[1, 1]])[:, 7:], **exact)
    with pytest.raises(ValueError, match="none can be taken out"):
        cache.keep(torch.zeros(2, 4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="float32"):
        cache.append(torch.zeros(2, 4, 1, 3), torch.zeros(2, 4, 1, 3))


@both
def test_masks(form: type) -> None:
    layer = build(form)
    x = normal(2, 9, 12)
    mask = torch.tensor([[True] * 6 + [False] * 3, [True, False, True] * 3])
    padded = build(form, causal=False)
    padded.load_state_dict(layer.state_dict())
    enter = layer.enter
    padded.enter = lambda x: enter(x) * mask[..., None]  # type: ignore[method-assign]
    torch.testing.assert_close(layer(x, mask=mask)[mask], padded(x)[mask], **exact)
    wide = mask[:, None].expand(-1, 9, -1)
    torch.testing.assert_close(layer(x, mask=wide), layer(x, mask=mask), **exact)
    torch.testing.assert_close(layer(x, mask=wide[:, None].expand(-1, 4, -1, -1)), layer(x, mask=mask), **exact)
    nothing = layer(x, mask=torch.zeros(2, 9, dtype=torch.bool))
    torch.testing.assert_close(nothing, layer.out.bias.expand(2, 9, -1), **exact)


@both
def test_causality_may_come_with_the_mask(form: type) -> None:
    layer = build(form, causal=True)
    x, mask = normal(2, 9, 12), torch.tensor([[False] * 2 + [True] * 7, [True] * 9])
    pairs = causal_mask(9, 9) & mask[:, None, None]
    torch.testing.assert_close(layer(x, mask=pairs), layer(x, mask=mask), **exact)


@both
def test_dropout_is_of_normalised_weights(form: type) -> None:
    layer = bare(build(form, 1, dim=400, glu=False, dropout=0.25)).train()
    out = layer(torch.ones(8, 50, 400, dtype=torch.float64)).flatten()
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.75), **exact)
    assert 0 < kept.double().mean() <= 1
    if form is DynamicConvolution:
        torch.testing.assert_close(kept.double().mean().item(), 0.75, rtol=0, atol=0.05)


@both
def test_work_grows_with_the_length(form: type) -> None:
    layer = form(32, 4, kernel_size=7)

    def flops(n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, n, 32))
        return counter.get_total_flops()

    assert flops(7 * 64) == 4 * flops(7 * 16)
    kernels = 2 * 32 * 4 * 7 if form is DynamicConvolution else 0
    assert flops(70) == 70 * (2 * 32 * 96 + kernels + 2 * 13 * 32)


@both
def test_in_the_place_of_a_decoders_attention(form: type) -> None:
    model, inputs = tiny_llama()
    name = "dynamic-convolution" + ("" if form is DynamicConvolution else "-lightweight")
    plain = model(**inputs, use_cache=False).logits
    with rg.swap(model, "*.self_attn", name, kernel_size=3):
        out = model(**inputs, use_cache=False).logits
        last = {k: v[:, :-1] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        torch.testing.assert_close(model(**last, use_cache=False).logits, out[:, :-1], rtol=0, atol=1e-5)
        assert not torch.allclose(out, plain)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, plain, rtol=0, atol=0)


@both
def test_bad_input(form: type) -> None:
    with pytest.raises(ValueError, match="dim=12"):
        form(12, 5)
    with pytest.raises(ValueError, match="kernel_size=0"):
        form(12, 4, kernel_size=0)
    with pytest.raises(ValueError, match=r"dropout=1\.0"):
        form(12, 4, dropout=1.0)
    layer = build(form)
    x = normal(1, 6, 12)
    with pytest.raises(ValueError, match="boolean"):
        layer(x, mask=torch.ones(1, 6))
    with pytest.raises(ValueError, match="6 tokens that read 6"):
        layer(x, mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="not causal"):
        layer(x, cache=layer.new_cache(1, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(b, n, 12\)"):
        layer(normal(1, 6, 10))
