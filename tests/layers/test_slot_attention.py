"""Slot attention against loops, its symmetries, what it does with masks, and its edges."""

import pytest
import torch
from torch import Tensor

from regard.layers.vision.slot_attention import ImplicitSlotAttention, SlotAttention, naive


def made(**arguments) -> SlotAttention:
    layer = SlotAttention(**{"dim": 6, "slot_dim": 8, "num_slots": 4, "iterations": 2} | arguments).double()
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return layer


def inputs(b: int = 2, n: int = 9, c: int = 6) -> Tensor:
    return torch.randn(b, n, c, dtype=torch.float64)


@pytest.mark.parametrize("arguments", [{}, {"num_heads": 2}, {"iterations": 0}, {"num_slots": 1}, {"eps": 0.1}])
def test_equals_loops(arguments: dict) -> None:
    layer = made(**arguments)
    x = inputs().requires_grad_()
    mask = torch.rand(2, 9) > 0.4
    mask[1] = False
    for options in ({}, {"mask": mask}):
        found = []
        for function in (layer, lambda x, **o: naive(layer, x, **o)):
            torch.manual_seed(3)
            out = function(x, **options)
            weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
            leaves = [x, *layer.parameters()]
            found.append([out, *torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)])
        for got, want in zip(*found, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-9)


def test_one_round_by_hand() -> None:
    layer = SlotAttention(2, num_slots=2, iterations=1, eps=0.0).double()
    for norm in (layer.norm_inputs, layer.norm_slots):
        norm.weight.data.fill_(1.0)
    for projection in (layer.q, layer.k, layer.v):
        projection.weight.data = torch.eye(2, dtype=torch.float64)
    slots = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
    x = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    _, weights = layer.trace(x, slots=slots)
    # Normalised, both slots and both inputs are (1, -1) or (-1, 1): the scores are +-2 / sqrt(2).
    high = torch.sigmoid(torch.tensor(4 / 2**0.5, dtype=torch.float64))
    want = torch.stack([torch.stack([high, 1 - high]), torch.stack([1 - high, high])])
    torch.testing.assert_close(weights[0, 0], want, atol=1e-5, rtol=1e-5)


def test_symmetries() -> None:
    layer, x = made(num_heads=2), inputs()
    slots = layer.sample(2).detach()
    out, weights = layer.trace(x, slots=slots)
    shuffled, turned = torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(layer(x[:, shuffled], slots=slots), out)
    torch.testing.assert_close(layer(x, slots=slots[:, turned]), out[:, turned])
    torch.testing.assert_close(weights.sum(-2), torch.ones(2, 2, 9, dtype=torch.float64))
    torch.testing.assert_close(layer(torch.cat([x, x], 1), slots=slots), out)
    assert torch.equal(layer(x, slots=slots), out)


def test_masked_inputs_have_no_influence() -> None:
    layer, x = made(), inputs().requires_grad_()
    slots = layer.sample(2).detach()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 2:5] = False
    out, weights = layer.trace(x, slots=slots, mask=mask)
    torch.testing.assert_close(out[:1], layer(torch.cat([x[:1, :2], x[:1, 5:]], 1), slots=slots[:1]))
    assert not weights[0, :, :, 2:5].any()
    assert not torch.autograd.grad(out.square().sum(), x)[0][0, 2:5].any()


def test_a_sample_that_sees_nothing_is_finite_and_reads_nothing() -> None:
    layer, x = made(), inputs().requires_grad_()
    slots = layer.sample(2).detach()
    mask = torch.tensor([[False] * 9, [True] * 9])
    out = layer(x, slots=slots, mask=mask)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all()
    assert not grad[0].any()
    assert grad[1].any()
    torch.testing.assert_close(out[1], layer(x, slots=slots)[1])


def test_number_of_slots_and_rounds_is_free_at_test() -> None:
    layer, x = made(), inputs(b=1)
    assert layer(x, slots=layer.sample(1, 11)).shape == (1, 11, 8)
    start = layer.sample(1)
    layer.iterations = 0
    assert torch.equal(layer(x, slots=start), start)
    layer.iterations = 5
    five = layer(x, slots=start)
    layer.iterations = 1
    slots = start
    for _ in range(5):
        slots = layer(x, slots=slots)
    torch.testing.assert_close(five, slots)


