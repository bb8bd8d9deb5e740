"""COCO files: masks against hand-made examples and an encoder, fields, and everything that cannot be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from regard.worlds.coco import Coco, from_polygons, from_runs, unpack

PACKED, RUNS = "61X13mN000`0", [6, 1, 40, 4, 5, 4, 5, 4, 21]


def runs_of(mask: np.ndarray) -> list[int]:
    flat = [False, *mask.flatten(order="F").tolist()]
    changes = [i - 1 for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    return np.diff([0, *changes, mask.size]).tolist()


def pack(runs: list[int]) -> str:
    """Two's complement in groups of five bits, low ones first, bit 32 set on all but the last."""
    text = ""
    for i, run in enumerate(runs):
        x = run - (runs[i - 2] if i > 2 else 0)
        while True:
            bits, x = x & 31, x >> 5
            last = (x == 0 and not bits & 16) or (x == -1 and bits & 16)
            text += chr(48 + (bits if last else bits | 32))
            if last:
                break
    return text


def test_a_packed_mask_by_hand() -> None:
    assert unpack("534") == [5, 3, 4]
    assert unpack(PACKED) == RUNS
    assert pack(RUNS) == PACKED
    mask = from_runs([4, 1, 1, 2, 1], (3, 3))
    assert mask.astype(int).tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 0]]


