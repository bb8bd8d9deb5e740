"""Contributions are those of layers that are really there; maps, meta-saliency and the pointing game."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard as rg
from regard.core.features import Features
from regard.explainers.normgrad import (
    AGGREGATES,
    CONTRIBUTIONS,
    NormGrad,
    PointingGame,
    aggregate,
    class_sensitivity,
    meta_saliency,
    saliency,
    virtual_identity_contributions,
)


def small_network() -> nn.Sequential:
    """In-place activations, strides that do not divide the size, statistics of a batch."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, 2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ).eval()


def test_every_identity_has_a_layer(x: Tensor, tail: nn.Module, identity: str) -> None:
    b, c = x.shape[:2]
    eye = torch.eye(c, dtype=torch.float64)
    if identity == "bias":
        weight = torch.zeros(c, dtype=torch.float64)
        layer = lambda w, x: x + w[:, None, None]  # noqa: E731
    elif identity == "scaling":
        weight = torch.ones(c, dtype=torch.float64)
        layer = lambda w, x: x * w[:, None, None]  # noqa: E731
    elif identity == "conv1x1":
        weight = eye[..., None, None]
        layer = lambda w, x: F.conv2d(x, w)  # noqa: E731
    elif identity == "conv3x3":
        weight = torch.zeros(c, c, 3, 3, dtype=torch.float64)
        weight[..., 1, 1] = eye
        layer = lambda w, x: F.conv2d(x, w, padding=1)  # noqa: E731
    else:
        weight = torch.zeros(c, 1, 3, 3, dtype=torch.float64)
        weight[..., 1, 1] = 1
        layer = lambda w, x: F.conv2d(x, w, padding=1, groups=c)  # noqa: E731
    plain = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(tail(plain).square().sum(), plain)
    found = virtual_identity_contributions(x, g, identity)
    for item in range(b):
        w = weight.clone().requires_grad_()
        through = layer(w, x[item : item + 1])
        assert torch.equal(through, x[item : item + 1])
        tail(through).square().sum().backward()
        total = found[item].sum((-2, -1))
        assert w.grad is not None
        torch.testing.assert_close(total.flatten(), w.grad.flatten(), rtol=0, atol=1e-10)
    for how in AGGREGATES:
        fast = saliency(x, g, identity, how)
        torch.testing.assert_close(fast, aggregate(found, how), rtol=0, atol=1e-10)
        if how in ("norm", "filter_norm"):
            assert (fast >= 0).all()
            torch.testing.assert_close(saliency(x, 3 * g, identity, how), 3 * fast)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, 3, dtype=torch.float64)


@pytest.fixture
def tail() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)).double()


@pytest.fixture(params=list(CONTRIBUTIONS))
def identity(request: pytest.FixtureRequest) -> str:
    return request.param


def test_aggregates_by_hand() -> None:
    contributions = torch.tensor([3.0, -4.0, 1.0]).view(1, 3, 1, 1)
    found = {how: aggregate(contributions, how).item() for how in AGGREGATES}
    assert found == pytest.approx({"norm": 26**0.5, "filter_norm": 10**0.5, "sum": 0.0, "max": 3.0})


def test_clamped_products_are_not_clamped_scalings() -> None:
    """Selective in the sense of the framework clamps matrix entries; that of scaling clamps x g channel by channel."""
    x, g = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    assert saliency(x, g, "scaling", "filter_norm").item() == 0
    assert saliency(x, g, "conv1x1", "filter_norm").item() == pytest.approx(2**0.5)


def test_grad_cam_is_a_cell_of_the_framework() -> None:
    """With the gradient averaged over places: the sum over channels of weight times activation."""
    model, image = small_network(), torch.randn(2, 3, 21, 17)
    activation = model[:5](image).detach().requires_grad_()
    model[5:](activation)[:, 2].sum().backward()
    assert activation.grad is not None
    weights = activation.grad.mean((2, 3))
    cam = torch.einsum("bc,bchw->bhw", weights, activation.detach())
    with Features(model, ["4"]) as seen:
        model(image)[:, 2].sum().backward()
    mean = seen.gradients["4"].mean((2, 3), keepdim=True).expand_as(seen.gradients["4"])
    torch.testing.assert_close(saliency(seen.outputs["4"], mean, "scaling", "sum"), cam)


