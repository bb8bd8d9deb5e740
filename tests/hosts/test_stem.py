"""The convolutional stem in the place of a patch embedding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from regard.hosts.small import clip, llava
from regard.hosts.stem import Stem


@pytest.mark.parametrize("patch", [2, 8])
def test_a_token_sees_its_patch_and_little_more(patch: int) -> None:
    torch.manual_seed(0)
    stem = Stem(3, patch, 16).eval()
    x = torch.randn(1, 3, 4 * patch, 4 * patch)
    tokens = stem(x)
    assert tokens.shape == (1, 16, 4, 4)
    y = x.clone()
    y[..., :patch, :patch] = 0
    changed = (stem(y) != tokens).any(1)[0]
    assert changed[0, 0]
    assert not changed[2:].any()
    assert not changed[:, 2:].any()


def test_towers_of_transformers_read_pictures_through_it() -> None:
    torch.manual_seed(0)
    words = ("<padding>", "<start>", "<end>", "circle")
    encoder = clip(words, 8, 32, 8, 16, (1, 2), 8).eval()
    tower = llava(len(words), 32, 8, (16, 2), 16, 1, 32).get_submodule("model.vision_tower").eval()
    tower.load_state_dict(encoder.get_submodule("vision_model").state_dict())
    images = torch.randn(2, 3, 32, 32)
    read = encoder.get_submodule("vision_model.embeddings.patch_embedding")(images)
    seen = encoder.get_submodule("vision_model.embeddings")(images)
    position = encoder.get_submodule("vision_model.embeddings.position_embedding").weight
    torch.testing.assert_close(seen[:, 1:], read.flatten(2).mT + position[1:])
    torch.testing.assert_close(tower(images).last_hidden_state, encoder.vision_model(images).last_hidden_state)


@pytest.mark.parametrize("patch", [1, 12])
def test_patches_that_halving_does_not_reach(patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch={patch} must be a power of two, and 2 at least"):
        Stem(3, patch, 16)
