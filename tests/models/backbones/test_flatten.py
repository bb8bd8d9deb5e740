"""FLatten-Swin and FLatten-PVT: sizes, and the host's own windows against timm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layers.vision.flatten import FocusedLinearAttention
from regard.models.backbones import flatten

SMALL = {"num_heads": (1, 1, 2, 2), "depths": (1, 1, 2, 1), "image_size": (32, 64), "num_classes": 5}
SWIN = {"dim": 16, "window_size": 2, **SMALL}
PVT = {"dim": (8, 16, 16, 32), **SMALL}


def parameters(build) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (flatten.flatten_swin_tiny, 29_192_384),
        (flatten.flatten_swin_small, 50_510_288),
        (flatten.flatten_swin_base, 88_972_488),
    ],
)
def test_parameter_counts_of_swin_are_those_published(build, count: int) -> None:
    assert parameters(build) == count


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (flatten.flatten_pvt_tiny, 12.15),
        (flatten.flatten_pvt_small, 21.67),
        (flatten.flatten_pvt_medium, 37.24),
        (flatten.flatten_pvt_large, 50.65),
    ],
)
def test_parameter_counts_of_pvt_are_those_published(build, millions: float) -> None:
    assert round(parameters(build) / 1e6, 2) == millions


def test_linear_attention_is_where_it_should_be() -> None:
    with torch.device("meta"):
        swin, pvt = flatten.flatten_swin_tiny(), flatten.flatten_pvt_tiny()
    linear = [isinstance(level.blocks[0].attn, FocusedLinearAttention) for level in swin.layers]
    assert linear == [True, True, False, False]
    assert [level.blocks[0].attn.size for level in swin.layers[:2]] == [(56, 56), (28, 28)]
    assert [block.attn.shift for block in swin.layers[2].blocks] == [0, 3] * 3
    assert [blocks[0].attn.size for blocks in pvt.blocks] == [(56, 56), (28, 28), (14, 14), (7, 7)]


@pytest.mark.parametrize(("size", "moved"), [((8, 12), 2), ((8, 12), 0), ((4, 4), 2)])
def test_shifted_windows_are_those_of_timm(size: tuple[int, int], moved: int) -> None:
    swin = pytest.importorskip("timm.models.swin_transformer")
    theirs = swin.SwinTransformerBlock(12, size, num_heads=3, window_size=4, shift_size=moved).double()
    ours = flatten.ShiftedWindowAttention(12, 3, 4, moved).double()
    torch.nn.init.normal_(theirs.attn.relative_position_bias_table)
    state = {
        f"attn.{name}": value for name, value in theirs.attn.state_dict().items() if name.startswith(("qkv", "proj"))
    }
    table = theirs.attn.relative_position_bias_table.detach().T.unflatten(1, (7, 7))
    ours.load_state_dict(state | {"attn.table": table.flip(1, 2)})
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x.flatten(1, 2), grid=size).view_as(x), theirs._attn(x), rtol=0, atol=1e-10)


def test_padded_windows_do_not_look_at_padding() -> None:
    layer = flatten.ShiftedWindowAttention(12, 3, 4, 2).double()
    x = torch.randn(1, 30, 12, dtype=torch.float64, requires_grad=True)
    keys = torch.autograd.functional.jacobian(lambda y: layer(y, grid=(5, 6)).sum(-1)[0], x.detach())
    y, column = torch.arange(30) // 6, torch.arange(30) % 6
    part = torch.stack([(y + 2) // 4, (column + 2) // 4], -1)
    assert torch.equal(keys[:, 0].abs().amax(-1) > 0, (part[:, None] == part).all(-1))


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (lambda: flatten.flatten_swin_tiny(**SWIN), (16, 32, 64, 128)),
        (lambda: flatten.flatten_pvt_tiny(**PVT), (8, 16, 16, 32)),
    ],
)
def test_features_are_maps_at_four_strides(model, widths: tuple[int, ...]) -> None:
    maps = model().eval().features(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == list(zip(widths, (16, 8, 4, 2), (24, 12, 6, 3)))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lambda: flatten.flatten_swin_tiny(**SWIN, drop_path=0.0), (68, 76)),
        (lambda: flatten.flatten_pvt_tiny(**PVT, drop_path=0.0), (32, 64)),
    ],
)
def test_every_parameter_learns(model, size: tuple[int, int]) -> None:
    model = model()
    F.cross_entropy(model(torch.randn(4, 3, *size)), torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_heads_average_the_last_map() -> None:
    image: Tensor = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    swin, pvt = flatten.flatten_swin_tiny(**SWIN).double().eval(), flatten.flatten_pvt_tiny(**PVT).double().eval()
    last = swin.features(image)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(swin(image), swin.head(swin.norm(last).mean(1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(pvt(image), pvt.head(pvt.features(image)[-1].mean((2, 3))), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: flatten.FLattenSwin(depths=(1, 1)), "depths="),
        (lambda: flatten.FLattenSwin(linear_levels=5), "linear_levels=5"),
        (lambda: flatten.FLattenPVT(mlp_ratio=(4,)), "mlp_ratio="),
        (lambda: flatten.ShiftedWindowAttention(12, 3, 4, 4), "shift=4"),
        (lambda: flatten.flatten_pvt_tiny(**PVT)(torch.zeros(1, 1, 32, 64)), r"image must be \(b, 3, H, W\)"),
    ],
)
def test_bad_input_is_named(call, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()
