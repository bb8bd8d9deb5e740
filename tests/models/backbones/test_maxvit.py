"""MaxViT: sizes, and the same outputs as timm with the same weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from regard.models.backbones import maxvit

SMALL = {"dim": (16, 32), "head_dim": 8, "window_size": 2, "depths": (2, 1), "stem": 8, "num_classes": 5}


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (maxvit.maxvit_tiny, 30_916_528),
        (maxvit.maxvit_small, 68_927_956),
        (maxvit.maxvit_base, 119_467_708),
        (maxvit.maxvit_large, 211_785_560),
    ],
)
def test_parameter_counts_are_those_published(build, parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_names_and_shapes_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm")
    for size in ("tiny", "small", "base", "large"):
        with torch.device("meta"):
            theirs = timm.create_model(f"maxvit_{size}_tf_224").state_dict()
            ours = getattr(maxvit, f"maxvit_{size}")().state_dict()
        shapes = {name: value.shape for name, value in maxvit.timm_names(theirs).items()}
        assert shapes == {name: value.shape for name, value in ours.items()}


def test_equals_timm() -> None:
    """Logits and the map of every level, on two narrow levels."""
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    sizes = {
        "embed_dim": (32, 64),
        "depths": (2, 1),
        "block_type": ("M", "M"),
        "stem_width": 16,
        "head_hidden_size": 64,
    }
    config = dataclasses.replace(maxxvit.model_cfgs["maxvit_tiny_tf"], **sizes)
    theirs = maxxvit.MaxxVit(config, img_size=128, num_classes=10).double().eval()
    for value in theirs.parameters():
        torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 0.5, 0.05 if value.ndim > 1 else 0.1)
    for name, value in theirs.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            value.normal_()
    ours = maxvit.MaxViT((32, 64), 32, 4, depths=(2, 1), stem=16, num_classes=10).double().eval()
    ours.load_state_dict(maxvit.timm_names(theirs.state_dict()))
    image = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-9)
        maps = theirs.forward_intermediates(image, intermediates_only=True)[-2:]
        for got, expected in zip(ours.features(image), maps, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("stride", "dim"), [(2, 6), (2, 8), (1, 8)])
def test_mbconv(stride: int, dim: int) -> None:
    layer = maxvit.MBConv(dim, 8, stride).double().eval()
    x = torch.randn(2, dim, 6, 4, dtype=torch.float64)
    shortcut = x if stride == 1 else layer.shortcut.expand(x.unflatten(3, (2, 2)).unflatten(2, (3, 2)).mean((3, 5)))
    y = F.gelu(layer.norm1(layer.conv1_1x1(layer.pre_norm(x))), approximate="tanh")
    y = F.pad(y, (1, 1, 1, 1)) if stride == 1 else F.pad(y, (0, 1, 0, 1))
    y = F.conv2d(y, layer.conv2_kxk.weight, stride=stride, groups=32)
    y = F.gelu(layer.norm2(y), approximate="tanh")
    gate = torch.sigmoid(layer.se.fc2(F.silu(layer.se.fc1(y.mean((2, 3), keepdim=True)))))
    assert layer.se.fc1.out_channels == 2
    torch.testing.assert_close(layer(x), shortcut + layer.conv3_1x1(y * gate), rtol=0, atol=1e-12)


def test_features_and_other_sizes() -> None:
    model = maxvit.maxvit_tiny(**SMALL).eval()
    maps = model.features(torch.randn(2, 3, 40, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 10, 16), (32, 5, 8)]
    before = model(torch.ones(1, 3, 32, 32))
    model.resize(4)
    assert {block.attn_grid.attn.window_size for stage in model.stages for block in stage.blocks} == {4}
    assert model(torch.randn(1, 3, 64, 64)).shape == before.shape


def test_every_parameter_learns() -> None:
    model = maxvit.maxvit_small(**SMALL)
    F.cross_entropy(model(torch.randn(4, 3, 32, 48)), torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def attention_flops(side: int) -> int:
    """Of the products of queries with keys and of weights with values, in every block at once."""
    return sum(
        2 * depth * 2 * (side // stride) ** 2 * 49 * dim
        for stride, dim, depth in zip((4, 8, 16, 32), (64, 128, 256, 512), (1, 1, 1, 1))
    )


def test_attention_is_linear_in_pixels() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def counted(side: int) -> int:
        with torch.device("meta"):
            model, image = maxvit.maxvit_tiny(depths=(1, 1, 1, 1)), torch.randn(1, 3, side, side)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(image)
        return counter.get_flop_counts()["Global"][torch.ops.aten.bmm]

    assert counted(224) == 2 * attention_flops(224)
    assert counted(448) == 4 * counted(224)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: maxvit.MaxViT(depths=(1, 1)), "depths="),
        (lambda: maxvit.MaxViT(head_dim=48), "head_dim=48"),
        (lambda: maxvit.maxvit_tiny(**SMALL)(torch.zeros(1, 3, 36, 32)), "multiples of 8"),
        (lambda: maxvit.maxvit_tiny(**SMALL)(torch.zeros(1, 1, 32, 32)), r"image must be \(b, 3, H, W\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
