"""Mixture-of-head attention against loops over tokens and heads, its limits, its balance, and rows that are skipped."""

import pytest
import torch
from torch import Tensor, nn

from regard import create, swap
from regard.bench.cost import flops
from regard.hosts.tiny import tiny_vit
from regard.layers.sequence.moh import (
    MixtureOfHeadAttention,
    MixtureOfHeads,
    QueryNormMixture,
    active_only,
    balance_losses,
    highest,
    naive,
)
from regard.nn import Attention, Rotary

both = pytest.mark.parametrize("form", [MixtureOfHeadAttention, QueryNormMixture])
MIXES = [(1, 2), (2, 1), (0, 3), (4, 0), (2, 2), (3, 1), (1, 3)]


def build(form: type[MixtureOfHeads], dtype: torch.dtype = torch.float64, **options) -> MixtureOfHeads:
    layer = form(**{"dim": 12, "num_heads": 4, "shared_heads": 1, "active_heads": 2, **options}).to(dtype)
    for name in ("router", "share", "balance"):
        if hasattr(layer, name):
            nn.init.normal_(getattr(layer, name).weight)
    return layer


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gates_of(layer: MixtureOfHeads, x: Tensor) -> Tensor:
    return layer.gates(x, layer.project(x, x)[0])


@both
@pytest.mark.parametrize(("shared", "active"), MIXES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "num_kv_heads": 2, "head_dim": 5}], ids=str)
def test_equals_loops(form: type, shared: int, active: int, options: dict) -> None:
    layer = build(form, shared_heads=shared, active_heads=active, **options)
    x = normal(2, 5, 12).requires_grad_()
    mask = torch.rand(2, 5, 5) > 0.3
    mask[0, 2] = False
    for given in (None, mask):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@both
def test_cross_attention_is_routed_by_its_queries(form: type) -> None:
    layer = build(form, context_dim=7)
    x, context = normal(2, 3, 12), normal(2, 6, 7)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    torch.testing.assert_close(layer(x, context, mask=mask), naive(layer, x, context, mask=mask), rtol=0, atol=1e-12)


def test_gates_by_hand() -> None:
    """Shares 1/2, 1/3, 1/6 of three routed heads, of which two are on: 3/5 and 2/5 of K = 2."""
    layer = build(MixtureOfHeadAttention, dim=3, num_heads=5, head_dim=2, shared_heads=2)
    layer.router.weight.data = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).log()[:, None] * torch.ones(3)
    layer.share.weight.data = torch.tensor([3.0, 1.0], dtype=torch.float64).log()[:, None] * torch.ones(3)
    layer.balance.weight.data = torch.tensor([1.0, 4.0], dtype=torch.float64).log()[:, None] * torch.ones(3)
    x = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([0.4 * 1.5, 0.4 * 0.5, 1.6 * 1.2, 1.6 * 0.8, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gates_of(layer, x)[0, 0], expected, rtol=0, atol=1e-12)


def test_longest_queries_are_on_by_hand() -> None:
    layer = build(QueryNormMixture, num_heads=4, head_dim=2, shared_heads=1)
    q = torch.tensor([[9.0, 9.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)[None, :, None]
    x = normal(1, 1, 12)
    norms = torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)
    expected = (norms / ((5 - 8 / 3) ** 2 + (1 - 8 / 3) ** 2 + (2 - 8 / 3) ** 2) ** 0.5 * 2**0.5).softmax(-1)
    torch.testing.assert_close(layer.route(x, q)[0, 0], expected, rtol=0, atol=1e-12)
    assert layer.gates(x, q)[0, 0].tolist() == [1.0, 1.0, 0.0, 1.0]


@both
@pytest.mark.parametrize(("shared", "active"), MIXES)
def test_just_so_many_heads_are_on_for_each_token(form: type, shared: int, active: int) -> None:
    gates = gates_of(build(form, shared_heads=shared, active_heads=active), normal(3, 9, 12))
    assert ((gates != 0).sum(-1) == shared + active).all()
    assert (gates[..., :shared] > 0).all()


@pytest.mark.parametrize(("shared", "active"), MIXES)
def test_gates_add_up_to_heads_that_are_on(shared: int, active: int) -> None:
    """Routed ones are divided by their sum and multiplied by K, not left to shrink with it."""
    layer, x = build(MixtureOfHeadAttention, shared_heads=shared, active_heads=active), normal(2, 9, 12)
    weights = 2 * layer.balance(x).softmax(-1) if shared and active else torch.ones(2, 9, 2)
    total = weights[..., 0] * shared + weights[..., 1] * active
    torch.testing.assert_close(gates_of(layer, x).sum(-1), total.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shared", "active"), [(4, 0), (0, 4), (2, 2), (1, 3)])
def test_indifferent_routers_leave_plain_attention(shared: int, active: int) -> None:
    layer, plain = build(MixtureOfHeadAttention, shared_heads=shared, active_heads=active), Attention(12, 4).double()
    for name in ("router", "share", "balance"):
        if hasattr(layer, name):
            nn.init.zeros_(getattr(layer, name).weight)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = normal(2, 7, 12)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)


def test_ties_go_to_the_first_heads() -> None:
    layer = build(MixtureOfHeadAttention, num_heads=8, head_dim=2, active_heads=3)
    nn.init.zeros_(layer.router.weight)
    on = gates_of(layer, normal(2, 5, 12)) != 0
    assert on[..., :4].all()
    assert not on[..., 4:].any()
    p = torch.tensor([0.2, 0.3, 0.3, 0.2])[None, None]
    assert highest(p, 3)[0, 0].tolist() == [True, True, True, False]


def test_query_norm_with_all_heads_on_is_attention() -> None:
    model, inputs = tiny_vit()
    before = model(**inputs)
    handle = swap(model, "blocks.*.attn", "moh-query-norm", shared_heads=1, active_heads=3)
    assert {"q", "k", "v", "out"} <= set(handle.carried["blocks.0.attn"])
    torch.testing.assert_close(model(**inputs), before, rtol=0, atol=1e-5)


def test_straight_through() -> None:
    """A gate is 1 and its gradient that of its share; heads that are off get none through it."""
    layer, x = build(QueryNormMixture), normal(1, 3, 12)
    q = layer.project(x, x)[0].detach().requires_grad_()
    gates, p = layer.gates(x, q), layer.route(x, q)
    cotangent = normal(1, 3, 3)
    through = torch.autograd.grad(gates[..., 1:], q, cotangent, retain_graph=True)[0]
    expected = torch.autograd.grad(p, q, cotangent * highest(p, 2))[0]
    torch.testing.assert_close(through, expected, rtol=0, atol=1e-12)
    assert through.abs().max() > 0
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_query_norm_routes_before_rotary_positions() -> None:
    """Only the first channels turn, so norms after a turn with a factor would differ."""
    layer = build(QueryNormMixture, head_dim=4)
    x = normal(1, 6, 12)
    plain = gates_of(layer, x)
    layer.rotary = Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64), 0.0)
    v = layer.project(x, x)[2].mean(2, keepdim=True).expand(-1, -1, 6, -1)
    torch.testing.assert_close(layer(x), layer.merge(plain.mT[..., None] * v), rtol=0, atol=1e-12)


