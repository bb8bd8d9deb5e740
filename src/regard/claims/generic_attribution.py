"""Gradient-weighted relevance finds the object better than rollout does.

Set-up: images of 28x56 pixels with a handwritten digit in one half and, in the other, a digit whose quarters changed places;
both in bright ink on fainter clutter. The class is that of the whole digit, its strokes are the object. A vision transformer
of six layers, four heads and 64 channels on patches of 7x7, 1,000 steps of the recipe on 4,000 digits, painted anew in every
batch. On 500 test images the map of the predicted class is brought to image size and cut at its mean; intersection over
union of object and of background, each summed over the set, averaged. Compared: rollout from the second layer on, the class
row of the last layer's attention.

Bar, with three seeds: the mean intersection over union is above that of rollout. Reported besides: raw attention. Of four
worlds tried on another seed relevance was ahead of rollout in three (0.642 to 0.594 on shapes and 0.414 to 0.392 on coloured
digits, hardly learned; 0.502 to 0.477 here) and behind on grey digits (0.498 to 0.506).

Not run yet: that it lies within 0.02 of transformer attribution, which needs that method; masks from the queries of a
small detector against raw cross-attention (+ 0.05); removing image tokens of a small question answerer (area under
the curve at least 3 points below raw attention).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from regard.claims._recipe import BATCH, accuracy, shifted, train
from regard.claims.attention_flow import Block
from regard.claims.cbam import clutter
from regard.claims.claim import Budget, Row, mean_row
from regard.core.capture import Capture
from regard.core.explain import explain, readout
from regard.core.tokens import tokens
from regard.worlds.digits import digits
from regard.worlds.images import Images

SEEDS = 3
SIDE, PATCH = 28, 7
GRID = (SIDE // PATCH, 2 * SIDE // PATCH)


class ViT(nn.Module):
    """Patches behind a class token; its positions begin as large as what they are added to: smaller ones slow it down."""

    def __init__(self, layers: int = 6, dim: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 1 + GRID[0] * GRID[1], dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))
        tokens(self, q=f"cls + image[{GRID[0]},{GRID[1]}]")

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions)[:, 0])


def scenes(world: Images, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (b, 1, 28, 56), classes, and masks (b, 28, 56) of the digits that are whole."""
    b = len(index)
    others = torch.randint(len(world), (b,), generator=generator)
    whole = shifted(world.pixels[index], 2, generator) > 100
    parts = shifted(world.pixels[others].roll((SIDE // 2, SIDE // 2), (2, 3)), 2, generator) > 100
    left, nothing = torch.rand(b, 1, 1, 1, generator=generator) < 0.5, torch.zeros_like(whole)

    def beside(other: Tensor) -> Tensor:
        return torch.where(left, torch.cat([whole, other], 3), torch.cat([other, whole], 3))

    ground = 0.5 * torch.cat([clutter(b, SIDE, generator)[:, :1] for _ in range(2)], 3)
    ink = 1.5 + 0.3 * torch.randn(ground.shape, generator=generator)
    return torch.where(beside(parts), ink, ground), world.labels[index], beside(nothing)[:, 0]


def batches(world: Images, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield scenes(world, torch.randint(len(world), (BATCH,), generator=generator), generator)[:2]


class RawAttention:
    """Where the class token looks in the last layer, mean over heads."""

    needs = frozenset({"weights"})

    def explain(self, evidence: Capture) -> Tensor:
        call = evidence.sequence()[-1]
        return torch.einsum("bl,bls->bs", readout(call), call.weights().mean(1))


def mean_iou(maps: Tensor, masks: Tensor) -> float:
    """Maps (b, H, W) cut at their mean against masks: intersection over union of object and background, over the whole set."""
    found = maps > maps.mean((1, 2), keepdim=True)
    parts = [(f & m).sum() / (f | m).sum() for f, m in ((found, masks), (~found, ~masks))]
    return float(sum(parts) / 2)


def run(budget: Budget, seeds: int) -> list[Row]:
    steps, tested = (2, 16) if budget == "smoke" else (1000, 500)
    found: dict[str, list[float]] = {"relevance": [], "rollout": [], "raw": []}
    right = []
    for seed in range(seeds):
        world = torch.Generator().manual_seed(1000 + seed)
        torch.manual_seed(seed)
        model = ViT()
        train(model, batches(digits("train", seed), world), steps, lr=3e-3)
        unseen = digits("test", seed)
        test, truth, masks = scenes(unseen, torch.randperm(len(unseen), generator=world)[:tested], world)
        right.append(accuracy(model, test, truth))
        maps = {
            "relevance": explain(model, test, "generic-attribution"),
            "rollout": explain(model, test, "attention-flow-rollout", start_layer=1),
            "raw": explain(model, test, RawAttention()),
        }
        for name, one in maps.items():
            found[name].append(mean_iou(one.upsample((SIDE, 2 * SIDE)).values, masks))
    rollout, raw = (sum(found[name]) / seeds for name in ("rollout", "raw"))
    return [
        mean_row("mean intersection over union", found["relevance"], rollout, ">", baseline=rollout, note="rollout"),
        Row("mean intersection over union of raw attention", raw, values=tuple(found["raw"])),
        Row("accuracy of the model, %", sum(right) / seeds, values=tuple(right)),
    ]
