"""Photographs inside packages: sizes, crops that are parts of them, and a stereo pair whose truth fits its images."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.photos import CAPTIONS, HELD, Crops, motorcycle, photo


@pytest.mark.parametrize("name", CAPTIONS)
def test_photographs(name: str) -> None:
    image = photo(name)
    assert image.dtype == torch.float32
    assert image.shape[0] == 3
    assert min(image.shape[1:]) >= 300
    assert 0 <= image.min() < 0.3
    assert 0.6 < image.max() <= 1
    assert image.std() > 0.05
    assert torch.equal(image[0], image[1]) == (name in ("brick", "camera", "coins", "grass", "gravel"))


def test_the_right_way_up_and_in_the_right_channels() -> None:
    flower = photo("flower")
    middle = flower[:, 150:250, 280:380].mean((1, 2))
    assert middle[0] > 2 * middle[1]
    sky = photo("china")[:, :60].mean((1, 2))
    assert sky[2] > sky[0]
    camera = photo("camera")[0]
    assert camera[:150].mean() > camera[350:].mean()


def test_a_copy_is_given_out() -> None:
    photo("camera").zero_()
    assert photo("camera").max() > 0.5


def test_stereo_truth_warps_right_onto_left() -> None:
    pair = motorcycle()
    h, w = pair.disparity.shape
    assert pair.left.shape == pair.right.shape == (3, h, w) == (3, 500, 741)
    assert 0.9 < pair.known.float().mean() < 0.95
    v, u = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")

    def error(sign: int) -> float:
        x = u + sign * pair.disparity
        grid = torch.stack([2 * x / w - 1, 2 * v / h - 1], -1)[None]
        warped = F.grid_sample(pair.right[None], grid, align_corners=False)[0]
        inside = pair.known & (x > 0.5) & (x < w - 0.5)
        return (warped - pair.left).abs().mean(0)[inside].median().item()

    assert error(-1) < 0.02 < 0.06 < min(error(0), error(1))
    near, far = pair.depth[pair.known].aminmax()
    assert 2 < near < far < 5.1
    assert (pair.depth[~pair.known] == 0).all()
    first, second = pair.disparity[pair.known][[0, -1]]
    a, b = pair.depth[pair.known][[0, -1]]
    assert (a / b).item() == pytest.approx(((second + 31.086) / (first + 31.086)).item(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 90), st.integers(5, 90))
def test_a_crop_is_that_part_of_its_photograph(seed: int, h: int, w: int) -> None:
    plain = Crops(seed=seed, size=(h, w), zoom=(1.0, 1.0))[0]
    x0, y0, x1, y1 = plain.box
    part = photo(plain.name)[:, y0:y1, x0:x1]
    assert part.shape == (3, h, w)
    assert torch.equal(plain.image.flip(2) if plain.flipped else plain.image, part)
    zoomed = Crops(seed=seed, size=(h, w), zoom=(1.0, 3.0))[0]
    x0, y0, x1, y1 = zoomed.box
    whole = photo(zoomed.name)
    assert 0 <= x0 < x1 <= whole.shape[2]
    assert 0 <= y0 < y1 <= whole.shape[1]
    assert abs((x1 - x0) / w - (y1 - y0) / h) < 1 / min(h, w)
    assert zoomed.image.shape == (3, h, w)
    assert (zoomed.image.mean() - whole[:, y0:y1, x0:x1].mean()).abs() < 0.03


def test_splits_share_no_photograph() -> None:
    worlds = [Crops(split=split) for split in ("train", "val", "test")]
    names = [set(world.photographs) for world in worlds]
    assert names[1] == set(HELD["val"])
    assert names[2] == set(HELD["test"])
    assert set.union(*names) == set(CAPTIONS)
    assert sum(map(len, names)) == len(CAPTIONS)
    for world, expected in zip(worlds, names):
        assert {world[i].name for i in range(60)} == expected
    assert {Crops(split="test", names=("coffee",))[i].name for i in range(3)} == {"coffee"}


def test_a_crop_is_its_number_and_nothing_else() -> None:
    world = Crops(size=(20, 30))
    assert torch.equal(world[4].image, replace(world)[4].image)
    assert world[4].box != world[5].box
    assert world[4].box != replace(world, seed=1)[4].box
    flips = [world[i].flipped for i in range(40)]
    assert 8 < sum(flips) < 32
    assert world.panels(world[4])["photograph"] == CAPTIONS[world[4].name]


def test_zoom_goes_as_far_as_the_photograph_allows() -> None:
    world = Crops(size=(128, 128), zoom=(1.0, 50.0), names=("coins",))
    tall = [world[i].box[3] - world[i].box[1] for i in range(30)]
    assert max(tall) <= 303
    assert min(tall) >= 128
    assert max(tall) > 250


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": (0, 5)}, r"size=\(0, 5\)"),
        ({"size": (310, 20), "names": ("coins",)}, r"does not fit into 'coins' of \(303, 384\)"),
        ({"size": (200, 20), "zoom": (2.0, 3.0), "names": ("coins",)}, "does not fit"),
        ({"zoom": (0.5, 1.0)}, r"zoom=\(0\.5, 1\.0\)"),
        ({"zoom": (3.0, 2.0)}, r"zoom=\(3\.0, 2\.0\)"),
        ({"names": ("dog",)}, "name='dog' must be one of 'astronaut'"),
    ],
)
def test_bad_crops(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Crops(**arguments)


def test_unknown_photograph_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name='dog'"):
        photo("dog")
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ModuleNotFoundError):
        motorcycle()
