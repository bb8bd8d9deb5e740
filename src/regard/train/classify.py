"""Classifying images, as something to train for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
        x, y = self.train.batch(self.chosen(epoch, step))
        return self.moved(x, epoch, step), y

    def chosen(self, epoch: int, step: int) -> Int[Tensor, " b"]:
        """The images of a batch."""
        size = self.recipe.batch_size
        return order(len(self.train), self.seed, epoch)[step * size : (step + 1) * size]

    def moved(self, x: Float[Tensor, "b c h w"], epoch: int, step: int) -> Float[Tensor, "b c h w"]:
        """The images of a batch, each moved by its own."""
        if not self.reach:
            return x
        number = (self.seed * 1_000_003 + epoch) * len(self) + step
        return shifted(x, self.reach, torch.Generator().manual_seed(number))

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


@dataclass(frozen=True, kw_only=True)
class ClassifyPatches(Classify):
    r"""The same for a transformer that also learns to name the thing on each patch (token labelling).

    .. math:: \mathrm{CE}(h(z_0), y) + \frac{1}{|P|} \sum_{p \in P} \mathrm{CE}(h(z_p), y)

    with z the tokens that the module ``tokens`` of the model gives, the patches last, h its module ``head``, and P the patches of
    which the thing covers half or more. After Zihang Jiang et al., All Tokens Matter: Token Labeling for Training Better Vision
    Transformers, 2021, arXiv:2104.10858, with the true places for a teacher.

    Args:
        places: (n, h, w), where the thing is in each training image.
        patch: pixels of a side of a patch.
    """

    places: Bool[Tensor, "n h w"]
    patch: int
    tokens: str = "norm"
    head: str = "head"

    def batch(self, epoch: int, step: int) -> Batch:
        index = self.chosen(epoch, step)
        x, y = self.train.batch(index)
        both = self.moved(torch.cat([x, self.places[index][:, None].to(x)], 1), epoch, step)
        return both[:, :-1], y, F.avg_pool2d(both[:, -1:], self.patch).flatten(1) >= 0.5

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y, on = batch
        network: nn.Module = getattr(model, "module", model)
        kept: list[Tensor] = []
        hook = network.get_submodule(self.tokens).register_forward_hook(lambda *call: kept.append(call[2]))
        try:
            whole = super().loss(model, (x, y))
        finally:
            hook.remove()
        patches = network.get_submodule(self.head)(kept[0][:, -on.shape[1] :][on].float())
        named = F.cross_entropy(patches, y[:, None].expand(on.shape)[on], reduction="sum")
        return whole + named / on.sum().clamp(min=1)
