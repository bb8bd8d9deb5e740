"""Windows see detail, grids see far; a block of both compares what lies far apart and needs neither to be larger.

Set-up: 64x64 images with noise and two of four small shapes in opposite corners, to be told alike or different. A
stem and one level of two blocks of width 32 on 16x16 tokens, windows and grids of 4x4 tokens. Compared: a block and a
grid in each block of the network (MaxViT), two blocks, two grids, with the same number of parameters. The channel
gates of the convolutions, which see the whole map, are held open in all three, so that only attention can carry what
is compared. 3,000 images to train on, 1,000 to test on, 12 epochs.

Bar, with three seeds: both together are at least 5 points above blocks alone and at most half a point below grids
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.claims.claim import Budget, Row, mean_row
from regard.claims.hilo import accuracy, fit
from regard.layers.vision.maxvit import BlockAttention, GridAttention, PartitionAttention
from regard.models.backbones.maxvit import MaxViT

SEEDS = 3
SIDE = 64
ARMS: dict[str, tuple[type[PartitionAttention], type[PartitionAttention]]] = {
    "both": (BlockAttention, GridAttention),
    "blocks": (BlockAttention, BlockAttention),
    "grids": (GridAttention, GridAttention),
}


def stamps() -> Tensor:
    """The four shapes, (4, 11, 11): square, plus, cross, ring."""
    axis = torch.arange(11) - 5
    a, b = axis[:, None].abs().expand(11, 11), axis.abs().expand(11, 11)
    r = (a**2 + b**2).double().sqrt()
    return torch.stack(
        [torch.maximum(a, b) <= 3, torch.minimum(a, b) <= 1, (a - b).abs() <= 1, (r <= 5.2) & (r >= 3)]
    ).float()


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 64, 64) and whether their two shapes are alike."""

    def choose(of: int, *shape: int) -> Tensor:
        return torch.randint(of, (count, *shape), generator=generator)

    alike, first, flip = choose(2), choose(4), choose(2)
    second = torch.where(alike == 1, first, (first + 1 + choose(3)) % 4)
    image = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    shapes, jitter = stamps(), choose(12, 4)
    for i in range(count):
        left = [int(jitter[i, 0]), int(jitter[i, 1])]
        right = [SIDE - 11 - int(jitter[i, 2]), SIDE - 11 - int(jitter[i, 3])]
        if flip[i]:
            left[1], right[1] = SIDE - 11 - left[1], SIDE - 11 - right[1]
        for (y, x), shape in ((left, first[i]), (right, second[i])):
            image[i, :, y : y + 11, x : x + 11] += shapes[shape]
    return image, alike


class Open(nn.Module):
    """A channel gate that lets everything through."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def network(arm: str) -> MaxViT:
    model = MaxViT((32,), 16, 4, depths=(2,), stem=16, drop_path=0.0, num_classes=2)
    first, second = ARMS[arm]
    stage: Any = model.stages[0]
    for block in stage.blocks:
        block.conv.se = Open()
        block.attn_block = first(32, 2, 4, approximate="tanh")
        block.attn_grid = second(32, 2, 4, approximate="tanh")
    return model


def run(budget: Budget, seeds: int) -> list[Row]:
    count, tested, epochs = (16, 16, 1) if budget == "smoke" else (3000, 1000, 12)
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        world = torch.Generator().manual_seed(5000 + seed)
        train, test = pairs(count, world), pairs(tested, world)
        for name, values in found.items():
            torch.manual_seed(seed)
            model = network(name)
            fit(model, *train, epochs, torch.Generator().manual_seed(seed), rate=2e-3)
            values.append(accuracy(model, *test))
    mean = {name: sum(values) / seeds for name, values in found.items()}
    return [
        mean_row("accuracy, %", found["both"], mean["blocks"] + 5, ">=", baseline=mean["blocks"], note="blocks alone"),
        mean_row("accuracy, %", found["both"], mean["grids"] - 0.5, ">=", baseline=mean["grids"], note="grids alone"),
    ]
