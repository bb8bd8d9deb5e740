"""Finding the picture that a sentence is about, as something to train for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.train.loop import Batch, Recipe
from regard.train.paint import describe
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COLOURS, SHAPES
from regard.worlds.shapes.world import Shapes

KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def pixels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the towers see them, in [-1, 1]."""
    return 2 * images - 1


def patch_kinds(sample: ShapesSample, patch: int) -> Int[Tensor, " n"]:
    """For each patch the place in ``KINDS`` of the thing that covers half of it or more, or -1."""
    seen = F.avg_pool2d(sample.visible.float(), patch).flatten(1)
    kinds = torch.tensor([KINDS.index(thing.kind) for thing in sample.scene.things])
    most, which = seen.max(0)
    return torch.where(most >= 0.5, kinds[which], -1)


@dataclass(frozen=True)
class Match:
    r"""Contrast of pictures and sentences, and of patches and things, by transformers' CLIP on a world of shapes.

    .. math:: -\frac{1}{2b} \sum_i \Big(\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} + \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}}\Big)
        - \frac{1}{|P|} \sum_{p \in P} \log \frac{e^{s_{p k(p)}}}{\sum_k e^{s_{pk}}}

    with s scaled cosines: between b pairs, and between each patch p that a thing covers, projected as the class token is, and
    the names k of all kinds of things, once with colours and once without. Measured on ``tests`` groups of 32 test scenes:
    how often the most similar picture is the one that a sentence is about, and the other way round; and how often the most
    similar name is that of the thing on a patch.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    patch: int
    window: int = 24
    tests: int = 8
    among: int = 32

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, step: int) -> Batch:
        size = self.recipe.batch_size
        return self.pairs(self.world, (epoch * self.steps + step) * size, size)

    def pairs(self, world: Shapes, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (count, 3, h, w), sentences (count, window), kinds of things on patches (count, n)."""
        samples = [world[i] for i in range(first, first + count)]
        said = [str(describe(sample, world, first + i)) for i, sample in enumerate(samples)]
        return (
            torch.stack([sample.image for sample in samples]),
            torch.stack([Vocabulary().encode(text, self.window) for text in said]),
            torch.stack([patch_kinds(sample, self.patch) for sample in samples]),
        )

    def similarity(
        self, model: Any, batch: Batch
    ) -> tuple[Float[Tensor, "b b"], Float[Tensor, "p k"], Int[Tensor, " p"]]:
        """Sentences with pictures, and things on patches with all kinds of things, scaled; and which kinds they are."""
        images, ids, kinds = batch
        texts = torch.cat([ids, names(self.window).to(ids.device)])
        out = model(input_ids=texts, pixel_values=pixels(images), attention_mask=(texts != Vocabulary.PADDING).long())
        seen = out.vision_model_output.last_hidden_state[:, 1:][kinds >= 0].float()
        patches = F.normalize(model.visual_projection(model.vision_model.post_layernorm(seen)), dim=-1)
        dense = model.logit_scale.exp() * patches @ out.text_embeds[len(ids) :].float().T
        return out.logits_per_text[: len(ids)].float(), dense, kinds[kinds >= 0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scores, dense, kinds = self.similarity(model, batch)
        own = torch.arange(len(scores), device=scores.device)
        of_kinds = F.cross_entropy(dense[:, : len(KINDS)], kinds, reduction="sum")
        of_shapes = F.cross_entropy(dense[:, len(KINDS) :], kinds % len(SHAPES), reduction="sum")
        on_patches = (of_kinds + of_shapes) / max(1, len(kinds))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2 + on_patches

    def measure(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        world = replace(self.world, split="test", count=self.tests * self.among)
        right, asked = torch.zeros(3), torch.zeros(3)
        for group in range(self.tests):
            batch = tuple(t.to(device) for t in self.pairs(world, group * self.among, self.among))
            scores, dense, kinds = (t.cpu() for t in self.similarity(model, batch))
            own = torch.arange(self.among)
            found = [scores.argmax(1) == own, scores.argmax(0) == own, dense[:, : len(KINDS)].argmax(1) == kinds]
            right += torch.tensor([int(one.sum()) for one in found])
            asked += torch.tensor([len(one) for one in found])
        return dict(zip(("image_of_text", "text_of_image", "kind_of_patch"), (right / asked.clamp_min(1)).tolist()))


@cache
def names(window: int) -> Int[Tensor, "k n"]:
    """``KINDS``, then shapes without a colour, as the text tower reads them."""
    return torch.stack([Vocabulary().encode(f"a {name}", window) for name in (*KINDS, *SHAPES)])