def test_equal_query_norms() -> None:
    """Without queries norms do not differ: no division by zero, in values nor in gradients."""
    layer = build(QueryNormMixture)
    for p in layer.q.parameters():
        p.data.zero_()
    x = normal(1, 3, 12).requires_grad_()
    layer(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(layer.route(x), torch.full((1, 3, 3), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_balance_by_hand() -> None:
    layer = build(MixtureOfHeadAttention, dim=3, num_heads=3, shared_heads=0, active_heads=1)
    layer.router.weight.data = 20 * torch.eye(3, dtype=torch.float64)
    one_each = torch.eye(3, dtype=torch.float64)[None]
    assert layer.balance_loss(one_each).item() == pytest.approx(1.0)
    assert layer.balance_loss(one_each[:, :1].expand(-1, 3, -1)).item() == pytest.approx(3.0, abs=1e-6)
    nn.init.zeros_(layer.router.weight)
    assert layer.balance_loss(one_each).item() == pytest.approx(1.0)
    two = build(MixtureOfHeadAttention, shared_heads=0, active_heads=2)
    nn.init.zeros_(two.router.weight)
    assert two.balance_loss(normal(2, 5, 12)).item() == pytest.approx(2.0)


@both
def test_balance_leaves_padding_out(form: type) -> None:
    layer, x = build(form), normal(2, 7, 12)
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[4], [7]])
    p = layer.route(x)
    wanted, picked = p[mask].mean(0), highest(p, 2)[mask].double().mean(0)
    torch.testing.assert_close(layer.balance_loss(x, mask), 3 * (wanted * picked).sum(), rtol=0, atol=1e-12)
    assert layer.balance_loss(x, mask) != layer.balance_loss(x)
    assert layer.balance_loss(x, torch.zeros(2, 7, dtype=torch.bool)) == 0
    assert build(form, shared_heads=4, active_heads=0).balance_loss(x) == 0


def test_balance_teaches_the_router_alone() -> None:
    layer = build(MixtureOfHeadAttention, shared_heads=2)
    layer.balance_loss(normal(2, 7, 12)).backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["router.weight"]
    assert layer.router.weight.grad.abs().max() > 0


@both
def test_losses_of_a_model(form: type) -> None:
    model = nn.Sequential(build(form), nn.Linear(12, 12).double(), build(form))
    x = normal(2, 5, 12)
    with balance_losses(model) as losses:
        y = model(x)
    assert len(losses) == 2
    assert losses[0] == model[0].balance_loss(x)
    assert losses[1] == model[2].balance_loss(model[1](model[0](x)))
    sum(losses).backward()
    assert torch.equal(model(x), y)
    assert len(losses) == 2
    mask = torch.arange(5).expand(2, -1) < 3
    with balance_losses(model[0]) as losses:
        model[0](x=x, mask=mask)
    assert losses[0] == model[0].balance_loss(x, mask)


@both
@pytest.mark.parametrize("options", [{}, {"causal": True, "num_kv_heads": 2}, {"shared_heads": 0}], ids=str)
def test_skipped_rows_change_nothing(form: type, options: dict) -> None:
    layer, x = build(form, **options), normal(2, 9, 12)
    layer.rotary = Rotary(torch.ones(1, dtype=torch.float64))
    mask = torch.rand(2, 9, 9) > 0.3
    mask[0, 2] = False
    for given in (None, mask, mask.any(1)):
        out = active_only(layer, x, mask=given)
        torch.testing.assert_close(out, layer(x, mask=given), rtol=0, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (active_only(layer, x), layer(x))
    )
    for mine, whole in zip(ours, theirs):
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("shared", "active"), [(2, 4), (1, 3), (0, 2), (8, 0)])
def test_skipped_rows_cost_nothing(shared: int, active: int) -> None:
    class Skipping(MixtureOfHeadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return active_only(self, x)

    options = {"shared_heads": shared, "active_heads": active}
    every, some = MixtureOfHeadAttention(32, 8, **options), Skipping(32, 8, **options)
    some.load_state_dict(every.state_dict())
    x = torch.randn(2, 64, 32)
    rest = 2 * 2 * 64 * sum(p.numel() for name, p in every.named_parameters() if not name.endswith("bias"))
    share = (flops(some, x).total - rest) / (flops(every, x).total - rest)
    assert flops(every, x).total - rest == 2 * 2 * 2 * 64 * 64 * 32
    assert share == pytest.approx((shared + active) / 8, rel=0.05)


@both
def test_decoding_equals_the_whole(form: type) -> None:
    """Heads that are off for a token still keep its key and value."""
    layer = build(form, causal=True, num_kv_heads=2)
    x = normal(2, 11, 12)
    for chunks in ([1] * 11, [4, 1, 1, 5]):
        cache = layer.new_cache(2, 11, dtype=torch.float64)
        got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-12)


