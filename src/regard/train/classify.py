"""Classifying images, as something to train for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe, order
from regard.worlds.images import Images


def shifted(x: Float[Tensor, "b c h w"], reach: int, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Each image moved by up to ``reach`` pixels along either axis; its edge is repeated where nothing was."""
    (b, c, h, w), padded = x.shape, F.pad(x, (reach,) * 4, mode="replicate")
    top, left = torch.randint(2 * reach + 1, (2, b, 1), generator=generator)
    rows, columns = (top + torch.arange(h))[:, None, :, None], (left + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(b)[:, None, None, None], torch.arange(c)[:, None, None], rows, columns]


@dataclass(frozen=True)
class Classify:
    """Cross-entropy of a model from images (b, c, h, w) to logits, measured on the images of ``test``.

    With ``reach`` above 0 images to learn from are moved by up to that many pixels along either axis, anew in every epoch.
    """

    train: Images
    test: Images
    recipe: Recipe
    seed: int = 0
    reach: int = 0

    def __len__(self) -> int:
        return math.ceil(len(self.train) / self.recipe.batch_size)

    def batch(self, epoch: int, step: int) -> Batch:
        size = self.recipe.batch_size
        x, y = self.train.batch(order(len(self.train), self.seed, epoch)[step * size : (step + 1) * size])
        if not self.reach:
            return x, y
        number = (self.seed * 1_000_003 + epoch) * len(self) + step
        return shifted(x, self.reach, torch.Generator().manual_seed(number)), y

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, label_smoothing=self.recipe.label_smoothing)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean cross-entropy, accuracy, and accuracy averaged over classes."""
        from torchmetrics.functional.classification import multiclass_accuracy

        logits, y = self.logits(model), self.test.labels
        accuracy, balanced = (
            multiclass_accuracy(logits, y, len(self.test.classes), average=average).item()
            for average in ("micro", "macro")
        )
        return {"test_loss": F.cross_entropy(logits, y).item(), "accuracy": accuracy, "balanced": balanced}

    def correct(self, model: nn.Module) -> list[bool]:
        """For each test image whether the model is right about it."""
        return (self.logits(model).argmax(-1) == self.test.labels).tolist()

    @torch.no_grad()
    def logits(self, model: nn.Module, batch_size: int = 250) -> Tensor:
        """(n, classes), of the test images, on the CPU."""
        device = next(model.parameters()).device
        pieces = torch.arange(len(self.test)).split(batch_size)
        return torch.cat([model(self.test.batch(index)[0].to(device)).cpu() for index in pieces])
