"""Sites of timm's models: kinds, heads, tokens; weights and their gradients beside those of the eager code."""

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.core.call import OpaqueSite
from regard.hosts.small import early_vit

timm = pytest.importorskip("timm")
from timm.layers.halo_attn import HaloAttn  # noqa: E402
from timm.layers.split_attn import SplitAttn  # noqa: E402
from timm.models.coat import CoaT  # noqa: E402
from timm.models.convit import ConVit  # noqa: E402
from timm.models.davit import DaVit  # noqa: E402
from timm.models.levit import Levit  # noqa: E402
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg  # noqa: E402
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg  # noqa: E402
from timm.models.nest import Nest  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.twins import Twins  # noqa: E402
from timm.models.xcit import Xcit  # noqa: E402


def vit(name: str = "vit_tiny_patch16_224", **more) -> nn.Module:
    return timm.create_model(
        name, **{"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5, **more}
    )


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
    "vit behind a resnet": (
        lambda: vit("vit_tiny_r_s16_p8_224"),
        (64, 64),
        [("self", 3, 8, "cls + image[2,2]", "cls + image[2,2]")] * 2,
    ),
    "eva02": (lambda: vit("eva02_tiny_patch14_224", img_size=56), (56, 56), [("self", 3, 8, CLS, CLS)] * 2),
    "beit": (lambda: vit("beit_base_patch16_224"), (64, 64), [("self", 3, 8, CLS, CLS)] * 2),
    "swin": (_swin, (32, 32), [("self", 2, 8, WINDOW, WINDOW)] * 2 + [("self", 4, 8, WINDOW, WINDOW)] * 2),
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
    model = make()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # A block that starts as the identity would have no gradients.
    return model.eval().to(dtype), torch.randn(2, 3, *size, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_sites_kinds_heads_and_tokens(name: str) -> None:
    model, image = build(name)
    found = rg.sites(model, image)
    assert not found.refused, found
    for site, expected in zip(found, MODELS[name][2], strict=True):
        q, k = (
            str(tokens) if tokens else n for tokens, n in ((site.tokens_q, site.queries), (site.tokens_k, site.keys))
        )
        assert (site.kind, site.heads, site.head_dim, q, k) == expected, site.name
        assert site.kv_heads == site.heads
        assert not site.causal
        assert site.calls == 1
    # Kinds are known in a model that was never probed, too.
    kinds = {site.name: site.kind for site in found}
    untouched, _ = build(name)
    for kind in set(kinds.values()):
        with rg.capture(untouched, kind) as cap, torch.no_grad():
            untouched(image)
        assert list(cap) == [n for n, k in kinds.items() if k == kind]


def eager(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def as_ours(name: str, x: Tensor) -> Tensor:
    """(b, h, l, s) of the eager code's tensor: Nest's is (b, h, windows, l, s), Twins' (b, windows, h, l, s)."""
    if x.ndim == 5:
        return (x.transpose(1, 2) if name == "nest" else x).flatten(0, 1)
    return x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_their_gradients_are_the_eager_ones(name: str, dtype: torch.dtype, softmaxes) -> None:
    bound = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    model, image = build(name, dtype)
    for handwritten in (False, True):
        if handwritten:
            eager(model)
        with rg.capture(model, grad=True) as cap:
            logits = model(image)
            logits[:, 1].sum().backward()
        weights = [call.weights().detach() for _, call in cap.items()]
        gradients = [call.weights_grad() for _, call in cap.items()]
        model.train().eval()  # LeViT keeps its position biases, with their graph, until it is trained again.
        softmaxes.weights.clear()
        with softmaxes as theirs:
            eager(model)(image)[:, 1].sum().backward()
        model.train().eval()
        assert len(weights) == len(theirs.weights)
        for ours, grad, expected in zip(weights, gradients, theirs.weights, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, as_ours(name, expected).detach(), atol=bound, rtol=0)
            assert expected.grad is not None
            size = expected.grad.abs().max()
            torch.testing.assert_close(grad / size, as_ours(name, expected.grad) / size, atol=10 * bound, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_reading_leaves_the_output_to_the_bit(name: str) -> None:
    model, image = build(name)
    with torch.no_grad():
        before = model(image)
        with rg.capture(model):
            unprobed = model(image)
        rg.sites(model, image)
        with rg.capture(model), rg.capture(model, "*"):
            during = model(image)
        after = model(image)
    for got in (unprobed, during, after):
        assert torch.equal(before, got)
    assert all("_regard_taps" not in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_mixture_is_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    model = ConVit(depth=3, local_up_to_layer=2, **sizes).eval()
    image = torch.randn(1, 3, 64, 64)
    found = rg.sites(model, image)
    assert [s.name for s in found.verified] == ["blocks.2.attn"]
    assert [s.name for s in found.refused] == ["blocks.0.attn", "blocks.1.attn"]
    assert all("mixture" in s.reason for s in found.refused)
    with rg.capture(model) as cap, torch.no_grad():
        model(image)
    assert list(cap) == ["blocks.2.attn"]
    with pytest.raises(OpaqueSite, match=r"blocks\.0\.attn is opaque: its weights are changed .* a mixture"):
        cap["blocks.0.attn"]
    with pytest.raises(ValueError, match="mixture"):
        rg.edit(model, rg.Edit.v(lambda v, call: v), where="blocks.0.attn")


def test_a_factorised_form_is_refused_with_the_reason() -> None:
    model = CoaT(
        img_size=64,
        patch_size=4,
        embed_dims=(64, 64, 64, 64),
        serial_depths=(1, 1, 1, 1),
        num_heads=8,
        mlp_ratios=(1, 1, 1, 1),
        num_classes=5,
    ).eval()
    found = rg.sites(model, torch.randn(1, 3, 64, 64))
    assert [s.name for s in found] == [f"serial_blocks{i}.0.factoratt_crpe" for i in range(1, 5)]
    assert not found.verified
    assert all("softmax runs over axis 2 of 4" in s.reason and "factorised" in s.reason for s in found)


def test_a_softmax_that_is_not_attention_is_no_site() -> None:
    split = SplitAttn(8, radix=2)
    assert list(rg.sites(split.eval(), torch.randn(2, 8, 6, 6))) == []

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.vit.forward_features(x).softmax(-1)

    torch.manual_seed(0)
    found = rg.sites(Classifier().eval(), torch.randn(1, 3, 64, 64))
    assert [s.name for s in found] == ["vit.blocks.0.attn", "vit.blocks.1.attn"]


def test_heads_folded_into_the_batch_before_an_axis_of_windows(softmaxes) -> None:
    halo = HaloAttn(16, feat_size=(8, 8), num_heads=4, block_size=4, halo_size=1).eval().double()
    nn.init.normal_(halo.pos_embed.height_rel)
    image = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    wrapped = nn.Sequential(halo)
    assert [(s.heads, s.queries, s.keys) for s in rg.sites(wrapped, image)] == [(4, 16, 36)]
    with rg.capture(wrapped) as cap, softmaxes as theirs, torch.no_grad():
        plain = wrapped(image)
    # Four windows and four heads: (b h) windows l s -> (b windows) h l s.
    expected = theirs.weights[0].unflatten(0, (3, 4)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(cap["0"].weights(), expected)
    with torch.no_grad(), rg.edit(wrapped, rg.Edit.out(lambda out, call: 0 * out, only=[1])):
        edited = wrapped(image)
    changed = (edited != plain).flatten(2).any(-1).any(0)
    assert changed.tolist() == [4 <= channel < 8 for channel in range(16)]


def test_patches_of_a_convolutional_stem_are_found() -> None:
    model = early_vit(32, 8, 3, 5, 24, 3, 2, registers=4)
    assert rg.explain(model, torch.randn(1, 3, 32, 32), "attention-flow", target=1).grid == (4, 4)
