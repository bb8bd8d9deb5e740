"""Triplet attention against rotated maps, in ResNet-50, and at its edges."""

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.layers.cnn.triplet_attention import TripletAttention, naive


def stirred(layer: torch.nn.Module) -> torch.nn.Module:
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) / 3
    return layer


def grads(layer: torch.nn.Module, x: Tensor, function) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


def test_equals_rotated_maps() -> None:
    layer = stirred(TripletAttention(5).double()).eval()
    x = torch.randn(2, 6, 4, 7, dtype=torch.float64)
    for got, want in zip(grads(layer, x, layer), grads(layer, x, lambda x: naive(layer, x)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_training_statistics_are_those_of_rotated_maps() -> None:
    layer = TripletAttention().double()
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64)
    want = torch.zeros_like(x)
    for gate, order in ((layer.cw, (0, 2, 1, 3)), (layer.hc, (0, 3, 2, 1)), (layer.hw, (0, 1, 2, 3))):
        turned = x.permute(order).contiguous()
        z = gate.conv(torch.stack([turned.max(1).values, turned.mean(1)], 1))
        z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()
        want += (turned * z.sigmoid()).permute(order) / 3
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_parameter_count(kernel_size: int) -> None:
    count = sum(p.numel() for p in TripletAttention(kernel_size).parameters())
    assert count == 6 * kernel_size**2 + 6
    assert kernel_size != 7 or count == 300


def test_resnet50_has_the_papers_parameters_and_flops() -> None:
    flops, counts = [], []
    for extra in ({}, {"block_args": {"attn_layer": lambda *_, **__: TripletAttention()}}):
        with torch.device("meta"):
            model, x = timm.create_model("resnet50", **extra).eval(), torch.empty(1, 3, 224, 224)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x)
        flops.append(counter.get_total_flops())
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[1] == counts[0] + 16 * 300 == 25_561_832
    assert 1 < flops[1] / flops[0] < 1.015


def test_transposed_input_swaps_the_roles_of_two_gates() -> None:
    layer, twin = stirred(TripletAttention(3).double()).eval(), TripletAttention(3).double().eval()
    # The column gate slides over (channel, column); the row gate over (row, channel): each kernel is turned.
    twin.cw.load_state_dict(layer.hc.state_dict())
    twin.hc.load_state_dict(layer.cw.state_dict())
    twin.hw.load_state_dict(layer.hw.state_dict())
    for gate in (twin.cw, twin.hc, twin.hw):
        gate.conv.weight.data = gate.conv.weight.data.transpose(2, 3).contiguous()
    x = torch.randn(2, 5, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(twin(x.transpose(2, 3)), layer(x).transpose(2, 3), atol=1e-13, rtol=1e-12)


def test_gates_are_factors_and_the_order_of_channels_counts() -> None:
    layer = stirred(TripletAttention(3).double()).eval()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    shapes = [(2, 6, 1, 5), (2, 6, 4, 1), (2, 1, 4, 5)]
    for gate, shape in zip(layer.gates(x), shapes, strict=True):
        assert gate.shape == shape
        assert ((gate > 0) & (gate < 1)).all()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order])


def test_edges_work() -> None:
    layer = TripletAttention().eval()
    for shape in ((1, 1, 1, 1), (1, 3, 1, 1), (2, 2, 5, 3)):
        x = torch.randn(shape)
        assert layer(x).shape == shape
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - layer.float()(x)).abs().max() < 0.05


def test_refuses() -> None:
    for kernel_size in (0, 4):
        with pytest.raises(ValueError, match=f"kernel_size={kernel_size}"):
            TripletAttention(kernel_size)
    with pytest.raises(ValueError, match="batch norm needs more than one number"):
        TripletAttention()(torch.randn(1, 1, 1, 3))
