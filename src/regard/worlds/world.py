"""What every world is: a numbered set of samples, each made from seed, split and number and from nothing else."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import numpy as np
from torch import Tensor

Sample = TypeVar("Sample")
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class World(ABC, Generic[Sample]):
    """``world[i]`` is the same sample on every machine, in any order, in any process; nothing is stored.

    A world is a frozen dataclass: its fields are all that it depends on, ``dataclasses.replace(world, split="test")`` is
    another one. It serves as a map-style dataset: ``DataLoader(world, collate_fn=list)``. Images are float32 (3, h, w)
    in [0, 1], boxes (x0, y0, x1, y1) in pixels with the far edge excluded, masks boolean.

    Args:
        seed: another seed gives other samples.
        split: splits share the seed and, but for chance where there are few samples to draw, no sample.
        count: how many samples there are.

    Raises:
        ValueError: an unknown split, a negative seed, fewer than one sample.
    """

    seed: int = 0
    split: Split = "train"
    count: int = field(default=10_000, repr=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} must be one of {', '.join(map(repr, SPLITS))}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.count < 1:
            raise ValueError(f"count={self.count} must be 1 or more")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"index={index} is not among the {self.count} samples")
        return self.make(self.rng(index))

    def rng(self, index: int) -> np.random.Generator:
        """The random numbers of one sample; they do not depend on the world's other fields."""
        name = zlib.crc32(type(self).__name__.encode())
        return np.random.default_rng([name, SPLITS.index(self.split), self.seed, index])

    @abstractmethod
    def make(self, rng: np.random.Generator) -> Sample:
        """One sample from these random numbers."""

    @abstractmethod
    def panels(self, sample: Sample) -> dict[str, Tensor | str]:
        """What a reader should see of a sample: titled images (3, h, w) in [0, 1], or texts."""
