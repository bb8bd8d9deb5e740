"""Finding the picture that a sentence is about, as something to train for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe
from regard.train.paint import captioned
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.world import Shapes


def pixels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the towers see them, in [-1, 1]."""
    return 2 * images - 1


@dataclass(frozen=True)
class Match:
    r"""Contrast of pictures and sentences, by transformers' CLIP, on a world of shapes.

    .. math:: -\frac{1}{2b} \sum_i \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} + \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}}

    with s the scaled cosines of b pairs. Measured on ``tests`` groups of 32 test scenes: how often the most similar picture is
    the one that a sentence is about, and the other way round.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    window: int = 24
    tests: int = 8
    among: int = 32

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, step: int) -> Batch:
        size = self.recipe.batch_size
        return self.pairs(self.world, (epoch * self.steps + step) * size, size)

    def pairs(self, world: Shapes, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(count, 3, h, w) and (count, window)."""
        drawn = [captioned(world, i) for i in range(first, first + count)]
        ids = [Vocabulary().encode(str(said), self.window) for _, said in drawn]
        return torch.stack([image for image, _ in drawn]), torch.stack(ids)

    def similarity(self, model: nn.Module, batch: Batch) -> Tensor:
        """(texts, images), scaled."""
        images, ids = batch
        out: Any = model(input_ids=ids, pixel_values=pixels(images), attention_mask=(ids != Vocabulary.PADDING).long())
        return out.logits_per_text.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scores = self.similarity(model, batch)
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    def measure(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        world = replace(self.world, split="test", count=self.tests * self.among)
        right = torch.zeros(2)
        for group in range(self.tests):
            batch = tuple(t.to(device) for t in self.pairs(world, group * self.among, self.among))
            scores, own = self.similarity(model, batch).cpu(), torch.arange(self.among)
            right += torch.stack([(scores.argmax(axis) == own).float().mean() for axis in (1, 0)])
        images, texts = (right / self.tests).tolist()
        return {"image_of_text": images, "text_of_image": texts}
