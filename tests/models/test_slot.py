"""The network with a slot: only the slot differs, any image shape works, every kind of layer is called as its record says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from regard.catalog import registry
from regard.models import slot
from regard.models.slot import Convolution, Slot, SlotNetwork
from regard.nn import Attention


def small(mixer: slot.Mixer, image: tuple[int, int] = (13, 9), **options: object) -> SlotNetwork:
    torch.manual_seed(3)
    return SlotNetwork(mixer, 5, image, dim=8, num_heads=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [(13, 9), (4, 21), (1, 1), (2, 3)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_any_image_shape(image: tuple[int, int], patch: int) -> None:
    network = small(slot.mixer("attention"), image, patch=patch)
    first = -(-image[0] // patch), -(-image[1] // patch)
    assert network.grids == [first, (-(-first[0] // 2), -(-first[1] // 2))]
    x = torch.randn(2, 1, *image)
    out = network(x)
    assert out.shape == (2, 5)
    out.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_equation_of_one_block() -> None:
    network = small(slot.mixer("attention"), depth=(1,)).double()
    image = torch.randn(2, 1, 13, 9, dtype=torch.float64)
    x = network.stem(image).flatten(2).transpose(1, 2) + network.position
    block = network.stages[0][0]
    x = x + block.mixer.layer(block.norm1(x))
    x = x + block.mlp(block.norm2(x))
    expected = network.head(network.norm(x).mean(1))
    torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-12)


def test_everything_outside_the_slot_starts_alike() -> None:
    def outside(name: str) -> dict[str, Tensor]:
        return {k: v for k, v in small(slot.mixer(name)).state_dict().items() if ".mixer." not in k}

    first, second = outside("attention"), outside("convolution")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_mixers_get_their_place() -> None:
    places = []

    def mixer(dim: int, num_heads: int, grid: tuple[int, int]) -> nn.Module:
        places.append((dim, num_heads, grid))
        return nn.Identity()

    small(mixer, depth=(1, 2), patch=2)
    assert places == [(8, 2, (7, 5)), (16, 4, (4, 3)), (16, 4, (4, 3))]


def test_convolution_sees_neighbours_in_both_directions_and_nothing_else() -> None:
    layer = Convolution(1)
    x = torch.randn(1, 4 * 6, 1, requires_grad=True)
    i, j = 1, 3
    layer(x, grid=(4, 6))[0, i * 6 + j, 0].backward()
    assert x.grad is not None
    seen = {(n // 6, n % 6) for n in x.grad[0, :, 0].nonzero()[:, 0].tolist()}
    assert seen == {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)}


def test_a_gate_differs_from_convolution_by_the_gate_alone() -> None:
    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    torch.manual_seed(0)
    plain = Convolution(4)
    torch.manual_seed(0)
    gated = Convolution(4, Halve())
    x = torch.randn(2, 15, 4)
    bias = plain.pointwise.bias
    torch.testing.assert_close(2 * (gated(x, grid=(3, 5)) - bias), plain(x, grid=(3, 5)) - bias)


@pytest.mark.parametrize("name", ["hilo", "cbam", "rela", "attention"])
def test_registered_layers_fit(name: str) -> None:
    network = small(slot.mixer(name), (14, 10), patch=2)
    assert network(torch.randn(2, 1, 14, 10)).shape == (2, 5)


def test_image_layers_stand_behind_a_convolution() -> None:
    mixer = slot.mixer("cbam")(8, 2, (3, 4))
    assert isinstance(mixer, Slot)
    assert isinstance(mixer.layer, Convolution)
    assert type(mixer.layer.gate).__name__ == "CBAM"


def test_somebody_elses_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebody.py").write_text(
        "import torch\n"
        "from regard.catalog.registry import Tags, method\n"
        "class Plain(torch.nn.Linear):\n    def __init__(self, dim): super().__init__(dim, dim)\n"
        "@method('needs-four', kind='layer', tags=Tags(input='grid', multiple=4))\n"
        "class _Four(torch.nn.Module):\n"
        "    def __init__(self, dim): super().__init__()\n"
        "    def forward(self, x, grid): return x * grid[1]\n"
        "class Pool(torch.nn.Module):\n    def forward(self, x): return x.mean(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.ones(1, 32, 8)
    assert slot.mixer("somebody:Plain")(8, 2, (4, 8))(x).shape == x.shape
    assert torch.equal(slot.mixer("somebody:needs-four")(8, 2, (4, 8))(x), 8 * x)
    with pytest.raises(ValueError, match="multiples of 4; got 4x6"):
        slot.mixer("somebody:needs-four")(8, 2, (4, 6))
    with pytest.raises(ValueError, match=r"Pool does not mix tokens: \(1, 32, 8\) became \(1, 8\)"):
        slot.mixer("somebody:Pool")(8, 2, (4, 8))(x)
    with pytest.raises(ValueError, match="nothing-here"):
        slot.mixer("somebody:nothing-here")
    with pytest.raises(ValueError, match="cannot be imported"):
        slot.mixer("nobody_at_all:Plain")
    registry._METHODS.pop("needs-four")


@pytest.mark.parametrize(
    ("wrong", "near"), [("atention", "attention"), ("convolutoin", "convolution"), ("hillo", "hilo")]
)
def test_unknown_layer_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"{wrong}.*nearest:.*\b{near}\b"):
        slot.mixer(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 9}, "dim=9 must be a multiple of num_heads=2"),
        ({"depth": ()}, "depth"),
        ({"depth": (1, 0)}, "depth"),
        ({"patch": 0}, "patch=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"image": (0, 3)}, "image"),
    ],
)
def test_bad_settings(options: dict[str, object], said: str) -> None:
    settings: dict[str, object] = {"num_classes": 5, "image": (8, 8), "dim": 8, "num_heads": 2, **options}
    with pytest.raises(ValueError, match=said):
        SlotNetwork(lambda *_: nn.Identity(), **settings)  # type: ignore[arg-type]


def test_image_of_another_shape() -> None:
    with pytest.raises(ValueError, match="image must be"):
        small(lambda d, h, g: Slot(Attention(d, h), g, needs_grid=False))(torch.randn(1, 1, 9, 13))
