"""Predicting text, and recalling what was said, as something to train for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe
from regard.worlds.recall import IGNORE, Recall
from regard.worlds.text import windows


def logits(model: nn.Module, tokens: Int[Tensor, "b n"]) -> Tensor:
    """(b, n, vocabulary), of a model that returns them or, as those of transformers do, something that holds them."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


@dataclass(frozen=True)
class Predict:
    """The next token of windows of ``context`` tokens from random places of ``train``; measured on all of ``test``."""

    train: Int[Tensor, "n"]
    test: Int[Tensor, "m"]
    recipe: Recipe
    context: int = 128
    steps: int = 100
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, step: int) -> Batch:
        number = (self.seed * 1_000_003 + epoch) * self.steps + step
        return (windows(self.train, self.context + 1, self.recipe.batch_size, torch.Generator().manual_seed(number)),)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        (tokens,) = batch
        return F.cross_entropy(logits(model, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean cross-entropy of a token given those before it in its window, in nats, and its exponential."""
        device = next(model.parameters()).device
        pieces = self.test.unfold(0, self.context + 1, self.context).to(device)
        total = sum(self.loss(model, (part,)).item() * len(part) for part in pieces.split(64))
        loss = total / len(pieces)
        return {"test_loss": loss, "perplexity": math.exp(loss)}


@dataclass(frozen=True)
class Answer:
    """The values that are asked for in sequences of :class:`Recall`; measured on the test split of the same world."""

    world: Recall
    recipe: Recipe
    steps: int = 100
    tests: int = 256
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, step: int) -> Batch:
        first = (epoch * self.steps + step) * self.recipe.batch_size
        return tuple(self.world.batch(range(first, first + self.recipe.batch_size)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(logits(model, tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The share of the values asked for that are named."""
        device = next(model.parameters()).device
        tokens, targets = (t.to(device) for t in replace(self.world, split="test").batch(range(self.tests)))
        asked = targets != IGNORE
        return {"recall": (logits(model, tokens).argmax(-1)[asked] == targets[asked]).double().mean().item()}