@given(arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_masks_survive_packing(mask: np.ndarray) -> None:
    runs = runs_of(mask)
    assert np.array_equal(from_runs(runs, mask.shape), mask)
    assert unpack(pack(runs)) == runs


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_long_runs_survive_packing(runs: list[int]) -> None:
    assert unpack(pack(runs)) == runs


def test_broken_masks() -> None:
    for text in ("61X", "6 1", "6~1"):
        with pytest.raises(ValueError, match="compressed run lengths"):
            unpack(text)
    for runs in ([4, 4], [10, -1], [8.0, 1.0], [True] * 9):
        with pytest.raises(ValueError, match="do not fill 3 x 3"):
            from_runs(runs, (3, 3))
    for corners in ([0, 0, 1, 1], [0, 0, 1, 1, 2, 2, 3], [0, 0, 1, 1, float("nan"), 2], [0, 0, 1, 1, "2", 2], "circle"):
        with pytest.raises(ValueError, match="three corners"):
            from_polygons([corners], (3, 3))


def test_polygons_hold_the_pixels_whose_centres_they_hold() -> None:
    mask = from_polygons([[1, 2, 4, 2, 4, 5, 1, 5]], (6, 7))
    expected = np.zeros((6, 7), bool)
    expected[2:5, 1:4] = True
    assert np.array_equal(mask, expected)
    two = from_polygons([[0, 0, 2, 0, 2, 2, 0, 2], [4, 3, 9, 3, 9, 5, 4, 5]], (6, 7))
    assert two[:2, :2].all()
    assert two[3:5, 4:].all()
    assert two.sum() == 4 + 6


@given(st.integers(0, 10**6))
def test_triangles_against_their_half_planes(seed: int) -> None:
    a, b, c = np.random.default_rng(seed).uniform(-3, 15, (3, 2))
    mask = from_polygons([[*a, *b, *c]], (10, 12))
    v, u = np.mgrid[:10, :12] + 0.5
    sides = [(q[0] - p[0]) * (v - p[1]) - (q[1] - p[1]) * (u - p[0]) for p, q in ((a, b), (b, c), (c, a))]
    inside = np.all([s > 0 for s in sides], 0) | np.all([s < 0 for s in sides], 0)
    assert np.array_equal(mask, inside)


# --- files ---------------------------------------------------------------------------------------------------------


def entry(key: int, image: int = 1, category: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": key, "image_id": image, "category_id": category, "bbox": [2, 1, 4, 5], "iscrowd": 0, **more}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (12, 10), colour).save(tmp_path / name)
    Image.new("L", (10, 9), 51).save(tmp_path / "grey.png")
    square = [[2, 1, 6, 1, 6, 6, 2, 6]]
    return {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "images": [
            {"id": 1, "file_name": "a.png", "height": 10, "width": 12},
            {"id": 2, "file_name": "b.png", "height": 10, "width": 12},
            {"id": 5, "file_name": "grey.png", "height": 9, "width": 10},
        ],
        "annotations": [
            entry(1, segmentation=square),
            entry(2, category=3),
            entry(
                3, image=5, category=3, iscrowd=1, bbox=[0, 0, 10, 9], segmentation={"size": [9, 10], "counts": PACKED}
            ),
            entry(4, image=5, bbox=[0, 0, 10, 9], segmentation={"size": [9, 10], "counts": RUNS}),
        ],
    }


def opened(root: Path, content: Any, captions: Any = None, **more: Any) -> Coco:
    (root / "instances.json").write_text(json.dumps(content))
    told = None
    if captions is not None:
        told = root / "captions.json"
        told.write_text(json.dumps({"annotations": captions}))
    return Coco(root, root / "instances.json", told, **more)


def test_fields(tmp_path: Path, content: dict[str, Any]) -> None:
    captions = [{"id": 1, "image_id": 5, "caption": " grey \n"}, {"id": 2, "image_id": 5, "caption": "still grey"}]
    coco = opened(tmp_path, content, captions)
    assert len(coco) == 3
    assert coco.classes == ("cat", "dog")
    assert coco.skipped == []
    a, b, grey = (coco[i] for i in range(3))
    assert a.image.shape == (3, 10, 12)
    assert a.image[:, 0, 0].tolist() == [1, 0, 0]
    assert a.labels.tolist() == [0, 1]
    assert a.boxes.tolist() == [[2, 1, 6, 6], [2, 1, 6, 6]]
    assert a.boxes.dtype == torch.float32
    expected = torch.zeros(10, 12, dtype=torch.bool)
    expected[1:6, 2:6] = True
    assert torch.equal(a.visible[0], expected)
    assert torch.equal(a.visible[1], expected)
    assert b.labels.shape == (0,)
    assert b.boxes.shape == (0, 4)
    assert b.visible.shape == (0, 10, 12)
    assert grey.image.unique().tolist() == pytest.approx([0.2])
    assert grey.crowd.tolist() == [True, False]
    assert torch.equal(grey.visible[0], grey.visible[1])
    assert grey.visible[0].T.flatten().nonzero()[:, 0].tolist() == [6, *range(47, 51), *range(56, 60), *range(65, 69)]
    assert grey.captions == ("grey", "still grey")
    assert grey.name == "grey.png"
    panels = coco.panels(grey)
    assert panels["classes"] == "dog, cat"
    assert panels["things"].shape == (3, 9, 10)
    assert coco.panels(b)["things"].max() == 0


def test_brought_to_one_size(tmp_path: Path, content: dict[str, Any]) -> None:
    coco = opened(tmp_path, content, size=(20, 36))
    a, b, grey = (coco[i] for i in range(3))
    assert a.image.shape == b.image.shape == grey.image.shape == (3, 20, 36)
    assert a.boxes[0].tolist() == [6, 2, 18, 12]
    expected = torch.zeros(20, 36, dtype=torch.bool)
    expected[2:12, 6:18] = True
    assert torch.equal(a.visible[0], expected)
    assert b.visible.shape == (0, 20, 36)
    assert grey.visible.shape == (2, 20, 36)


def test_masks_are_brought_to_the_nearest_pixel(tmp_path: Path, content: dict[str, Any]) -> None:
    whole, small = opened(tmp_path, content)[2], opened(tmp_path, content, size=(5, 7))[2]
    expected = F.interpolate(whole.visible[None].float(), (5, 7), mode="nearest-exact")[0].bool()
    assert torch.equal(small.visible, expected)


def test_boxes_are_cut_at_the_edge(tmp_path: Path, content: dict[str, Any]) -> None:
    content["annotations"] = [entry(1, bbox=[-3, 4.75, 30, 40])]
    a = opened(tmp_path, content)[0]
    assert a.boxes.tolist() == [[0, 4.75, 12, 10]]
    assert torch.equal(a.visible[0].sum(1) > 0, torch.arange(10) >= 5)
    assert a.visible[0].sum() == 5 * 12


BROKEN = {
    "unknown picture": (entry(9, image=77), "image_id=77 is no usable picture"),
    "unknown category": (entry(9, category=8), "category_id=8 is unknown"),
    "no box": ({"id": 9, "image_id": 1, "category_id": 7}, "lacks 'bbox'"),
    "three numbers": (entry(9, bbox=[1, 2, 3]), "must be four finite numbers"),
    "words": (entry(9, bbox=[1, 2, 3, "4"]), "must be four finite numbers"),
    "nan": (entry(9, bbox=[1, 2, 3, float("nan")]), "must be four finite numbers"),
    "null": (entry(9, bbox=None), "NoneType"),
    "no width": (entry(9, bbox=[1, 2, 0, 4]), "is empty or outside"),
    "outside": (entry(9, bbox=[12, 2, 4, 4]), "is empty or outside the picture of 10 x 12"),
    "two corners": (entry(9, segmentation=[[1, 1, 2, 2]]), "three corners"),
    "mask elsewhere": (entry(9, segmentation=[[50, 50, 60, 50, 60, 60]]), "its mask is empty"),
    "short mask": (entry(9, segmentation={"size": [10, 12], "counts": [100]}), "do not fill 10 x 12"),
    "foreign mask": (
        entry(9, segmentation={"size": [9, 10], "counts": PACKED}),
        r"of size [9, 10] in a picture of [10, 12]",
    ),
    "broken mask": (entry(9, segmentation={"size": [10, 12], "counts": PACKED[:-1]}), "break off"),
    "no counts": (entry(9, segmentation={"size": [10, 12]}), "lacks 'counts'"),
    "list id": (entry(9, category=[7]), "unhashable"),
}


@pytest.mark.parametrize(("row", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_annotations_are_left_out_and_named(
    row: dict[str, Any], reason: str, tmp_path: Path, content: dict[str, Any]
) -> None:
    content["annotations"].insert(1, row)
    coco = opened(tmp_path, content)
    assert [where for where, _ in coco.skipped] == ["annotation 9"]
    assert reason in coco.skipped[0][1]
    assert coco[0].labels.tolist() == [0, 1]


def test_broken_pictures_are_left_out_with_their_annotations(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    size = {"height": 10, "width": 12}
    content["images"] += [
        {"id": 10, "file_name": "gone.png", **size},
        {"id": 11, "file_name": "text.png", **size},
        {"id": 12, "file_name": "b.png", "height": 12, "width": 10},
        {"id": 13, "file_name": "../b.png", **size},
        {"id": 1, "file_name": "b.png", **size},
        {"id": 14, **size},
        "picture",
    ]
    content["annotations"].append(entry(9, image=10))
    coco = opened(
        tmp_path, content, [{"id": 4, "image_id": 1, "caption": 3}, {"id": 5, "image_id": 10, "caption": "x"}]
    )
    assert len(coco) == 3
    names = [f"image {key}" for key in (10, 11, 12, 13, 1, 14, "?")] + ["annotation 9", "caption 4", "caption 5"]
    assert [where for where, _ in coco.skipped] == names
    reasons = dict(coco.skipped)
    assert "has 10 x 12 pixels, not 12 x 10" in reasons["image 12"]
    assert "outside the folder" in reasons["image 13"]
    assert "taken" in reasons["image 1"]
    assert "lacks 'file_name'" in reasons["image 14"]
    assert str(tmp_path) not in str(coco.skipped)


def test_a_picture_that_breaks_off_is_named_when_it_is_decoded(tmp_path: Path, content: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (10, 12, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        opened(tmp_path, content)[0]


def test_files_that_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        Coco(tmp_path / "nowhere", tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json is no readable JSON"):
        Coco(tmp_path, tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="no readable JSON"):
        Coco(tmp_path, tmp_path / "x.json")
    for wrong in ([], {"images": [], "annotations": []}, {**content, "categories": {}}):
        with pytest.raises(ValueError, match="needs the lists images, annotations, categories"):
            opened(tmp_path, wrong)
    with pytest.raises(ValueError, match="an id and a name"):
        opened(tmp_path, {**content, "categories": [{"id": 1}]})
    with pytest.raises(ValueError, match="the same id"):
        opened(tmp_path, {**content, "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]})
    with pytest.raises(ValueError, match=r"no usable picture; the first reasons: \[\('image 8', .*gone"):
        opened(tmp_path, {**content, "images": [{"id": 8, "file_name": "gone.png", "height": 1, "width": 1}]})
    with pytest.raises(ValueError, match=r"size=\(0, 5\)"):
        opened(tmp_path, content, size=(0, 5))
    with pytest.raises(IndexError, match="index=3 is not among the 3"):
        opened(tmp_path, content)[3]
