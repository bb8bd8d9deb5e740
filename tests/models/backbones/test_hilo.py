"""LITv2: sizes, names, and its deformable merging of tokens."""

import pytest
import torch
import torch.nn.functional as F

from regard.models.backbones import hilo

SMALL = {"dim": 16, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 5}


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(hilo.litv2_small, 27_844_000), (hilo.litv2_medium, 48_830_368), (hilo.litv2_base, 86_520_704)],
)
def test_parameter_counts_are_those_published(build, parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_heads_and_windows_of_the_levels() -> None:
    with torch.device("meta"):
        model = hilo.litv2_small()
    assert not any(hasattr(block, "attn") for level in model.layers[:2] for block in level.blocks)
    third, fourth = (model.layers[i].blocks[0].attn for i in (2, 3))
    assert (third.hi_heads, third.lo_heads, third.window_size) == (2, 10, 2)
    assert (fourth.hi_heads, fourth.lo_heads, fourth.window_size) == (0, 24, 1)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (2, 2), (4, 3)])
def test_deformable_convolution_is_that_of_torchvision(size: tuple[int, int]) -> None:
    ops = pytest.importorskip("torchvision.ops")
    layer = hilo.DeformableConvolution(3, 5).double()
    for p in layer.conv_offset.parameters():
        torch.nn.init.normal_(p, std=2.0)  # far enough to leave the map
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    expected = ops.deform_conv2d(x, layer.conv_offset(x), layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    leaves, pull = (x, *layer.parameters()), torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(expected, leaves, pull)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_merging_begins_as_an_ordinary_convolution() -> None:
    layer, x = hilo.DeformableConvolution(3, 5).double(), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, stride=2), rtol=0, atol=1e-12)


def test_features_are_maps_at_four_strides_and_the_head_reads_the_last() -> None:
    model = hilo.litv2_small(**SMALL).double().eval()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = model.features(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    pooled = model.norm(maps[-1].flatten(2).transpose(1, 2)).mean(1)
    torch.testing.assert_close(model(image), model.head(pooled), rtol=0, atol=1e-12)


def test_every_parameter_learns_at_odd_sizes() -> None:
    model = hilo.litv2_medium(**SMALL, drop_path=0.0, alpha=0.5)
    F.cross_entropy(model(torch.randn(4, 3, 76, 100)), torch.tensor([0, 1, 2, 3])).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_only_the_convolutions_of_the_mlp_know_places() -> None:
    mlp = hilo.ConvolutionalMLP(6, 12).double()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    image = torch.einsum("oc,bhwc->bohw", mlp.fc1.weight, x) + mlp.fc1.bias[:, None, None]
    mixed = F.conv2d(image, mlp.dwconv.weight, mlp.dwconv.bias, padding=1, groups=12)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mixed.permute(0, 2, 3, 1))), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: hilo.LITv2(window_size=(2, 1)), "window_size="),
        (lambda: hilo.LITv2(alpha=2.0), "alpha=2.0"),
        (lambda: hilo.litv2_small(**SMALL)(torch.zeros(1, 1, 32, 32)), r"image must be \(b, 3, H, W\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
