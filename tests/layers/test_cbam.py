"""CBAM against loops and against timm, at full size in ResNets, and at its edges."""

import pytest
import timm
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.layers.cnn.cbam import CBAM, ChannelGate, SpatialGate, naive


def stirred(layer: torch.nn.Module) -> torch.nn.Module:
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) / 3
    return layer


def grads(layer: torch.nn.Module, x: Tensor, function) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
    leaves = [x, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("pools", [("avg", "max"), ("avg", "max", "lp", "lse"), ("lse",)])
def test_equals_loops(pools: tuple[str, ...]) -> None:
    layer = stirred(CBAM(9, reduction=4, kernel_size=5, pools=pools).double()).eval()
    x = torch.randn(2, 9, 4, 7, dtype=torch.float64)
    for got, want in zip(grads(layer, x, layer), grads(layer, x, lambda x: naive(layer, x)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_equals_timm() -> None:
    layer = stirred(CBAM(32)).eval()
    peer = CbamModule(32, rd_ratio=1 / 16, mlp_bias=True).eval()
    for ours, theirs in ((layer.channel.mlp[0], peer.channel.fc1), (layer.channel.mlp[2], peer.channel.fc2)):
        theirs.weight.data = ours.weight.data[:, :, None, None]
        theirs.bias.data = ours.bias.data
    peer.spatial.conv.conv.weight.data = layer.spatial.conv.weight.data.flip(1)
    peer.spatial.conv.bn.load_state_dict(layer.spatial.norm.state_dict())
    x = torch.randn(3, 32, 11, 6)
    assert (layer(x) - peer(x)).abs().max() < 1e-6
    peer.spatial.conv.conv.weight.data = layer.spatial.conv.weight.data
    assert (layer(x) - peer(x)).abs().max() > 1e-4, "the order of maximum and mean does not show"


@pytest.mark.parametrize(("dim", "reduction"), [(64, 16), (96, 16), (5, 16)])
def test_parameter_count(dim: int, reduction: int) -> None:
    hidden = max(1, dim // reduction)
    count = sum(p.numel() for p in CBAM(dim, reduction).parameters())
    assert count == 2 * dim * hidden + hidden + dim + 98 + 2


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet18", 11.78), ("resnet34", 21.96), ("resnet50", 28.09), ("resnet101", 49.33)]
)
def test_parameters_of_resnets_are_the_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, block_args={"attn_layer": lambda dim, **_: CBAM(dim)})
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions
    if name == "resnet50":
        assert count == 28_089_624


def test_under_one_percent_of_a_resnets_flops() -> None:
    flops = []
    for extra in ({}, {"block_args": {"attn_layer": lambda dim, **_: CBAM(dim)}}):
        with torch.device("meta"):
            model, x = timm.create_model("resnet50", **extra).eval(), torch.empty(1, 3, 224, 224)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x)
        flops.append(counter.get_total_flops())
    assert flops[0] < flops[1] < 1.01 * flops[0]


def test_channel_gate_ignores_where_and_spatial_gate_ignores_which() -> None:
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    channel, spatial = stirred(ChannelGate(8, 2).double()), stirred(SpatialGate().double()).eval()
    shuffled = x.flatten(2)[..., torch.randperm(15)].view_as(x)
    torch.testing.assert_close(channel.gate(shuffled), channel.gate(x))
    torch.testing.assert_close(spatial.gate(x[:, torch.randperm(8)]), spatial.gate(x))
    assert not torch.allclose(spatial.gate(shuffled), spatial.gate(x))
    for gate in (channel.gate(x), spatial.gate(x)):
        assert ((gate > 0) & (gate < 1)).all()


def test_starts_at_half_of_the_channel_gate() -> None:
    layer = CBAM(16).double()
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    assert torch.equal(layer(x), 0.5 * layer.channel(x))
    layer(x).square().sum().backward()
    assert layer.spatial.norm.weight.grad.abs() > 0, "the spatial gate could never leave one half"


def test_pools_are_summed_before_the_sigmoid() -> None:
    layer = ChannelGate(4, 1).double()
    for p in layer.parameters():
        p.data.fill_(0.25)
    x = torch.full((1, 4, 1, 1), 2.0, dtype=torch.float64)
    one = 0.25 * 4 * (0.25 * 4 * 2.0 + 0.25) + 0.25
    torch.testing.assert_close(layer.gate(x), torch.full((1, 4), 2 * one, dtype=torch.float64).sigmoid())


def test_edges_work() -> None:
    layer = CBAM(4)
    assert layer.channel.mlp[0].out_features == 1
    layer.eval()
    assert layer(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)
    x = torch.randn(2, 4, 7, 3)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - layer.float()(x)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 4, "reduction": 0}, "reduction=0"),
        ({"dim": 4, "kernel_size": 4}, "kernel_size=4"),
        ({"dim": 4, "pools": ()}, "pools"),
        ({"dim": 4, "pools": ("avg", "median")}, "median"),
    ],
)
def test_refuses_bad_arguments(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        CBAM(**arguments)


def test_refuses_bad_maps() -> None:
    layer = CBAM(4)
    with pytest.raises(ValueError, match=r"x must be \(b, 4, H, W\)"):
        layer(torch.randn(1, 5, 3, 3))
    with pytest.raises(ValueError, match="batch norm needs more than one number"):
        layer(torch.randn(1, 4, 1, 1))
