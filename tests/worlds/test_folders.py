"""A folder of images: labels, sizes, splits, broken files, and everything that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regard.worlds.folders import Folder

SOLID = {"blue": (10, 20, 200), "green": (0, 180, 30)}


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, colour in SOLID.items():
        for i in range(5):
            paint(tmp_path / name / f"{i}.png", colour, (9 + i, 17 - i))
    return tmp_path


def test_labels_are_folder_names(root: Path) -> None:
    paint(root / "green" / "deeper" / "down.PNG", SOLID["green"])
    (root / "green" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    found = Folder(root, 6)
    assert found.classes == ("blue", "green")
    assert found.labels.tolist() == [0] * 5 + [1] * 6
    for name, label in (("blue", 0), ("green", 1)):
        pixels = found.decode((found.labels == label).nonzero()[:, 0])
        assert pixels.shape[1:] == (3, 6, 6)
        assert (pixels == torch.tensor(SOLID[name]).view(1, 3, 1, 1)).all()


def test_shorter_side_is_scaled_and_the_centre_cut_out(root: Path) -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(root / "blue" / "a.png")
    found = Folder(root, 5)
    image = found.decode(torch.tensor([found.paths.index(root / "blue" / "a.png")]))[0]
    assert (image[:, :, 1:4] == 255).all()


def test_grey_palette_and_turned_images(root: Path) -> None:
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(root / "blue" / "grey.png")
    Image.new("RGBA", (8, 8), (9, 9, 9, 128)).save(root / "blue" / "clear.png")
    turned = Image.fromarray(np.repeat(np.array([[0] * 8 + [255] * 8], np.uint8), 16, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "blue" / "turned.jpg", exif=exif, quality=95)
    found = Folder(root, 8)
    by_name = {path.name: found.decode(torch.tensor([i]))[0].float() for i, path in enumerate(found.paths)}
    assert (by_name["grey.png"] == 77).all()
    assert by_name["clear.png"].shape == (3, 8, 8)
    assert by_name["turned.jpg"][:, :3].mean() < 30 < 220 < by_name["turned.jpg"][:, 5:].mean()


def test_split_is_stratified_and_the_same_for_the_same_seed(root: Path) -> None:
    found = Folder(root, 4)
    train, test = found.split(seed=1)
    assert train.labels.bincount().tolist() == [4, 4]
    assert test.labels.bincount().tolist() == [1, 1]
    assert torch.equal(found.split(seed=1)[0].pixels, train.pixels)
    x, _ = train.batch(torch.arange(8))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


def test_without_room_files_are_decoded_when_asked_for(root: Path) -> None:
    kept, lazy = Folder(root, 4), Folder(root, 4, cache_bytes=0)
    index = torch.tensor([7, 0, 3])
    assert torch.equal(kept.decode(index), lazy.decode(index))
    paint(root / "blue" / "0.png", (1, 2, 3))
    assert not torch.equal(kept.decode(index), lazy.decode(index))


def test_broken_files_are_left_out_and_named(root: Path) -> None:
    whole = (root / "blue" / "0.png").read_bytes()
    (root / "blue" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "green" / "z.jpg").write_bytes(b"this is no image")
    (root / "green" / "empty.png").touch()
    found = Folder(root, 4)
    assert len(found) == 9
    assert [path for path, _ in found.skipped] == ["blue/0.png", "green/empty.png", "green/z.jpg"]
    assert all(reason for _, reason in found.skipped)
    assert str(root) not in str(found.skipped)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        Folder(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        Folder(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    for i in range(3):
        paint(tmp_path / "only" / f"{i}.png", (1, 2, 3))
    with pytest.raises(ValueError, match="holds one class, only"):
        Folder(tmp_path)


def test_class_with_one_image(root: Path) -> None:
    paint(root / "red" / "a.png", (200, 0, 0))
    (root / "red" / "b.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"too few in red \(1\); 1 files could not be read"):
        Folder(root)


def test_folder_of_splits(root: Path) -> None:
    (root / "blue").rename(root / "train")
    (root / "green").rename(root / "val")
    with pytest.raises(ValueError, match="splits"):
        Folder(root)


def test_bad_size(root: Path) -> None:
    with pytest.raises(ValueError, match="size=0"):
        Folder(root, 0)
