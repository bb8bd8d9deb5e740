"""A neighbourhood that slides with its query minds a shifted image less than fixed windows do.

Set-up: 20x20 images with noise and one of six shapes, 9 pixels wide, in a random colour, to be told apart. In training its
centre lies on a coarse grid, at pixels 7 and 12 of either axis; it is tested there and moved by 1 to 6 pixels along both.
A token for every pixel, so that moving pixels moves tokens: a 3x3 convolution and two blocks of width 24, with
neighbourhoods of 5x5, or with windows of 5x5 that are shifted by 2 in the second block, as in Swin; all else, biases and
number of parameters included, is the same. 1,000 images to train on, 10 epochs; 500 to test on at every shift. (Behind
stems of stride 4 both lost two thirds of the images to the stem's own grid.)

Bar, with three seeds: the accuracy lost by moving, averaged over the shifts, is at least 2 points smaller for the neighbourhood.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.claims.claim import Budget, Row, mean_row
from regard.claims.hilo import accuracy, fit
from regard.layers.vision.nat import NeighborhoodAttention
from regard.models.backbones._pyramid import Block, channels_last
from regard.models.backbones.flatten import ShiftedWindowAttention
from regard.nn.blocks import MLP

SEEDS = 3
SIDE, SHAPES, DIM, HEADS, REACH = 20, 6, 24, 2, 5


def drawn(shape: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Which pixels belong to the shape, from their offsets (b, 20, 20) to its centre."""
    a, b, r = y.abs(), x.abs(), (y**2 + x**2).sqrt()
    masks = (
        r <= 4.2,  # disc
        (r <= 4.2) & (r >= 2.5),  # ring
        torch.maximum(a, b) <= 3,  # square
        (torch.maximum(a, b) <= 4) & (torch.minimum(a, b) <= 1),  # plus
        (torch.maximum(a, b) <= 4) & ((a - b).abs() <= 1),  # cross
        a + b <= 4,  # diamond
    )
    return torch.stack(masks, 1)[torch.arange(len(shape)), shape]


def images(count: int, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 20, 20) whose shape is off the grid by ``shift`` pixels towards the middle, and the shapes."""
    shape = torch.randint(SHAPES, (count,), generator=generator)
    far = torch.randint(2, (count, 2), generator=generator)
    centre = 7 + 5 * far + shift * (1 - 2 * far)
    axis = torch.arange(SIDE)
    y, x = (axis - centre[:, i, None] for i in range(2))
    mask = drawn(shape, y[:, :, None].expand(-1, -1, SIDE).double(), x[:, None].expand(-1, SIDE, -1).double())
    colour = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.2 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return noise + colour * mask[:, None], shape


class Classifier(nn.Module):
    """A convolution, one block for every mixer, the mean over the tokens."""

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, DIM, 3, padding=1), nn.LayerNorm(DIM), nn.Linear(DIM, SHAPES)
        self.blocks = nn.Sequential(*(Block(DIM, mixer, MLP(DIM, 2 * DIM)) for mixer in mixers))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(channels_last(self.stem(image)))).mean((1, 2)))


def network(*, windows: bool) -> Classifier:
    if windows:
        return Classifier(*(ShiftedWindowAttention(DIM, HEADS, REACH, shift) for shift in (0, REACH // 2)))
    return Classifier(*(NeighborhoodAttention(DIM, HEADS, REACH) for _ in range(2)))


def run(budget: Budget, seeds: int) -> list[Row]:
    count, tested, epochs, shifts = (16, 16, 1, (1,)) if budget == "smoke" else (1000, 500, 10, (1, 2, 3, 4, 5, 6))
    found: dict[str, list[float]] = {"neighbourhood": [], "windows": []}
    still: dict[str, list[float]] = {"neighbourhood": [], "windows": []}
    for seed in range(seeds):
        world = torch.Generator().manual_seed(3000 + seed)
        train, test = images(count, 0, world), images(tested, 0, world)
        moved = [images(tested, shift, world) for shift in shifts]
        for name in found:
            torch.manual_seed(seed)
            model = network(windows=name == "windows")
            fit(model, *train, epochs, torch.Generator().manual_seed(seed), rate=6e-3)
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
