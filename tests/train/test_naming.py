"""What is where in a picture, and the loss of saying it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regard.train.match import patch_kinds
from regard.train.naming import SAID, naming, what_is_where
from regard.worlds.shapes.language import Vocabulary
from regard.worlds.shapes.world import Shapes

WORLD = Shapes(size=48, things=(1, 3), count=40)


def test_what_is_where_is_what_the_scene_says() -> None:
    for i in range(20):
        sample = WORLD[i]
        said = what_is_where(sample, 4)
        assert said.shape == (4, 144)
        for place in range(144):
            row, column = 4 * (place // 12), 4 * (place % 12)
            inside = sample.visible[:, row : row + 4, column : column + 4].flatten(1).sum(1)
            if inside.max() < 8:
                assert (said[:, place] == -1).all()
                continue
            thing = sample.scene.things[int(inside.argmax())]
            words = [names[k] for names, k in zip(SAID, said[:, place].tolist())]
            x, y = (min(2, max(0, int(p / 16))) for p in thing.centre)
            assert words == [thing.colour, thing.shape, ("top", "centre", "bottom")[y], ("left", "centre", "right")[x]]


def test_nothing_is_anywhere_in_an_empty_picture() -> None:
    empty = replace(WORLD, things=(0, 0))[0]
    assert what_is_where(empty, 4).tolist() == [[-1] * 144] * 4
    assert patch_kinds(empty, 4).tolist() == [-1] * 144


@pytest.mark.parametrize("kinds", [2, 4])
def test_naming_is_the_cross_entropy_of_the_words_for_what_is_there(kinds: int) -> None:
    torch.manual_seed(0)
    words, vocabulary = torch.randn(len(Vocabulary()), 8), Vocabulary()
    seen = torch.randn(2, 3, 8)
    there = torch.tensor([[[5, -1, 7], [2, -1, 0], [0, -1, 2], [1, -1, 1]], [[-1] * 3] * 4])[:, :kinds]
    total = 0.0
    for place in (0, 2):
        x = seen[0, place] / seen[0, place].square().mean().sqrt()
        for names, k in zip(SAID, there[0, :, place].tolist()):
            rows = [vocabulary.words.index(name) for name in names]
            total -= (words[rows] @ x).log_softmax(0)[k].item() / 2
    assert naming(seen, there, words).tolist() == pytest.approx([total, 0.0], rel=1e-4)


def test_the_words_are_learned_too() -> None:
    words = torch.randn(len(Vocabulary()), 8, requires_grad=True)
    naming(torch.randn(1, 144, 8), what_is_where(WORLD[0], 4)[None], words).sum().backward()
    learned = {Vocabulary().words[i] for i in words.grad.abs().sum(1).nonzero().flatten().tolist()}  # type: ignore[union-attr]
    assert learned == {name for names in SAID for name in names}
