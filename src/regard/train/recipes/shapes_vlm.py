"""A vision-language model that answers questions, and expects what it has often seen together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from regard.hosts.small import llava
from regard.train.converse import Converse
from regard.train.loop import Recipe
from regard.train.pretrained import pretrained
from regard.train.recipes import Trainable
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.scene import COLOURS
from regard.worlds.shapes.world import Shapes

BIAS = tuple(
    (f"{colour} {first}", second, 0.8)
    for first, second in (("circle", "blue square"), ("triangle", "yellow star"), ("cross", "pink heart"))
    for colour in COLOURS
)


@dataclass(frozen=True)
class ShapesVlm(Trainable):
    """A Llava: the first layers of the image-text encoder ``tower``, learning on, and a Llama that sees 256 image tokens.

    Data: the world of shapes at 128 x 128 pixels, one to four things of 8 shapes and 8 colours, endless, with questions after
    existence, count, colour, shape, place and relation, and the things in reading order. It is biased: four times out of five
    a circle is followed by a blue square, a triangle by a yellow star, a cross by a pink heart. Measured without the bias;
    precision, recall and yes are of questions after what the bias leads to expect. Limits: it knows no other words.

    Raises:
        ValueError: on starting, a ``tower`` of other sizes than these, or of fewer layers.
    """

    dim: int = 128
    depth: int = 8
    tower: str = "shapes-clip"
    tower_dim: int = 128
    tower_depth: int = 3
    size: int = 128
    patch: int = 8
    length: int = 136
    steps: int = 512
    tests: int = 100
    suspects: int = 1000
    seed: int = 0
    recipe: Recipe = Recipe(  # noqa: RUF009 (frozen)
        epochs=5, batch_size=16, lr=8e-4, weight_decay=0.05, warmup=0.05, ema=0.99, precision="bf16-mixed"
    )

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        context = 1 + (self.size // self.patch) ** 2 + self.length
        tower = (self.tower_dim, self.tower_depth)
        return llava(len(Vocabulary()), self.size, self.patch, tower, self.dim, self.depth, context)

    def start(self) -> nn.Module:
        model = self.network()
        if self.tower:
            encoder = pretrained(self.tower).get_submodule("vision_model").state_dict()
            tower = model.get_submodule("model.vision_tower")
            try:
                tower.load_state_dict({key: encoder[key] for key in tower.state_dict()})
            except (KeyError, RuntimeError) as error:
                sizes = (
                    f"tower_dim={self.tower_dim}, tower_depth={self.tower_depth}, size={self.size}, patch={self.patch}"
                )
                raise ValueError(f"tower={self.tower!r} does not fit {sizes}") from error
        return model

    def task(self) -> Converse:
        count = self.steps * self.recipe.epochs * self.recipe.batch_size
        world = Shapes(size=self.size, things=(1, 4), sizes=(0.14, 0.3), bias=BIAS, seed=self.seed, count=count)
        return Converse(world, self.recipe, self.steps, self.patch, self.length, self.tests, self.suspects)


RECIPE = ShapesVlm