def test_sampling() -> None:
    layer = SlotAttention(4)
    seeded = [layer.sample(3, 5, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(layer.sample(3, 5), seeded[0])
    many = layer.sample(200, 200).detach()
    torch.testing.assert_close(many.mean((0, 1)), layer.mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(many.std((0, 1)), layer.log_deviation[0].exp(), atol=0.05, rtol=0.02)
    torch.testing.assert_close(
        layer.double().sample(3, 5, torch.Generator().manual_seed(1)), seeded[0].double(), atol=1e-6, rtol=1e-6
    )


def test_one_slot_reads_the_mean() -> None:
    layer, x = made(num_slots=1, iterations=1), inputs()
    slots = layer.sample(2)
    mean = layer.v(layer.norm_inputs(x)).mean(1)
    new = layer.gru(mean, slots[:, 0])
    torch.testing.assert_close(layer(x, slots=slots)[:, 0], new + layer.mlp(layer.norm_mlp(new)))


def test_half_precision_keeps_the_weighted_mean() -> None:
    layer = SlotAttention(16).bfloat16()
    x = torch.randn(1, 300, 16).bfloat16()
    slots = layer.sample(1)
    out, weights = layer.trace(x, slots=slots)
    assert weights.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    exact = layer.float()(x.float(), slots=slots.float())
    assert (out.float() - exact).abs().max() < 0.15


def test_parameter_count_is_the_papers() -> None:
    d, hidden = 64, 128
    count = 3 * 2 * d + 3 * d * d + 2 * d + 6 * d * d + 6 * d + 2 * d * hidden + hidden + d
    assert sum(p.numel() for p in SlotAttention(d).parameters()) == count


def test_implicit_gradient_is_that_of_the_last_round() -> None:
    plain, x = made(iterations=3), inputs()
    implicit = ImplicitSlotAttention(6, slot_dim=8, num_slots=4, iterations=3).double()
    implicit.load_state_dict(plain.state_dict())
    slots = plain.sample(2).detach()
    out = implicit(x, slots=slots)
    torch.testing.assert_close(out, plain(x, slots=slots))
    found = torch.autograd.grad(out.square().sum(), list(implicit.parameters()), allow_unused=True)
    plain.iterations = 2
    before = plain(x, slots=slots).detach()
    plain.iterations = 1
    wanted = torch.autograd.grad(plain(x, slots=before).square().sum(), list(plain.parameters()), allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


def saved_bytes(layer: SlotAttention, x: Tensor) -> int:
    sizes: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or keep(t), lambda t: t):
        layer(x)
    return sum(sizes.values())


def test_implicit_backward_holds_one_round() -> None:
    x = inputs(n=400)
    many = {kind: saved_bytes(kind(6, iterations=8).double(), x) for kind in (SlotAttention, ImplicitSlotAttention)}
    one = saved_bytes(SlotAttention(6, iterations=1).double(), x)
    assert many[ImplicitSlotAttention] < 1.1 * one < many[SlotAttention] / 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 6, "num_heads": 4}, "num_heads=4"),
        ({"dim": 4, "num_slots": 0}, "num_slots=0"),
        ({"dim": 4, "iterations": -1}, "iterations=-1"),
        ({"dim": 4, "eps": -1.0}, "eps=-1.0"),
        ({"dim": 4, "mlp_ratio": 0}, "mlp_ratio=0"),
    ],
)
def test_refuses_bad_arguments(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SlotAttention(**arguments)


def test_refuses_bad_inputs() -> None:
    layer, x = SlotAttention(4), torch.randn(2, 3, 4)
    for bad, options, word in (
        (torch.randn(2, 0, 4), {}, "n at least 1"),
        (torch.randn(2, 3, 5), {}, r"x must be \(b, n, 4\)"),
        (x, {"slots": torch.randn(2, 3, 5)}, r"slots must be \(2, k, 4\)"),
        (x, {"slots": torch.randn(2, 0, 4)}, "k at least 1"),
        (x, {"mask": torch.ones(2, 3)}, "mask must be boolean"),
        (x, {"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must be boolean"),
    ):
        with pytest.raises(ValueError, match=word):
            layer(bad, **options)
    with pytest.raises(ValueError, match="num_slots=0"):
        layer.sample(2, 0)
