"""A Perceiver reads an image as a set of pixels: it needs no grid, and loses nothing when the pixels are shuffled.

Set-up: handwritten digits averaged to 14x14 and moved by up to 2 pixels, 4,000 to train on, 1,000 to test on, as they are or
under one fixed permutation of the pixels. The Perceiver (24 latents of 64 channels, 2 readings by 4 heads, 2 blocks after
each, 6 bands) gets each pixel with the position that it came from. A small residual network and a ViT with patches of 2x2 get
the permuted image, with the same Fourier features, of the permuted grid. 600 steps of the recipe, all alike.

Bar, with three seeds: the Perceiver's accuracy is at most 5 points below the residual network's on images as they are, and
differs by at most 1 point between the two conditions; permuted, the residual network loses at least 10 points, and the ViT
loses. With shared weights, 2 readings are not worse than 1 and 4 not worse than 2 by more than 1 point. Sharing saves at
least 40 % of the parameters of 4 readings and costs at most 2 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.claims._recipe import accuracy, epochs, shifted, train
from regard.claims.cbam import resnet
from regard.claims.claim import Budget, Row, mean_row
from regard.models.backbones.perceiver import Block, Perceiver
from regard.ops.positions import fourier_features, grid_coordinates
from regard.worlds.digits import Split, digits

SEEDS = 3
SIDE, BANDS = 14, 6
REACH, RATE = 2, 4e-3
FEATURES = 2 * (2 * BANDS + 1)


def images(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """(n, 1, 14, 14) of zero mean and unit deviation, and the digits."""
    world = digits(split, seed)
    small = F.avg_pool2d(world.pixels.float() / 255, 2)
    return (small - 0.13) / 0.3, world.labels


def shuffle(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(2)[..., order].view_as(x)


class Pixels(nn.Module):
    """A Perceiver on images whose pixels carry the features of the positions that they had before the permutation."""

    def __init__(self, order: Tensor, repeats: int = 2, shared: bool = True) -> None:
        super().__init__()
        sizes = {"dim": 64, "num_heads": 4, "num_latents": 24, "depth": 2, "axes": 0, "repeats": repeats}
        reading = {"cross_heads": 4, "cross_head_dim": 16}
        self.model = Perceiver(1 + FEATURES, 10, shared=shared, **sizes, **reading)
        self.features = fourier_features(grid_coordinates((SIDE, SIDE)), BANDS, float(SIDE))[order]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.model(torch.cat([x, self.features.expand(len(x), -1, -1)], -1))


def with_features(x: Tensor) -> Tensor:
    """The image with the Fourier features of its own grid as further channels."""
    features = fourier_features(grid_coordinates((SIDE, SIDE)), BANDS, float(SIDE)).T.reshape(1, FEATURES, SIDE, SIDE)
    return torch.cat([x, features.expand(len(x), -1, -1, -1)], 1)


class ViT(nn.Module):
    """Patches of 2x2 with the Fourier features of their pixels in the image that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1 + FEATURES, 64, 2, 2)
        self.blocks = nn.Sequential(*(Block(64, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(with_features(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Network(nn.Module):
    """The residual network of three stages, with Fourier features beside the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet(lambda dim: nn.Identity(), 10, channels=1 + FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(with_features(x))


def learned(model: nn.Module, data: tuple[Tensor, ...], order: Tensor, seed: int, steps: int) -> float:
    """Train, and say how many per cent of the test images are right; pixels are shuffled after an image was moved."""
    x, y, test, truth = data
    moved = epochs(x, y, torch.Generator().manual_seed(seed), reach=REACH)
    train(model, ((shuffle(images, order), labels) for images, labels in moved), steps, lr=RATE)
    return accuracy(model, shuffle(test, order), truth)


def run(budget: Budget, seeds: int) -> list[Row]:
    steps, tested = (2, 50) if budget == "smoke" else (600, 1000)
    found: dict[str, list[float]] = {}
    still = torch.arange(SIDE * SIDE)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(5000 + seed)
        order = torch.randperm(SIDE * SIDE, generator=generator)
        test, truth = (t[:tested] for t in images("test", seed))
        data = (*images("train", seed), shifted(test, REACH, generator), truth)
        arms: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
            "perceiver": (partial(Pixels, still), still),
            "perceiver, permuted": (partial(Pixels, order), order),
            "network": (Network, still),
            "network, permuted": (Network, order),
            "vit": (ViT, still),
            "vit, permuted": (ViT, order),
            "1 reading": (partial(Pixels, still, 1), still),
            "4 readings": (partial(Pixels, still, 4), still),
            "4 readings, separate": (partial(Pixels, still, 4, shared=False), still),
        }
        for name, (build, places) in arms.items():
            torch.manual_seed(seed)
            found.setdefault(name, []).append(learned(build(), data, places, seed, steps))
    mean = {name: math.fsum(values) / seeds for name, values in found.items()}
    ours = found["perceiver"]
    apart = [abs(a - b) for a, b in zip(ours, found["perceiver, permuted"])]
    drops = {name: [a - b for a, b in zip(found[name], found[f"{name}, permuted"])] for name in ("network", "vit")}
    sizes = [sum(p.numel() for p in Pixels(still, 4, s).parameters()) for s in (True, False)]
    return [
        mean_row("accuracy, %", ours, mean["network"] - 5, ">=", baseline=mean["network"], note="residual network"),
        Row("difference when permuted, points", math.fsum(apart) / seeds, 1, "<=", values=tuple(apart)),
        mean_row("loss of the residual network when permuted, points", drops["network"], 10, ">="),
        mean_row("loss of the ViT when permuted, points", drops["vit"], 0, ">"),
        mean_row("accuracy of 2 readings, %", ours, mean["1 reading"] - 1, ">=", baseline=mean["1 reading"]),
        mean_row(
            "accuracy of 4 readings, %", found["4 readings"], mean["perceiver"] - 1, ">=", baseline=mean["perceiver"]
        ),
        Row("parameters saved by sharing, %", 100 * (1 - sizes[0] / sizes[1]), 40, ">="),
        mean_row(
            "accuracy of 4 shared readings, %",
            found["4 readings"],
            mean["4 readings, separate"] - 2,
            ">=",
            baseline=mean["4 readings, separate"],
            note="separate readings",
        ),
    ]
