"""Sites of timm's models: kinds, heads, tokens; weights and their gradients beside those of the eager code."""

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.core.call import OpaqueSite

timm = pytest.importorskip("timm")
from timm.models.coat import CoaT  # noqa: E402
from timm.models.convit import ConVit  # noqa: E402
from timm.models.davit import DaVit  # noqa: E402
from timm.models.levit import Levit  # noqa: E402
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg  # noqa: E402
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg  # noqa: E402
from timm.models.nest import Nest  # noqa: E402
from timm.models.resnest import ResNestBottleneck, ResNet  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.twins import Twins  # noqa: E402
from timm.models.xcit import Xcit  # noqa: E402


def vit(name: str = "vit_tiny_patch16_224", **more) -> nn.Module:
    return timm.create_model(name, **{"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5, **more})


def _swin(kind: type = SwinTransformer, **more) -> nn.Module:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    return kind(**{**sizes, **more})


def _mvit(cls: bool) -> nn.Module:
    cfg = MultiScaleVitCfg(depths=(1, 2), embed_dim=(16, 32), num_heads=(1, 2), use_cls_token=cls)
    return MultiScaleVit(cfg, img_size=(64, 64), num_classes=5)


def _maxvit() -> nn.Module:
    cfg = MaxxVitCfg(
        embed_dim=(16, 32),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=8,
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
    )
    return MaxxVit(cfg, img_size=64, num_classes=5)


def _twins() -> nn.Module:
    sizes = {"embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4), "depths": (2, 2, 2, 2), "wss": (4, 4, 4, 4)}
    return Twins(img_size=64, num_classes=5, **sizes)


def _levit() -> nn.Module:
    return Levit(img_size=64, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(2, 3), num_classes=5)


def _davit() -> nn.Module:
    return DaVit(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4, num_classes=5)


def _xcit(**more) -> nn.Module:
    return Xcit(**{"img_size": 64, "embed_dim": 64, "depth": 1, "num_heads": 4, "num_classes": 5, **more})


# build, size of the image, and for the sites in order: (kind, heads, head_dim, query tokens, key tokens).
PATCHES, CLS = "image[4,4]", "cls + image[4,4]"
REGISTERS = "cls + register[4] + image[4,4]"
WINDOW = "window[4,4]"
MODELS = {
    "vit": (vit, (64, 64), [("self", 3, 8, CLS, CLS)] * 2),
    "vit with registers": (lambda: vit(reg_tokens=4), (64, 64), [("self", 3, 8, REGISTERS, REGISTERS)] * 2),
    "vit without cls, not square": (
        lambda: vit(img_size=(64, 96), class_token=False, global_pool="avg"),
        (64, 96),
        [("self", 3, 8, "image[4,6]", "image[4,6]")] * 2,
    ),
    "vit with attention pooling": (
        lambda: vit(class_token=False, global_pool="map"),
        (64, 64),
        [("self", 3, 8, PATCHES, PATCHES)] * 2 + [("pool", 3, 8, 1, PATCHES)],
    ),
    "eva02": (lambda: vit("eva02_tiny_patch14_224", img_size=56), (56, 56), [("self", 3, 8, CLS, CLS)] * 2),
    "beit": (lambda: vit("beit_base_patch16_224"), (64, 64), [("self", 3, 8, CLS, CLS)] * 2),
    "swin": (_swin, (32, 32), [("self", 2, 8, WINDOW, WINDOW)] * 2 + [("self", 4, 8, WINDOW, WINDOW)] * 2),
    # The patch grid has as many tokens as a window, but another shape.
    "swin, windows as large as the image": (
        lambda: _swin(img_size=(8, 32), depths=(2,), num_heads=(2,)),
        (8, 32),
        [("self", 2, 8, "window[2,8]", "window[2,8]")] * 0 + [("self", 2, 8, None, None)] * 2,
    ),
    "swin v2": (
        lambda: _swin(SwinTransformerV2),
        (32, 32),
        [("self", 2, 8, WINDOW, WINDOW)] * 2 + [("self", 4, 8, WINDOW, WINDOW)] * 2,
    ),
    "mvit v2": (
        lambda: _mvit(False),
        (64, 64),
        [("pool", 1, 16, 256, 16), ("self", 2, 16, 64, 64), ("pool", 2, 16, 64, 16)],
    ),
    "mvit v2 with cls": (
        lambda: _mvit(True),
        (64, 64),
        [("pool", 1, 16, 257, 17), ("self", 2, 16, 65, 65), ("pool", 2, 16, 65, 17)],
    ),
    "maxvit": (
        _maxvit,
        (64, 64),
        [
            ("self", 2, 8, WINDOW, WINDOW),
            ("self", 2, 8, "grid[4,4]", "grid[4,4]"),
            ("self", 4, 8, WINDOW, WINDOW),
            ("self", 4, 8, "grid[4,4]", "grid[4,4]"),
        ],
    ),
    "twins": (
        _twins,
        (64, 64),
        [
            ("self", 2, 8, WINDOW, WINDOW),
            ("pool", 2, 8, 256, 4),
            *[("self", 4, 8, WINDOW, WINDOW), ("pool", 4, 8, 64, 4)],
            *[("self", 4, 8, WINDOW, WINDOW), ("pool", 4, 8, 16, 4)],
            *[("self", 4, 8, WINDOW, WINDOW), ("self", 4, 8, 4, 4)],
        ],
    ),
    "levit": (
        _levit,
        (64, 64),
        [("self", 2, 8, 16, 16), ("pool", 4, 8, 4, 16), ("self", 3, 8, 4, 4)],
    ),
    "davit": (
        _davit,
        (64, 64),
        [
            ("self", 2, 8, WINDOW, WINDOW),
            ("channel", 2, 256, 8, 8),
            ("self", 4, 8, WINDOW, WINDOW),
            ("channel", 4, 64, 8, 8),
        ],
    ),
    "xcit": (_xcit, (64, 64), [("channel", 4, 16, 16, 16)] + [("pool", 4, 16, 1, CLS)] * 2),
    # Heads stand before the windows in Nest, behind them in Twins; here there are as many of one as of the other.
    "nest": (
        lambda: Nest(img_size=32, num_levels=2, embed_dims=(32, 64), num_heads=(4, 4), depths=(1, 1), num_classes=5),
        (32, 32),
        [("self", 4, 8, 16, 16), ("self", 4, 16, 16, 16)],
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size, _ = MODELS[name]
    return make().eval().to(dtype), torch.randn(2, 3, *size, dtype=dtype)
