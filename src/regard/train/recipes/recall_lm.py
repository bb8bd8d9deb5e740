"""A decoder that recalls what was said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import llama
from regard.train.language import Answer
from regard.train.loop import Recipe
from regard.train.recipes import Trainable
from regard.worlds.recall import Recall


@dataclass(frozen=True)
class RecallLM(Trainable):
    """A Llama of two blocks that answers multi-query associative recall: which value stood behind this key?

    Data: the world ``Recall``, endless; measured on its test split. Limits: sequences of the length it was trained on.
    """

    dim: int = 128
    num_heads: int = 4
    depth: int = 2
    symbols: int = 32
    pairs: int = 8
    steps: int = 150
    seed: int = 0
    recipe: Recipe = Recipe(epochs=8, batch_size=32, lr=1e-3)  # noqa: RUF009 (frozen)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return llama(self.symbols, self.dim, self.num_heads, self.num_heads, self.depth, 4 * self.pairs)

    def task(self) -> Answer:
        count = self.steps * self.recipe.epochs * self.recipe.batch_size
        world = Recall(
            vocab=self.symbols,
            length=4 * self.pairs,
            pairs=self.pairs,
            power=1.0,
            seed=self.seed,
            count=max(count, 256),
        )
        return Answer(world, self.recipe, self.steps, seed=self.seed)


RECIPE = RecallLM
