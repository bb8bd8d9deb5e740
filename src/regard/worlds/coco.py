"""The user's own pictures with COCO annotation files: boxes, masks, categories, captions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from regard.worlds.shapes.show import paint


@dataclass(frozen=True, eq=False)
class CocoSample:
    """One picture and what is annotated in it.

    Args:
        image: (3, h, w) in [0, 1].
        labels: places in the file's ``categories``.
        boxes: (x0, y0, x1, y1) as annotated, cut at the edge of the picture.
        visible: mask of each thing; its box, where the file has nothing finer.
        crowd: whether an annotation is a crowd and not one thing.
        captions: sentences about the picture.
        name: the picture's file.
    """

    image: Float[Tensor, "3 h w"]
    labels: Int[Tensor, "n"]
    boxes: Float[Tensor, "n 4"]
    visible: Bool[Tensor, "n h w"]
    crowd: Bool[Tensor, "n"]
    captions: tuple[str, ...]
    name: str


def unpack(text: str) -> list[int]:
    """The run lengths in a compressed COCO string: five bits a letter, low ones first, from the fourth run on as differences
    to the run two before.

    Raises:
        ValueError: a letter outside the alphabet, or a string that breaks off.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        x = ord(letter) - 48
        if not 0 <= x < 64:
            raise ValueError(f"letter {letter!r} in compressed run lengths")
        value |= (x & 31) << shift
        shift += 5
        if not x & 32:
            value -= (x & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths break off")
    return runs


def from_runs(runs: list[int], size: tuple[int, int]) -> Bool[ndarray, "h w"]:
    """The mask of run lengths down the columns, beginning with zeros.

    Raises:
        ValueError: runs that are negative or do not fill the picture.
    """
    if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise ValueError(f"run lengths do not fill {size[0]} x {size[1]} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def from_polygons(polygons: list[list[int | float]], size: tuple[int, int]) -> Bool[ndarray, "h w"]:
    """Pixels whose centre lies in one of the polygons (x, y, x, y, ...).

    Raises:
        ValueError: fewer than three corners, half a corner, numbers that are not finite.
    """
    from skimage.draw import polygon

    mask = np.zeros(size, bool)
    for corners in polygons:
        if not isinstance(corners, list) or len(corners) < 6 or len(corners) % 2 or not _finite(corners):
            raise ValueError("polygons must be lists of x, y of three corners or more")
        x, y = np.array(corners).reshape(-1, 2).T - 0.5
        mask[polygon(y, x, size)] = True
    return mask


def _finite(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


@dataclass
class _Entry:
    path: Path
    size: tuple[int, int]
    things: list[_Thing] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


@dataclass
class _Thing:
    label: int
    box: list[int | float]
    outline: Any
    crowd: bool

    def mask(self, size: tuple[int, int]) -> Bool[ndarray, "h w"]:
        """The mask in a picture of this size; raises ValueError where the outline makes none."""
        if isinstance(self.outline, dict):
            runs = self.outline["counts"]
            if self.outline["size"] != list(size):
                raise ValueError(f"mask of size {self.outline['size']} in a picture of {list(size)}")
            return from_runs(unpack(runs) if isinstance(runs, str) else runs, size)
        if self.outline:
            return from_polygons(self.outline, size)
        x0, y0, x1, y1 = self.box
        return from_polygons([[x0, y0, x1, y0, x1, y1, x0, y1]], size)


class Coco:
    """Pictures in ``root`` as annotated in a COCO file of instances, and in one of captions where there is one.

    Everything but the pixels is checked when the files are opened: a picture or an annotation that cannot be used is left out
    and listed in ``skipped`` with the reason. ``coco[i]`` decodes a picture.

    Args:
        root: the folder of the pictures.
        instances: the JSON file with ``images``, ``annotations`` and ``categories``.
        captions: a JSON file with captions of the same pictures.
        size: height and width to which pictures, boxes and masks are brought; their own where it is ``None``.

    Raises:
        ValueError: ``root`` is no folder, a file that is no such JSON, unusable categories, no usable picture, a ``size`` that
            is not positive.

    Differs:
        a pixel belongs to a polygon when its centre does; COCO's own tools draw on a grid five times finer, which differs along
        the outline.
    """

    def __init__(
        self,
        root: str | Path,
        instances: str | Path,
        captions: str | Path | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.root, self.size = Path(root), size
        if size is not None and min(size) < 1:
            raise ValueError(f"size={size} must be positive")
        if not self.root.is_dir():
            raise ValueError(f"root={str(root)!r} is not a folder")
        content = _read(instances, "images", "annotations", "categories")
        told = _read(captions, "annotations")["annotations"] if captions is not None else []
        try:
            self._names = {row["id"]: str(row["name"]) for row in content["categories"]}
        except (KeyError, TypeError):
            raise ValueError(f"{instances}: every category needs an id and a name") from None
        if len(self._names) != len(content["categories"]):
            raise ValueError(f"{instances}: two categories have the same id")
        self.classes = tuple(self._names.values())
        self.skipped: list[tuple[str, str]] = []
        self._entries: dict[Any, _Entry] = {}
        for row in content["images"]:
            with self._skipping("image", row):
                self._add_picture(row)
        for row in content["annotations"]:
            with self._skipping("annotation", row):
                self._add_thing(row)
        for row in told:
            with self._skipping("caption", row):
                if not isinstance(row["caption"], str) or not row["caption"].strip():
                    raise ValueError("is empty or no text")
                self._entry(row).captions.append(row["caption"].strip())
        if not self._entries:
            raise ValueError(f"{instances} has no usable picture; the first reasons: {self.skipped[:3]}")
        self._order = list(self._entries.values())

    @contextmanager
    def _skipping(self, kind: str, row: Any) -> Iterator[None]:
        """Lists ``row`` in ``skipped`` where it cannot be used."""
        try:
            yield
        except (KeyError, TypeError, ValueError, OSError) as error:
            where = f"{kind} {row.get('id', '?') if isinstance(row, dict) else '?'}"
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            self.skipped.append((where, reason.replace(str(self.root), ".")))

    def _entry(self, row: dict[str, Any]) -> _Entry:
        if row["image_id"] not in self._entries:
            raise ValueError(f"image_id={row['image_id']!r} is no usable picture")
        return self._entries[row["image_id"]]

    def _add_picture(self, row: dict[str, Any]) -> None:
        from PIL import Image

        path, size = self.root / row["file_name"], (row["height"], row["width"])
        if Path(row["file_name"]).is_absolute() or ".." in Path(row["file_name"]).parts:
            raise ValueError(f"file_name={row['file_name']!r} lies outside the folder")
        if row["id"] in self._entries:
            raise ValueError("its id is taken")
        with Image.open(path) as file:
            if (file.height, file.width) != size:
                raise ValueError(
                    f"{row['file_name']} has {file.height} x {file.width} pixels, not {size[0]} x {size[1]}"
                )
        self._entries[row["id"]] = _Entry(path, size)

    def _add_thing(self, row: dict[str, Any]) -> None:
        entry, box = self._entry(row), row["bbox"]
        if row["category_id"] not in self._names:
            raise ValueError(f"category_id={row['category_id']!r} is unknown")
        if len(box) != 4 or not _finite(box):
            raise ValueError(f"bbox={box} must be four finite numbers")
        (h, w), (x, y, width, height) = entry.size, box
        corners = [max(0, x), max(0, y), min(w, x + width), min(h, y + height)]
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise ValueError(f"bbox={box} is empty or outside the picture of {h} x {w} pixels")
        label = list(self._names).index(row["category_id"])
        thing = _Thing(label, corners, row.get("segmentation"), bool(row.get("iscrowd", 0)))
        if not thing.mask(entry.size).any() and thing.outline:
            raise ValueError("its mask is empty")
        entry.things.append(thing)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> CocoSample:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is not among the {len(self)} pictures")
        entry = self._order[index]
        n = len(entry.things)
        image = _decode(entry.path)
        boxes = torch.tensor([thing.box for thing in entry.things], dtype=torch.float32).reshape(n, 4)
        masks = np.stack([thing.mask(entry.size) for thing in entry.things]) if n else np.zeros((0, *entry.size), bool)
        visible = torch.from_numpy(masks)
        if self.size is not None and self.size != entry.size:
            (h, w), (height, width) = self.size, entry.size
            image = F.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0].clamp(0, 1)
            rows, columns = ((torch.arange(new) + 0.5) * old / new for new, old in ((h, height), (w, width)))
            visible = visible[:, rows.long()][:, :, columns.long()]
            boxes = boxes * torch.tensor([w / width, h / height, w / width, h / height])
        return CocoSample(
            image,
            torch.tensor([thing.label for thing in entry.things], dtype=torch.int64),
            boxes,
            visible,
            torch.tensor([thing.crowd for thing in entry.things], dtype=torch.bool),
            tuple(entry.captions),
            entry.path.name,
        )

    def panels(self, sample: CocoSample) -> dict[str, Tensor | str]:
        """The picture, its things and its captions."""
        numbers = torch.arange(1, len(sample.labels) + 1).view(-1, 1, 1)
        index = (sample.visible * numbers).amax(0) if len(numbers) else torch.zeros(sample.image.shape[1:]).long()
        words = ", ".join(self.classes[label] for label in sample.labels.tolist())
        return {
            "image": sample.image,
            "things": paint(index),
            "classes": words,
            "captions": "\n".join(sample.captions),
        }


def _read(path: str | Path, *keys: str) -> dict[str, list[Any]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{path} is no COCO file: it needs the lists {', '.join(keys)}")
    return content


def _decode(path: Path) -> Float[Tensor, "3 h w"]:
    from PIL import Image

    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
