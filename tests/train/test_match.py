"""Pictures with sentences, and patches with the names of things."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from regard.hosts.small import clip
from regard.train.loop import Recipe
from regard.train.match import KINDS, Match, encode, patch_kinds, pixels, tagging
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.world import Shapes

WORLD = Shapes(size=48, things=(1, 3), count=400)
TEST = replace(WORLD, split="test")
RECIPE = Recipe(batch_size=3)


def test_matching_is_right_for_a_model_that_knows() -> None:
    class Knows(torch.nn.Module):
        """Says that the i-th text is about the i-th picture, or about the one before; and what is on each patch, or not."""

        def __init__(self, right: bool) -> None:
            super().__init__()
            self.shift = 0 if right else 1
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.visual_projection = torch.nn.Identity()
            self.vision_model = SimpleNamespace(post_layernorm=torch.nn.Identity())

        def forward(
            self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor, **more: bool
        ) -> SimpleNamespace:
            assert more == {"output_hidden_states": True}
            at = next(i for i in range(0, 8, 4) if torch.equal(task_images(i), pixel_values))
            kinds = torch.stack([patch_kinds(TEST[at + i], 6) for i in range(4)]).clamp_min(0)
            patches = torch.eye(len(KINDS))[(kinds + self.shift) % len(KINDS)]
            return SimpleNamespace(
                logits_per_text=torch.eye(len(input_ids), 4).roll(self.shift, 1),
                text_embeds=torch.cat([torch.zeros(4, len(KINDS)), torch.eye(len(KINDS)), torch.eye(8, len(KINDS))]),
                vision_model_output=SimpleNamespace(hidden_states=[torch.cat([patches[:, :1], patches], 1), None]),
            )

    def task_images(first: int) -> torch.Tensor:
        return pixels(torch.stack([TEST[first + i].image for i in range(4)]))

    task = Match(WORLD, RECIPE, 1, patch=6, tests=2, among=4)
    for right in (True, False):
        figures = task.measure(Knows(right))
        assert figures == dict.fromkeys(("image_of_text", "text_of_image", "kind_of_patch"), float(right))


def test_the_end_of_a_sentence_reads_all_of_it() -> None:
    torch.manual_seed(0)
    model: Any = clip(Vocabulary().words, 24, 48, 16, 16, (1, 1), 8).eval()
    texts = [
        "a star",
        "a pink star left of a red ring",
        "a pink star left of a red heart",
        "a ring on a black background",
    ]
    ids = torch.stack([encode(text, 24) for text in texts])
    mask = (ids != Vocabulary.PADDING).long()
    out = model.text_model(input_ids=ids, attention_mask=mask)
    for row, text, pooled in zip(out.last_hidden_state, texts, out.pooler_output):
        assert torch.equal(pooled, row[1 + len(text.split())])
    assert not torch.allclose(out.pooler_output[1], out.pooler_output[2])


def test_tagging_is_the_cross_entropy_against_what_is_not_there() -> None:
    scores, kinds = torch.randn(3, 9), torch.tensor([[-1, 2, 2, 7], [-1, -1, 0, -1], [-1, -1, -1, -1]])
    loss = []
    for row, present in zip(scores, ({2, 7}, {0}, set())):
        absent = [row[k].exp() for k in range(9) if k not in present]
        loss += [-(row[k].exp() / (row[k].exp() + sum(absent))).log() for k in present]
    torch.testing.assert_close(tagging(scores, kinds), sum(loss) / len(loss))
    assert tagging(scores, torch.full((3, 4), -1)) == 0


def test_patches_have_the_kind_of_what_covers_them() -> None:
    sample = WORLD[7]
    kinds = patch_kinds(sample, 4).view(12, 12)
    for row, column in itertools.product(range(12), repeat=2):
        inside = sample.index[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        counts = {i + 1: int((inside == i + 1).sum()) for i in range(len(sample.scene.things))}
        covering = [i for i, n in counts.items() if n >= 8]
        kind = int(kinds[row, column])
        assert (kind >= 0) == bool(covering)
        if kind >= 0:
            assert KINDS[kind] in [sample.scene.things[i - 1].kind for i in covering]
    assert (kinds >= 0).any()
