"""Labelled images in memory, normalised when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Pixels (n, c, h, w) as unsigned bytes, labels (n,), and the mean and deviation of each channel, in bytes."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        c, h, w = self.pixels.shape[1:]
        return c, h, w

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images (b, c, h, w) as float32 with zero mean and unit deviation over the training data, and their labels (b,)."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (self.pixels[index].float() - mean) / std, self.labels[index]


def statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of (n, c, h, w) bytes; a constant channel has deviation 1.

    Sums of whole numbers, so that the result is the same to the last bit however many threads there are.
    """
    channels = pixels.transpose(0, 1).flatten(1).long()
    n = channels.shape[1]
    sums, squares = channels.sum(1).tolist(), (channels * channels).sum(1).tolist()
    variances = [(n * square - total * total) / (n * n) for total, square in zip(sums, squares)]
    return tuple(total / n for total in sums), tuple(math.sqrt(v) if v else 1.0 for v in variances)


def stratified(labels: Tensor, test: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices for training and testing: the share ``test`` of each class, at least one image of it on either side.

    Raises:
        ValueError: a class with a single image, or a share outside (0, 1).
    """
    if not 0.0 < test < 1.0:
        raise ValueError(f"test={test} must lie between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            raise ValueError(
                f"class {label} has one image; at least two are needed, one to train on and one to test on"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        held = min(max(1, round(test * len(members))), len(members) - 1)
        sides[0].append(members[held:])
        sides[1].append(members[:held])
    train, tested = (torch.cat(side).sort().values for side in sides)
    return train, tested


def pack(train: Images, test: Images) -> bytes:
    """Both splits as the bytes of one safetensors file; :func:`load` is the inverse."""
    tensors = {
        f"{name}.{key}": getattr(s, key)
        for name, s in (("train", train), ("test", test))
        for key in ("pixels", "labels")
    }
    facts: dict[str, Sequence[object]] = {"classes": train.classes, "mean": train.mean, "std": train.std}
    return save({key: value.contiguous() for key, value in tensors.items()}, {"images": json.dumps(facts)})


def load(path: str | Path) -> tuple[Images, Images]:
    """Training and test images from a file written with :func:`pack`; the pixels stay on disk until they are read."""
    with safe_open(str(path), "pt") as file:
        facts = {key: tuple(value) for key, value in json.loads(file.metadata()["images"]).items()}
        splits = [
            Images(file.get_tensor(f"{s}.pixels"), file.get_tensor(f"{s}.labels"), **facts) for s in ("train", "test")
        ]
    return splits[0], splits[1]
