"""A decoder language model of English bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import llama
from regard.train.language import Predict
from regard.train.loop import Recipe
from regard.train.recipes import Trainable
from regard.worlds.text import english


@dataclass(frozen=True)
class TextLM(Trainable):
    """A Llama of two million parameters that predicts English byte by byte.

    Data: the reference pages and docstrings of Python's standard library, prose only; measured on the last tenth of each
    document. Limits: it knows words and phrases of technical English, and nothing of the world.
    """

    dim: int = 192
    num_heads: int = 6
    num_kv_heads: int = 2
    depth: int = 4
    context: int = 256
    steps: int = 250
    seed: int = 0
    recipe: Recipe = Recipe(epochs=10, batch_size=16, lr=2e-3)  # noqa: RUF009 (frozen)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return llama(128, self.dim, self.num_heads, self.num_kv_heads, self.depth, self.context)

    def task(self) -> Predict:
        return Predict(english("train"), english("test"), self.recipe, self.context, self.steps, self.seed)


RECIPE = TextLM