@both
def test_one_token_one_routed_head_and_nothing_to_look_at(form: type) -> None:
    single = build(form, num_heads=2, shared_heads=1, active_heads=1)
    x = normal(2, 3, 12).requires_grad_()
    assert (gates_of(single, x) != 0).all()
    out = single(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], single.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
    assert single(x[:1, :1]).isfinite().all()


@both
def test_routers_in_single_precision(form: type) -> None:
    """In float16 logits up to thousands are told apart by a softmax that is not."""
    exact, half = build(form, torch.float32), build(form, torch.float16)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float16)
    assert half.route(x).dtype == torch.float32
    out = half(x)
    assert out.dtype == torch.float16
    agree = ((gates_of(half, x) != 0) == (gates_of(exact, x.float()) != 0)).all(-1)
    assert agree.float().mean() > 0.9
    torch.testing.assert_close(out.float()[agree], exact(x.float())[agree], rtol=0, atol=0.01)


def test_names_and_what_is_learned() -> None:
    assert type(create("moh", dim=32, num_heads=8)) is MixtureOfHeadAttention
    assert type(create("moh-query-norm", dim=32, num_heads=8)) is QueryNormMixture
    plain = set(Attention(32, 8).state_dict())
    routers = {
        mix: set(build(MixtureOfHeadAttention, shared_heads=mix[0], active_heads=mix[1]).state_dict()) - plain
        for mix in MIXES
    }
    assert routers[1, 2] == {"router.weight", "balance.weight"}
    assert routers[2, 1] == {"router.weight", "share.weight", "balance.weight"}
    assert routers[0, 3] == {"router.weight"}
    assert routers[4, 0] == {"share.weight"}
    assert set(QueryNormMixture(32, 8).state_dict()) == plain


@both
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shared_heads": 2, "active_heads": 3}, "active_heads=3"),
        ({"shared_heads": 0, "active_heads": 5}, "active_heads=5"),
        ({"shared_heads": 0, "active_heads": 0}, "shared_heads=0"),
        ({"shared_heads": -1}, "shared_heads=-1"),
        ({"shared_heads": 3, "active_heads": 0}, "active_heads=0"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
    ],
)
def test_bad_arguments(form: type, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(form, **options)


@both
def test_bad_input(form: type) -> None:
    layer, x = build(form, causal=True), normal(2, 3, 12)
    with pytest.raises(ValueError, match="causal layer"):
        layer(x, x.clone())
    with pytest.raises(ValueError, match="boolean"):
        layer(x, mask=torch.zeros(2, 3))
    two = build(MixtureOfHeadAttention, shared_heads=2)
    with pytest.raises(RuntimeError, match=r"share\.weight"):
        build(MixtureOfHeadAttention, shared_heads=1, active_heads=1).load_state_dict(two.state_dict())
