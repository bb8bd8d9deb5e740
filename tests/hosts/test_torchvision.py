"""Sites of torchvision's models: kinds, heads, tokens; weights and their gradients beside the models' own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard as rg

torchvision = pytest.importorskip("torchvision")
from torchvision.models.maxvit import MaxVit  # noqa: E402
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402


def _vit() -> nn.Module:
    return VisionTransformer(64, 16, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5)


def _swin(**more) -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **more)


CLS, WINDOW, GRID = "cls + image[4,4]", "window[4,4]", "grid[4,4]"
WINDOWS = [("self", 2, 8, WINDOW)] * 2 + [("self", 4, 8, WINDOW)] * 2
MODELS = {
    "vit": (_vit, (64, 64), [("self", 3, 8, CLS)] * 2),
    "swin": (_swin, (32, 32), WINDOWS),
    "swin, padded": (_swin, (40, 24), WINDOWS),
    "swin v2": (
        lambda: _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        (32, 32),
        WINDOWS,
    ),
    "maxvit": (
        lambda: MaxVit((64, 64), 8, 4, [16, 32], [1, 1], 8, 0.0, num_classes=5),
        (64, 64),
        [("self", 2, 8, WINDOW), ("self", 2, 8, GRID), ("self", 4, 8, WINDOW), ("self", 4, 8, GRID)],
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size, _ = MODELS[name]
    model = make()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval().to(dtype), torch.randn(2, 3, *size, dtype=dtype)


class ByHand(nn.Module):
    """What nn.MultiheadAttention gives, with its softmax in the open."""

    def __init__(self, host: nn.MultiheadAttention) -> None:
        super().__init__()
        self.host = host

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        packed = F.linear(q, self.host.in_proj_weight, self.host.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.host.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = F.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return self.host.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def opened(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, ByHand(child))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_sites_kinds_heads_and_tokens(name: str) -> None:
    model, image = build(name)
    found = rg.sites(model, image)
    assert not found.refused, found
    for site, expected in zip(found, MODELS[name][2], strict=True):
        assert (site.kind, site.heads, site.head_dim, str(site.tokens_q or site.queries)) == expected, site.name
        assert site.queries == site.keys
        assert site.calls == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_their_gradients_are_the_models_own(name: str, dtype: torch.dtype, softmaxes) -> None:
    bound = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    model, image = build(name, dtype)
    with rg.capture(model, grad=True) as cap:
        model(image)[:, 1].sum().backward()
    with torch.no_grad():
        plain = model(image)
    with softmaxes:
        logits = opened(model)(image)
        logits[:, 1].sum().backward()
    torch.testing.assert_close(logits, plain, atol=10 * bound, rtol=0)
    for (_, call), expected in zip(cap.items(), softmaxes.weights, strict=True):
        torch.testing.assert_close(call.weights(), expected.flatten(0, -4), atol=bound, rtol=0)
        assert expected.grad is not None
        size = expected.grad.abs().max()
        torch.testing.assert_close(
            call.weights_grad() / size, expected.grad.flatten(0, -4) / size, atol=10 * bound, rtol=0
        )


@pytest.mark.parametrize("name", MODELS)
def test_reading_leaves_the_output_to_the_bit(name: str) -> None:
    model, image = build(name)
    with torch.no_grad():
        before = model(image)
        with rg.capture(model):
            during = model(image)
        after = model(image)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_an_edit_of_the_weights_is_what_it_says(name: str) -> None:
    """Uniform weights in one head: the same as values that are alike in every place, for it alone."""
    model, image = build(name, torch.float64)
    site = rg.sites(model, image)[-1].name
    with rg.capture(model) as cap, torch.no_grad():
        plain = model(image)
    rows = cap[site].k.shape[2]
    with torch.no_grad(), rg.edit(model, rg.Edit.weights(lambda w, call: w * 0 + 1 / rows, only=[1]), where=site):
        edited = model(image)
    mean = rg.Edit.v(lambda v, call: v.mean(2, keepdim=True).expand_as(v), only=[1])
    with torch.no_grad(), rg.edit(model, mean, where=site):
        expected = model(image)
    torch.testing.assert_close(edited, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(edited, plain)
