"""A neighbourhood that slides with its query minds a shifted image less than fixed windows do.

Set-up: 48x48 images with noise and one of six shapes, about 14 pixels wide, in a random colour, to be told apart. In
training its centre lies on a coarse grid, 8 pixels apart; it is tested there and moved by 1 to 6 pixels along both
axes. A small NAT (widths 24 and 48, two blocks each at 12x12 and 6x6 tokens, kernels of 3) and the same network with
attention in windows of 3, shifted by 1 in every second block, as in Swin: the same stem, MLPs, biases and number of
parameters. 1,500 images to train on, 15 epochs; 600 to test on at every shift.

Bar, with three seeds: the accuracy lost by moving, averaged over the shifts, is at least 2 points smaller for the
neighbourhood.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.claims.claim import Budget, Row, mean_row
from regard.claims.hilo import accuracy, fit
from regard.models.backbones.flatten import ShiftedWindowAttention
from regard.models.backbones.nat import NAT

SEEDS = 3
SIDE, SHAPES = 48, 6


def drawn(shape: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Which pixels belong to the shape, from their offsets (b, 48, 48) to its centre."""
    a, b, r = y.abs(), x.abs(), (y**2 + x**2).sqrt()
    masks = (
        r <= 7,  # disc
        (r <= 7) & (r >= 4),  # ring
        torch.maximum(a, b) <= 6,  # square
        (torch.maximum(a, b) <= 6) & (torch.minimum(a, b) <= 2),  # plus
        (torch.maximum(a, b) <= 6) & ((a - b).abs() <= 2),  # cross
        a + b <= 8,  # diamond
    )
    return torch.stack(masks, 1)[torch.arange(len(shape)), shape]


def images(count: int, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 48, 48) whose shape is off the grid by ``shift`` pixels along both axes, and the shapes."""

    def choose(of: int, *shape: int) -> Tensor:
        return torch.randint(of, (count, *shape), generator=generator)

    shape, centre = choose(SHAPES), 12 + 8 * choose(4, 2) + shift * (2 * choose(2, 2) - 1)
    axis = torch.arange(SIDE)
    y, x = (axis - centre[:, i, None] for i in range(2))
    mask = drawn(shape, y[:, :, None].expand(-1, -1, SIDE).double(), x[:, None].expand(-1, SIDE, -1).double())
    colour = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.5 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return noise + colour * mask[:, None], shape


def network(*, windows: bool) -> NAT:
    """The small NAT, or the same with attention in windows, shifted in every second block."""
    model = NAT(24, (2, 4), 3, depths=(2, 2), mlp_ratio=2, drop_path=0.0, num_classes=SHAPES)
    if windows:
        for level in model.levels:
            for number, block in enumerate(level.blocks):
                block.attn = ShiftedWindowAttention(block.attn.dim, block.attn.num_heads, 3, number % 2)
    return model


def run(budget: Budget, seeds: int) -> list[Row]:
    count, tested, epochs, shifts = (16, 16, 1, (1,)) if budget == "smoke" else (1500, 600, 15, (1, 2, 3, 4, 5, 6))
    found: dict[str, list[float]] = {"neighbourhood": [], "windows": []}
    still: dict[str, list[float]] = {"neighbourhood": [], "windows": []}
    for seed in range(seeds):
        world = torch.Generator().manual_seed(3000 + seed)
        train, test = images(count, 0, world), images(tested, 0, world)
        moved = [images(tested, shift, world) for shift in shifts]
        for name in found:
            torch.manual_seed(seed)
            model = network(windows=name == "windows")
            fit(model, *train, epochs, torch.Generator().manual_seed(seed), rate=2e-3)
            still[name].append(accuracy(model, *test))
            found[name].append(still[name][-1] - sum(accuracy(model, *one) for one in moved) / len(moved))
    less = [b - a for a, b in zip(found["neighbourhood"], found["windows"])]
    mean = {name: sum(values) / seeds for name, values in found.items()}
    at_rest = {name: sum(values) / seeds for name, values in still.items()}
    ratio = sum(p.numel() for p in network(windows=False).parameters()) / sum(
        p.numel() for p in network(windows=True).parameters()
    )
    return [
        mean_row("points lost by moving, fewer than with windows", less, 2.0, ">="),
        Row(
            "points lost by moving",
            mean["neighbourhood"],
            baseline=mean["windows"],
            values=tuple(found["neighbourhood"]),
        ),
        Row("accuracy on the grid, %", at_rest["neighbourhood"], baseline=at_rest["windows"]),
        Row("parameters over those with windows", ratio, 1.0, "=="),
    ]
