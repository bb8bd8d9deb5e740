"""NormGrad points at objects from early layers, where Grad-CAM does not.

Set-up: images of 32x64 pixels, a shape out of six in either half on textured clutter with stray strokes (see
:mod:`regard.claims.cbam`); which classes are present is the label. A residual network of four blocks (16, 32, 64 and
64 channels), 2,400 images, 14 epochs of Adam with one cycle. On 150 test images every class present has its map,
brought to image size. Pointing: its largest value lies less than 2 pixels from an object of that class, the share
over maps of each class, averaged over classes. Masks: the pixels that hold the upper half of the map's sum,
intersection over union with the object.

Bar, with three seeds: (1) at the second block pointing is at least 10 points above Grad-CAM, at the last no more than
5 points below; (2) the product over four blocks has an intersection over union at least 0.02 above that of the best
single block; (3) a step on the class first (meta-saliency, rate 1e-4 as in the paper) lowers the correlation between
the maps of the most and of the least likely class by at least 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.claims._recipe import train
from regard.claims.cbam import resnet, shapes
from regard.claims.claim import Budget, Row, mean_row
from regard.core.explain import Target, explain
from regard.core.features import Features
from regard.core.maps import Map
from regard.explainers.normgrad import NormGrad, PointingGame, class_sensitivity, meta_saliency, saliency

SEEDS = 3
CLASSES = 6
BLOCKS = ("1", "2", "3", "4")
SIZE = (32, 64)


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 64) and one mask a class (count, 6, 32, 64)."""
    images, labels, masks = shapes(2 * count, 32, generator)
    each = F.one_hot(labels, CLASSES).bool()[:, :, None, None] & masks[:, None]
    return tuple(torch.cat(list(x.split(count)), -1) for x in (images, each))  # type: ignore[return-value]


class GradCam(NormGrad):
    """The same framework with the gradient averaged over places: channels weighted by it, summed, positive part."""

    def _saliency(self, name: str, evidence: Features) -> Tensor:
        x, g = evidence.outputs[name], evidence.gradients[name]
        return saliency(x, g.mean((2, 3), keepdim=True).expand_as(g), "scaling", "sum").relu()


def network() -> nn.Sequential:
    """The residual network with a hidden convolution between the last block and the mean over places.

    Without one the gradient at the last block is the same at every place, and the map of every class is the same there.
    """
    net = resnet(lambda dim: nn.Identity(), CLASSES, (16, 32, 64, 64))
    return nn.Sequential(*net[:5], nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), *net[5:])


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        images, masks = pairs(64, generator)
        yield images, masks.flatten(2).any(2).float()


def loss(model: nn.Module, images: Tensor, present: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(images), present)


def overlap(saliency: Tensor, mask: Tensor) -> float:
    """Intersection over union of ``mask`` and the fewest pixels that hold half of the map's sum."""
    values, order = saliency.flatten().sort(descending=True)
    total = values.sum()
    kept = int((values.cumsum(0) < total / 2).sum()) + 1 if total > 0 else 0
    chosen = torch.zeros_like(mask.flatten())
    chosen[order[:kept]] = True
    return float((chosen & mask.flatten()).sum() / (chosen | mask.flatten()).sum())


def judged(method: NormGrad, model: nn.Module, images: Tensor, masks: Tensor) -> tuple[float, float]:
    """Pointing accuracy in per cent and intersection over union, over every class that an image shows."""
    game, overlaps = PointingGame(CLASSES, tolerance=2), []
    for label in range(CLASSES):
        shown = masks[:, label].flatten(1).any(1)
        if not shown.any():
            continue
        maps = explain(model, images[shown], method, target=label).upsample(SIZE).values
        for one, mask in zip(maps, masks[shown, label], strict=True):
            game.add(one, mask, label)
            overlaps.append(overlap(one, mask))
    return 100 * game.accuracy().nanmean().item(), sum(overlaps) / len(overlaps)


def run(budget: Budget, seeds: int) -> list[Row]:
    steps, tested = (1, 8) if budget == "smoke" else (400, 150)
    pointing: dict[str, list[float]] = {}
    single: list[float] = []
    product: list[float] = []
    before: list[float] = []
    after: list[float] = []
    for seed in range(seeds):
        world = torch.Generator().manual_seed(1000 + seed)
        torch.manual_seed(seed)
        model = network()
        train(model, batches(world), steps, lr=4e-3, loss=partial(loss, model))
        test, truth = pairs(tested, world)
        found = {block: judged(NormGrad([block], size=SIZE), model, test, truth) for block in BLOCKS}
        single.append(max(iou for _, iou in found.values()))
        product.append(judged(NormGrad(BLOCKS, size=SIZE), model, test, truth)[1])
        for where, block in (("early", BLOCKS[1]), ("last", BLOCKS[-1])):
            pointing.setdefault(where, []).append(found[block][0])
            pointing.setdefault(f"{where} cam", []).append(judged(GradCam([block], size=SIZE), model, test, truth)[0])
        sensitivity = _sensitivity(model, test[:64])
        before.append(sensitivity[0])
        after.append(sensitivity[1])
    mean = {name: sum(values) / seeds for name, values in pointing.items()}
    best, plain = sum(single) / seeds, sum(before) / seeds
    return [
        mean_row(
            "pointing at block 2, %",
            pointing["early"],
            mean["early cam"] + 10,
            ">=",
            baseline=mean["early cam"],
            note="Grad-CAM",
        ),
        mean_row(
            "pointing at block 4, %",
            pointing["last"],
            mean["last cam"] - 5,
            ">=",
            baseline=mean["last cam"],
            note="Grad-CAM",
        ),
        mean_row("overlap of the product", product, best + 0.02, ">=", baseline=best, note="best single block"),
        mean_row(
            "correlation of class maps, meta-saliency", after, plain - 0.05, "<=", baseline=plain, note="NormGrad"
        ),
    ]


def _sensitivity(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Mean correlation of the maps of the most and the least likely class at the last block, without and with the step."""
    method = NormGrad([BLOCKS[-1]])
    with torch.no_grad():
        logits = model(images)

    def plain(target: Target) -> Map:
        return explain(model, images, method, target=target)

    def stepped(target: Any) -> Map:
        return meta_saliency(method, model, images, target)

    values = [class_sensitivity(make, logits).nanmean().item() for make in (plain, stepped)]
    return values[0], values[1]
