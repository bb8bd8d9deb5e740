"""Windows see detail, grids see far; a block of both compares what lies far apart and needs neither to be larger.

Set-up: 64x64 images with noise and two small shapes, each a plus or a ring, in opposite corners, to be told alike or
different. Two convolutions of stride 2 make 16x16 tokens of width 32; then come two pairs of attentions in parts of 4x4 tokens:
a block and a grid (MaxViT), two blocks, or two grids, with the same number of parameters. The convolutional half of a
MaxViT block is left out, because its channel gates see the whole map. 2,000 images to train on, 1,000 to test on, 12 epochs.

Bar, with three seeds: both together are at least 5 points above blocks alone and at most half a point below grids
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.claims.claim import Budget, Row, mean_row
from regard.claims.hilo import accuracy, fit
from regard.layers.vision.maxvit import BlockAttention, GridAttention, PartitionAttention
from regard.models.backbones._pyramid import channels_last

SEEDS = 3
SIDE = 64
ARMS: dict[str, tuple[type[PartitionAttention], type[PartitionAttention]]] = {
    "both": (BlockAttention, GridAttention),
    "blocks": (BlockAttention, BlockAttention),
    "grids": (GridAttention, GridAttention),
}


def stamps() -> Tensor:
    """The shapes, (2, 11, 11): plus, ring."""
    axis = torch.arange(11) - 5
    a, b = axis[:, None].abs().expand(11, 11), axis.abs().expand(11, 11)
    r = (a**2 + b**2).double().sqrt()
    return torch.stack([torch.minimum(a, b) <= 1, (r <= 5.2) & (r >= 3)]).float()


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 64, 64) and whether their two shapes are alike."""

    def choose(of: int, *shape: int) -> Tensor:
        return torch.randint(of, (count, *shape), generator=generator)

    alike, first, flip = choose(2), choose(2), choose(2)
    second = torch.where(alike == 1, first, 1 - first)
    image = 0.2 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    shapes, jitter = stamps(), choose(12, 4)
    for i in range(count):
        left = [int(jitter[i, 0]), int(jitter[i, 1])]
        right = [SIDE - 11 - int(jitter[i, 2]), SIDE - 11 - int(jitter[i, 3])]
        if flip[i]:
            left[1], right[1] = SIDE - 11 - left[1], SIDE - 11 - right[1]
        for (y, x), shape in ((left, first[i]), (right, second[i])):
            image[i, :, y : y + 11, x : x + 11] += shapes[shape]
    return image, alike


class Classifier(nn.Module):
    """Two convolutions, the given attentions on maps, the mean over the tokens."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        )
        self.blocks, self.norm, self.head = nn.Sequential(*attentions), nn.LayerNorm(32), nn.Linear(32, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(channels_last(self.stem(image)))).mean((1, 2)))


def network(arm: str) -> Classifier:
    return Classifier(*(kind(32, 2, 4, mlp_ratio=2) for _ in range(2) for kind in ARMS[arm]))


def run(budget: Budget, seeds: int) -> list[Row]:
    count, tested, epochs = (16, 16, 1) if budget == "smoke" else (2000, 1000, 12)
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        world = torch.Generator().manual_seed(5000 + seed)
        train, test = pairs(count, world), pairs(tested, world)
        for name, values in found.items():
            torch.manual_seed(seed)
            model = network(name)
            fit(model, *train, epochs, torch.Generator().manual_seed(seed), rate=4e-3)
            values.append(accuracy(model, *test))
    mean = {name: sum(values) / seeds for name, values in found.items()}
    return [
        mean_row("accuracy, %", found["both"], mean["blocks"] + 5, ">=", baseline=mean["blocks"], note="blocks alone"),
        mean_row("accuracy, %", found["both"], mean["grids"] - 0.5, ">=", baseline=mean["grids"], note="grids alone"),
    ]
