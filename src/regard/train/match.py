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
from regard.train.naming import patch_things
from regard.train.paint import describe
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COLOURS, SHAPES
from regard.worlds.shapes.world import Shapes

APART = 8.0
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def pixels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the towers see them, in [-1, 1]."""
    return 2 * images - 1


def encode(text: str, window: int) -> Int[Tensor, " n"]:
    """The words' numbers as the text tower reads them, which ends a sentence with the number after all words."""
    ids = Vocabulary().encode(text, window)
    return torch.where(ids == Vocabulary.END, len(Vocabulary()), ids)


def patch_kinds(sample: ShapesSample, patch: int) -> Int[Tensor, " n"]:
    """For each patch the place in ``KINDS`` of the thing that covers half of it or more, or -1."""
    kinds = torch.tensor([-1, *(KINDS.index(thing.kind) for thing in sample.scene.things)])
    return kinds[patch_things(sample, patch) + 1]


def tagging(scores: Float[Tensor, "b k"], kinds: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Cross-entropy of each kind that is in a picture, on any patch, against those that are not; -1 is no kind."""
    present = torch.zeros(len(kinds), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    present = present.scatter_(1, kinds + 1, True)[:, 1:]
    others = scores.masked_fill(present, float("-inf")).logsumexp(1, keepdim=True)
    return F.softplus(others - scores)[present].sum() / present.sum().clamp_min(1)


@dataclass(frozen=True)
class Match:
    r"""Contrast of pictures and sentences, and of patches and things, by transformers' CLIP on a world of shapes.

    .. math:: -\frac{1}{2b} \sum_i \Big(\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} + \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}}\Big)
        - \frac{1}{|P|} \sum_{p \in P} \log \frac{e^{s_{p k(p)}}}{\sum_k e^{s_{pk}}}
        - \frac{1}{\sum_i |K_i|} \sum_i \sum_{k \in K_i} \log \frac{e^{s_{ik}}}{e^{s_{ik}} + \sum_{l \notin K_i} e^{s_{il}}}

    with s scaled cosines: between b pairs; between each patch p that a thing covers, as it is ``over`` layers below the last one
    and projected as the class token is, and the names k of all kinds of things, once with colours and once without, scaled by
    ``APART`` so that names have to differ much; between pictures and the names of the kinds K in them and of those that are
    not. Colour and shape of a patch are thus bound together before the class token gathers them.

    Measured on ``tests`` groups of 32 test scenes:
    how often the most similar picture is the one that a sentence is about, and the other way round; and how often the most
    similar name is that of the thing on a patch.
    """

    world: Shapes
    recipe: Recipe
    steps: int
    patch: int
    over: int = 1
    window: int = 24
    tests: int = 32
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
            torch.stack([encode(text, self.window) for text in said]),
            torch.stack([patch_kinds(sample, self.patch) for sample in samples]),
        )

    def similarity(
        self, model: Any, batch: Batch
    ) -> tuple[Float[Tensor, "b b"], Float[Tensor, "b k"], Float[Tensor, "p k"], Int[Tensor, " p"]]:
        """Scaled: sentences with pictures, pictures and things on patches with the names; and the kinds of these things."""
        images, ids, kinds = batch
        texts = torch.cat([ids, names(self.window).to(ids.device)])
        mask = (texts != Vocabulary.PADDING).long()
        out = model(input_ids=texts, pixel_values=pixels(images), attention_mask=mask, output_hidden_states=True)
        seen = out.vision_model_output.hidden_states[-1 - self.over][:, 1:][kinds >= 0].float()
        patches = F.normalize(model.visual_projection(model.vision_model.post_layernorm(seen)), dim=-1)
        dense = APART * patches @ out.text_embeds[len(ids) :].float().T
        sentences, whole = out.logits_per_text.float().split([len(ids), len(texts) - len(ids)])
        return sentences, whole.T, dense, kinds[kinds >= 0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scores, whole, dense, kinds = self.similarity(model, batch)
        own = torch.arange(len(scores), device=scores.device)
        of_kinds = F.cross_entropy(dense[:, : len(KINDS)], kinds, reduction="sum")
        of_shapes = F.cross_entropy(dense[:, len(KINDS) :], kinds % len(SHAPES), reduction="sum")
        on_patches = (of_kinds + of_shapes) / max(1, len(kinds))
        contrast = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        return contrast + on_patches + tagging(whole[:, : len(KINDS)], batch[2])

    def measure(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        world = replace(self.world, split="test", count=self.tests * self.among)
        right, asked = torch.zeros(3), torch.zeros(3)
        for group in range(self.tests):
            batch = tuple(t.to(device) for t in self.pairs(world, group * self.among, self.among))
            scores, _, dense, kinds = (t.cpu() for t in self.similarity(model, batch))
            own = torch.arange(self.among)
            found = [scores.argmax(1) == own, scores.argmax(0) == own, dense[:, : len(KINDS)].argmax(1) == kinds]
            right += torch.tensor([int(one.sum()) for one in found])
            asked += torch.tensor([len(one) for one in found])
        return dict(zip(("image_of_text", "text_of_image", "kind_of_patch"), (right / asked.clamp_min(1)).tolist()))


@cache
def names(window: int) -> Int[Tensor, "k n"]:
    """``KINDS``, then shapes without a colour, as the text tower reads them."""
    return torch.stack([encode(f"a {name}", window) for name in (*KINDS, *SHAPES)])