def test_maps_of_one_and_of_several_layers() -> None:
    model, image = small_network(), torch.randn(2, 3, 21, 17)
    maps = {}
    for name, grid in (("2", (10, 8)), ("4", (4, 3))):
        found = rg.explain(model, image, "normgrad", target=1, layers=[name])
        assert found.grid == grid
        with Features(model, [name]) as seen:
            model(image)[:, 1].sum().backward()
        expected = seen.outputs[name].norm(dim=1) * seen.gradients[name].norm(dim=1)
        torch.testing.assert_close(found.values, expected)
        single = rg.explain(model, image[1:], "normgrad", target=1, layers=[name])
        torch.testing.assert_close(single.values, found.values[1:])
        maps[name] = found
    both = rg.explain(model, image, "normgrad", target=1, layers=["2", "4"])
    assert both.grid == (10, 8)
    torch.testing.assert_close(
        both.values, maps["2"].normalized().values * maps["4"].upsample((10, 8)).normalized().values
    )
    large = rg.explain(model, image, "normgrad", target=1, layers=["2", "4"], size=(21, 17))
    torch.testing.assert_close(
        large.values,
        maps["2"].upsample((21, 17)).normalized().values * maps["4"].upsample((21, 17)).normalized().values,
    )
    model[7].weight.data.mul_(3)
    scaled = rg.explain(model, image, "normgrad", target=1, layers=["2"]).values
    torch.testing.assert_close(scaled, 3 * maps["2"].values)


def test_zero_gradients_give_zeros() -> None:
    model, image = small_network(), torch.randn(2, 3, 21, 17)
    model[7].weight.data.zero_()
    found = rg.explain(model, image, "normgrad", target=1, layers=["2", "4"]).values
    assert found.isfinite().all()
    assert not found.any()
    constant = rg.explain(model, image, "normgrad", target=lambda out: model[7].bias.sum(), layers=["2"]).values
    assert not constant.any()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_residual_networks(library: str) -> None:
    """Before global average pooling every place has the same gradient, so that the bias map says nothing there."""
    pytest.importorskip(library)
    if library == "timm":
        import timm

        model = timm.create_model("resnet10t", num_classes=5).eval()
    else:
        from torchvision.models.resnet import BasicBlock, ResNet

        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    image = torch.randn(1, 3, 96, 64)
    found = rg.explain(model, image, "normgrad", target=2, layers=["layer2", "layer3", "layer4"])
    assert found.grid == (12, 8)
    assert found.values.std() > 0
    bias = rg.explain(model, image, "normgrad", target=2, layers=["layer4"], identity="bias").values
    assert bias.var() < 1e-10
    assert (bias > 0).all()
    earlier = rg.explain(model, image, "normgrad", target=2, layers=["layer3"], identity="bias").values
    assert earlier.std() / earlier.mean() > 0.01


def test_tokens_on_a_grid() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(48, 64), depth=2, embed_dim=24, num_heads=2, num_classes=3
    ).eval()
    image = torch.randn(2, 3, 48, 64)
    found = rg.explain(model, image, "normgrad", target=1, layers=["blocks.0"], grid=(3, 4))
    with Features(model, ["blocks.0"]) as seen:
        model(image)[:, 1].sum().backward()
    expected = seen.outputs["blocks.0"].norm(dim=-1) * seen.gradients["blocks.0"].norm(dim=-1)
    torch.testing.assert_close(found.values.flatten(1), expected[:, 1:])
    with pytest.raises(ValueError, match=r"layer='blocks\.0' gives \(2, 13, 24\)"):
        rg.explain(model, image, "normgrad", target=1, layers=["blocks.0"])


