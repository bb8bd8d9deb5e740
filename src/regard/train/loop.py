"""A short training loop for image classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.train.checkpoint import load_checkpoint, save_checkpoint
from regard.worlds.images import Images


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, linear warm-up and cosine decay to zero, clipped gradients.

    ``warmup`` is a share of all steps, ``clip`` the largest gradient norm. Weight decay is for matrices and kernels only.
    """

    epochs: int = 6
    batch_size: int = 50
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` out of ``steps``."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@dataclass
class History:
    """One entry an epoch: mean training loss, and loss, accuracy and balanced accuracy on the test images.

    ``correct`` says for each test image whether the last epoch's model was right.
    """

    loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    balanced: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


def evaluate(model: nn.Module, images: Images, batch_size: int = 250) -> tuple[float, float, float, list[bool]]:
    """Mean cross-entropy, accuracy, accuracy averaged over classes, and for each image whether it was classified rightly."""
    from torchmetrics.classification import MulticlassAccuracy

    device = next(model.parameters()).device
    micro = MulticlassAccuracy(len(images.classes), average="micro").to(device)
    macro = MulticlassAccuracy(len(images.classes), average="macro").to(device)
    loss, correct = 0.0, []
    training = model.training
    model.eval()
    with torch.no_grad():
        for index in torch.arange(len(images)).split(batch_size):
            x, y = (t.to(device) for t in images.batch(index))
            logits = model(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            micro.update(logits, y)
            macro.update(logits, y)
            correct += (logits.argmax(-1) == y).tolist()
    model.train(training)
    return loss / len(images), micro.compute().item(), macro.compute().item(), correct


def _order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch depends on nothing but the seed and the epoch: it is the same for every model."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def fit(
    model: nn.Module,
    train: Images,
    test: Images,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] | None = None,
) -> History:
    """Train ``model`` in place and return its curve.

    Args:
        model: from images (b, c, h, w) to logits.
        train: images to learn from.
        test: images to measure on after each epoch; nothing is chosen by them.
        recipe: the optimiser's settings.
        seed: of the order of the images and of dropout; the model's own initial values are the caller's.
        checkpoint: file to save the run's state in after each epoch. If it exists the run goes on from there, with the
            same numbers as if it had never stopped.
        device: an accelerator name that Lightning Fabric knows.
        report: called after each epoch with its number and figures.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=device, devices=1)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    history, first = History(), 0
    torch.manual_seed(seed)
    network, stepper = fabric.setup(model, optimizer)
    if checkpoint is not None and Path(checkpoint).exists():
        history = History(**load_checkpoint(checkpoint, model, optimizer))
        first = len(history.loss)
    batches = math.ceil(len(train) / recipe.batch_size)
    steps = recipe.epochs * batches
    for epoch in range(first, recipe.epochs):
        network.train()
        total = 0.0
        for i, index in enumerate(_order(len(train), seed, epoch).split(recipe.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch * batches + i, steps)
            x, y = (fabric.to_device(t) for t in train.batch(index))
            loss = F.cross_entropy(network(x), y, label_smoothing=recipe.label_smoothing)
            stepper.zero_grad()
            fabric.backward(loss)
            fabric.clip_gradients(network, stepper, max_norm=recipe.clip, error_if_nonfinite=False)
            stepper.step()
            total += loss.item() * len(index)
        mean = total / len(train)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss became {mean} in epoch {epoch + 1}; try a smaller learning rate"
            )
        test_loss, accuracy, balanced, history.correct = evaluate(network, test)
        history.loss.append(mean)
        history.test_loss.append(test_loss)
        history.accuracy.append(accuracy)
        history.balanced.append(balanced)
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimizer, vars(history))
        if report is not None:
            report({"epoch": epoch + 1, "epochs": recipe.epochs, "loss": mean, "accuracy": accuracy})
    return history
