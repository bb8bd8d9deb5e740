"""Gradient-weighted relevance finds the object better than rollout does.

Set-up: a vision transformer of six layers, four heads and 64 channels on 8 x 8 patches of 32x32 images: one shape out
of six on textured clutter with stray strokes (see :mod:`regard.claims.cbam`). 3,200 to train on, 20 epochs of Adam
with one cycle. On 500 test images the map of the predicted class is brought to image size and cut at its mean;
intersection over union of object and of background, each summed over the set, averaged. Compared: rollout from the
second layer on, the class row of the last layer's attention.

Bar, with three seeds: the mean intersection over union is above that of rollout. Reported besides: raw attention.

Not run yet: that it lies within 0.02 of transformer attribution, which needs that method; masks from the queries of a
small detector against raw cross-attention (+ 0.05); removing image tokens of a small question answerer (area under
the curve at least 3 points below raw attention).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.claims.attention_flow import Block
from regard.claims.cbam import fit, shapes
from regard.claims.claim import Budget, Row, mean_row
from regard.core.capture import Capture
from regard.core.explain import explain, readout
from regard.core.tokens import tokens

SEEDS = 3


class ViT(nn.Module):
    def __init__(self, layers: int = 6, dim: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 6))
        tokens(self, q="cls + image[8,8]")

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position)[:, 0])


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
    count, tested, epochs = (128, 16, 1) if budget == "smoke" else (3200, 500, 20)
    found: dict[str, list[float]] = {"relevance": [], "rollout": [], "raw": []}
    accuracy = []
    for seed in range(seeds):
        world = torch.Generator().manual_seed(1000 + seed)
        images, labels, _ = shapes(count, 32, world)
        test, truth, masks = shapes(tested, 32, world)
        torch.manual_seed(seed)
        model = ViT()
        fit(model, images, labels, epochs, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            accuracy.append((model(test).argmax(1) == truth).double().mean().item())
        maps = {
            "relevance": explain(model, test, "generic-attribution"),
            "rollout": explain(model, test, "attention-flow-rollout", start_layer=1),
            "raw": explain(model, test, RawAttention()),
        }
        for name, one in maps.items():
            found[name].append(mean_iou(one.upsample(32).values, masks))
    rollout, raw = (sum(found[name]) / seeds for name in ("rollout", "raw"))
    return [
        mean_row("mean intersection over union", found["relevance"], rollout, ">", baseline=rollout, note="rollout"),
        Row("mean intersection over union of raw attention", raw, values=tuple(found["raw"])),
        Row("accuracy of the model", sum(accuracy) / seeds, values=tuple(accuracy)),
    ]