def test_meta_saliency_is_a_step_and_comes_back() -> None:
    model, image = small_network(), torch.randn(3, 3, 21, 17)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    explainer, target = NormGrad(["2"]), torch.tensor([1, 3, 0])
    for lr in (0.5, -0.5):
        found = meta_saliency(explainer, model, image, target, lr=lr).values
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        twin = small_network()
        twin.load_state_dict(before)
        F.cross_entropy(twin(image[1:2]), target[1:2]).backward()
        with torch.no_grad():
            for p in twin.parameters():
                assert p.grad is not None
                p -= lr * p.grad
        twin.zero_grad()
        torch.testing.assert_close(found[1:2], rg.explain(twin, image[1:2], explainer, target=3).values)
    still = meta_saliency(explainer, model, image, target, lr=0.0).values
    torch.testing.assert_close(still, rg.explain(model, image, explainer, target=target).values)


def test_meta_saliency_restores_after_a_failure() -> None:
    model, image = small_network(), torch.randn(1, 3, 21, 17)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    class Fails(NormGrad):
        def explain(self, evidence: Features) -> Tensor:
            raise KeyError("half way")

    with pytest.raises(KeyError):
        meta_saliency(Fails(["2"]), model, image, [1], lr=1.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="one class for each of 1 items"):
        meta_saliency(NormGrad(["2"]), model, image, [1, 2])
    with pytest.raises(ValueError, match="training mode"):
        meta_saliency(NormGrad(["2"]), model.train(), image, [1])


def test_class_sensitivity_is_a_correlation() -> None:
    model, image = small_network(), torch.randn(4, 3, 21, 17)
    logits = model(image).detach()

    def make(target: Tensor) -> rg.core.maps.Map:
        return rg.explain(model, image, "normgrad", target=target, layers=["2"])

    found = class_sensitivity(make, logits)
    for item in range(4):
        pair = torch.stack(
            [make(logits.argmax(1)).values[item].flatten(), make(logits.argmin(1)).values[item].flatten()]
        )
        assert found[item].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-5)
    blind = class_sensitivity(lambda target: make(torch.zeros_like(logits.argmax(1))), logits)
    torch.testing.assert_close(blind, torch.ones(4))


def test_pointing_game() -> None:
    game = PointingGame(3, tolerance=2)
    mask = torch.zeros(5, 9, dtype=torch.bool)
    mask[2, 2:4] = True

    def at(y: int, x: int) -> Tensor:
        return torch.zeros(5, 9).index_put((torch.tensor(y), torch.tensor(x)), torch.tensor(1.0))

    assert game.add(at(2, 3), mask, 0)
    assert game.add(at(3, 4), mask, 0)
    # Strictly nearer than the tolerance.
    assert not game.add(at(2, 5), mask, 0)
    assert not game.add(at(4, 8), mask, 2)
    torch.testing.assert_close(game.accuracy(), torch.tensor([2 / 3, float("nan"), 0.0]), equal_nan=True)
    assert game.accuracy().nanmean().item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="one size"):
        game.add(torch.zeros(4, 9), mask, 0)
    with pytest.raises(ValueError, match="the mask an object"):
        game.add(at(0, 0), torch.zeros_like(mask), 0)


def test_bad_input() -> None:
    model, image = small_network(), torch.randn(1, 3, 21, 17)
    with pytest.raises(ValueError, match="layers='2' must be a list"):
        NormGrad("2")
    with pytest.raises(ValueError, match="layers=\\[\\] must be a list"):
        NormGrad([])
    with pytest.raises(ValueError, match="identity='conv5x5' is not one of bias"):
        NormGrad(["2"], identity="conv5x5")
    with pytest.raises(ValueError, match="aggregate='mean' is not one of norm"):
        NormGrad(["2"], aggregate="mean")
    with pytest.raises(ValueError, match="layer='9' is not a module"):
        rg.explain(model, image, "normgrad", layers=["9"])
    with pytest.raises(ValueError, match=r"layer='6' gives \(1, 5\)"):
        rg.explain(model, image, "normgrad", layers=["6"])
    with pytest.raises(ValueError, match=r"target=4 is outside 0\.\.3"):
        rg.explain(model, image, "normgrad", target=4, layers=["2"])
    with pytest.raises(ValueError, match="x and g must both"):
        saliency(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
