"""The user's own images: one folder a class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from regard.worlds.images import Images, statistics, stratified

SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])


def _decode(path: Path, size: int) -> Tensor:
    """The image as (3, size, size) bytes: upright, shorter side scaled to ``size``, centre cut out."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    ratio = size / min(image.size)
    width, height = (max(size, round(side * ratio)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Folder:
    """Images in ``root/CLASS/**``, the class being the name of the first folder.

    Every file is decoded once when the folder is opened, so that a broken one is known before anything is trained: it is
    left out and listed in ``skipped``. What fits ``cache_bytes`` stays in memory, else a file is decoded again whenever a
    batch needs it.

    Args:
        root: the folder that holds one folder a class.
        size: side in pixels; the shorter side of an image is scaled to it and the centre is cut out.
        cache_bytes: how much may be kept in memory, in bytes.

    Raises:
        ValueError: not a folder, no images, one class, a class with fewer than two readable images, a ``size`` below 1.
    """

    def __init__(self, root: str | Path, size: int = 64, *, cache_bytes: int = 2**30) -> None:
        self.root, self.size = Path(root), size
        if size < 1:
            raise ValueError(f"size={size} must be a positive number of pixels")
        if not self.root.is_dir():
            raise ValueError(f"data={str(root)!r} is not a folder")
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if {p.name for p in folders} in ({"train", "test"}, {"train", "val"}, {"train", "val", "test"}):
            raise ValueError(f"{self.root} holds the splits {[p.name for p in folders]}, not classes; give one of them")
        files = {
            f.name: sorted(p for p in f.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()) for f in folders
        }
        found = [(path, name) for name, paths in files.items() for path in paths]
        if not found:
            raise ValueError(
                f"{self.root} holds no images; expected {self.root}/CLASS/IMAGE with {' '.join(sorted(SUFFIXES))}"
            )

        keep = len(found) * 3 * size * size <= cache_bytes
        self.skipped: list[tuple[str, str]] = []
        self.paths: list[Path] = []
        pixels: list[Tensor] = []
        names: list[str] = []
        with ThreadPoolExecutor() as pool:
            for (path, name), image in zip(found, pool.map(self._try, [path for path, _ in found])):
                if isinstance(image, str):
                    self.skipped.append((str(path.relative_to(self.root)), image))
                    continue
                self.paths.append(path)
                names.append(name)
                if keep:
                    pixels.append(image)
        counts = {name: names.count(name) for name, paths in files.items() if paths}
        broken = f"; {len(self.skipped)} files could not be read" if self.skipped else ""
        if few := [f"{name} ({n})" for name, n in counts.items() if n < 2]:
            raise ValueError(f"every class needs two readable images or more; too few in {', '.join(few)}{broken}")
        if len(counts) < 2:
            raise ValueError(f"{self.root} holds one class, {', '.join(counts)}; at least two are needed")
        self.classes = tuple(counts)
        self.labels = torch.tensor([self.classes.index(name) for name in names])
        self._pixels = torch.stack(pixels) if keep else None

    def _try(self, path: Path) -> Tensor | str:
        try:
            return _decode(path, self.size)
        except Exception as error:  # decoders raise anything on broken files, from OSError to struct.error
            return f"{type(error).__name__}: {error}".replace(str(self.root), ".")

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, index: Tensor) -> Tensor:
        """The images at ``index`` as bytes (b, 3, size, size)."""
        if self._pixels is not None:
            return self._pixels[index]
        return torch.stack([_decode(self.paths[i], self.size) for i in index.tolist()])

    def split(self, seed: int = 0, test: float = 0.2) -> tuple[Images, Images]:
        """Training and test images in memory, the share ``test`` of each class being held out; the same for the same seed."""
        index = stratified(self.labels, test, seed)
        pixels = [self.decode(side) for side in index]
        mean, std = statistics(pixels[0])
        train, held = (Images(p, self.labels[side], self.classes, mean, std) for p, side in zip(pixels, index))
        return train, held
