"""Layers of this library in the place of timm's: the same function where it is the same, trained, undone to the bit."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.nn import Attention

timm = pytest.importorskip("timm")
from timm.models.davit import DaVit  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.twins import Twins  # noqa: E402


def vit(name: str = "vit_tiny_patch16_224", **more) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **more}).eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    model = SwinTransformer(img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5)
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name:
            nn.init.zeros_(parameter)  # The one part of Swin's attention that a plain layer lacks.
    return model.eval()


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Reversed(Attention):
    """A layer with a stage of its own."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -super().scores(q, k)


@pytest.mark.parametrize("probed", [True, False])
def test_the_same_layer_is_the_same_function(probed: bool) -> None:
    model = vit()
    if probed:
        rg.sites(model, IMAGE)
    plain, modules, state = model(IMAGE), dict(model.named_modules()), dict(model.state_dict())
    handle = rg.swap(model, "blocks.*.attn", Attention)
    assert torch.equal(model(IMAGE), plain)
    assert list(handle.layers) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(type(layer) is Attention for layer in handle.layers.values())
    assert all(carried == ["q", "k", "v", "out"] for carried in handle.carried.values())
    found = rg.sites(model, IMAGE)
    assert [(s.host, s.verified, str(s.tokens_q)) for s in found] == [("regard", True, "cls + image[4,4]")] * 2
    handle.undo()
    handle.undo()
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, state[n]) for n, a in model.state_dict().items())
    assert torch.equal(model(IMAGE), plain)
    assert [s.name for s in rg.sites(model, IMAGE)] == ["blocks.0.attn", "blocks.1.attn"]


def test_swins_shifted_windows_keep_their_masks() -> None:
    model = swin().double()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = model(image)
        with rg.swap(model, "layers.*.attn", Attention) as handle:
            assert len(handle.layers) == 4
            torch.testing.assert_close(model(image), plain, atol=1e-12, rtol=0)
            # Without the mask of the shifted windows the result is another.
            model.layers[0].blocks[1].attn_mask = None
            assert not torch.allclose(model(image), plain, atol=1e-6)
            model.layers[0].blocks[1].attn_mask = swin().double().layers[0].blocks[1].attn_mask
        assert torch.equal(model(image), plain)


def test_a_position_bias_in_the_mask_is_not_taken_for_a_mask() -> None:
    model = vit()
    rg.swap(model, "blocks.*.attn", Attention)
    with pytest.raises(ValueError, match="a position bias reached a layer"):
        model(IMAGE, attn_mask=torch.randn(17, 17))
    with pytest.raises(ValueError, match="is_causal=True reached"):
        model.blocks[0].attn(torch.randn(1, 17, 24), is_causal=True)


@pytest.mark.parametrize("layer", [Attention, Reversed, "rela"])
def test_a_swapped_model_trains(layer: str | type[nn.Module]) -> None:
    model = vit()
    rg.swap(model, "blocks.*.attn", layer)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    labels, losses = torch.tensor([1, 3]), []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(IMAGE), labels)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if ".attn." in name:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                # Added to every score of a row alike, the bias of the keys changes nothing under a softmax.
                assert parameter.grad.any() or name.endswith("k.bias"), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_swaps_of_two_sites_are_undone_in_any_order() -> None:
    for order in itertools.permutations(range(2)):
        model = vit()
        plain, modules = model(IMAGE), dict(model.named_modules())
        alone = []
        for i in range(2):
            with rg.swap(model, f"blocks.{i}.attn", Reversed):
                alone.append(model(IMAGE))
        handles = [rg.swap(model, f"blocks.{i}.attn", Reversed) for i in range(2)]
        with pytest.raises(ValueError, match=r"blocks\.0\.attn.*none of these modules"):
            rg.swap(model, "blocks.0.attn", Attention)  # what was put in stays until it is undone
        assert not torch.allclose(model(IMAGE), plain, atol=1e-5)
        handles[order[0]].undo()
        assert torch.equal(model(IMAGE), alone[order[1]])
        handles[order[1]].undo()
        assert dict(model.named_modules()) == modules
        assert torch.equal(model(IMAGE), plain)


def test_nothing_is_replaced_when_any_site_fails() -> None:
    model = vit(class_token=False, global_pool="map")
    rg.sites(model, IMAGE)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"attn_pool \(AttentionPoolLatent\) cannot be replaced"):
        rg.swap(model, "*", Attention)
    assert dict(model.named_modules()) == modules
    built = []

    def second_fails(dim: int, num_heads: int) -> nn.Module:
        built.append(dim)
        if len(built) == 2:
            raise RuntimeError("on purpose")
        return Attention(dim, num_heads)

    with pytest.raises(RuntimeError, match="on purpose"):
        rg.swap(model, "blocks.*", second_fails)
    assert len(built) == 2
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(
    ("build", "where", "size"),
    [
        (lambda: vit("eva02_tiny_patch14_224", img_size=56), "blocks.0.attn", 56),
        (lambda: vit("beit_base_patch16_224"), "blocks.0.attn", 64),
        (lambda: DaVit(depths=(1,), embed_dims=(16,), num_heads=(2,), window_size=4), "stages.0.blocks.0.1.attn", 64),
        (
            lambda: Twins(img_size=64, embed_dims=(16,) * 4, num_heads=(2,) * 4, depths=(1,) * 4, wss=(4,) * 4),
            "blocks.0.0.attn",
            64,
        ),
    ],
    ids=["rotation", "biases kept apart", "channels", "sizes handed in"],
)
def test_what_a_plain_layer_cannot_take_is_refused(build, where: str, size: int) -> None:
    model = build().eval()
    rg.sites(model, torch.randn(1, 3, size, size))
    with pytest.raises(ValueError, match=r"cannot be replaced"):
        rg.swap(model, where, Attention)


def test_a_layer_on_a_grid_needs_tokens_that_lie_on_one() -> None:
    with pytest.raises(ValueError, match=r"'hilo' works on a grid of tokens, but blocks\.0\.attn has 1 class"):
        rg.swap(vit(), "blocks.*.attn", "hilo")
    with pytest.raises(ValueError, match="5 class or register tokens"):
        rg.swap(vit(reg_tokens=4), "blocks.*.attn", "hilo")
    model = vit(class_token=False, global_pool="avg", img_size=(64, 96), num_heads=4)
    image = torch.randn(2, 3, 64, 96)
    plain = model(image)
    with rg.swap(model, "blocks.*.attn", "hilo", window_size=2) as handle:
        changed = model(image)
        changed.sum().backward()
        assert all(p.grad is not None for layer in handle.layers.values() for p in layer.parameters())
        assert not torch.allclose(changed, plain)
    assert torch.equal(model(image), plain)


def test_what_cannot_be_meant_is_said() -> None:
    model = vit()
    rg.sites(model, IMAGE)
    for where, layer, message in (
        ("blocks.7.attn", Attention, r"names no attention site of VisionTransformer; nearest: blocks\.[01]\.attn"),
        ("blocks.0.attn", "hilow", r"hilow.*hilo"),
        ("blocks.0.attn", "grad-cam", r"grad-cam"),
    ):
        with pytest.raises((ValueError, KeyError), match=message):
            rg.swap(model, where, layer)
    with pytest.raises(ValueError, match="none of these modules is attention whose projections"):
        rg.swap(vit(), "norm", Attention)
