"""Strokes run along the outlines of the thing that stands out."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from regard.worlds.shapes.drawings import Drawings, outline_strokes
from regard.worlds.shapes.outlines import whole
from regard.worlds.shapes.render import frame
from regard.worlds.shapes.scene import CLASSES, COMPOSITES, Thing


@pytest.mark.parametrize("shape", CLASSES)
@pytest.mark.parametrize("angle", [0, 40])
def test_points_lie_on_outlines_of_parts(shape: str, angle: float) -> None:
    parts = ("blue", "green")[: len(COMPOSITES.get(shape, "w")) - 1]
    thing = Thing(shape, "red", (40, 30), 30, angle, parts=parts)
    strokes = outline_strokes(thing, 36)
    assert 20 <= len(strokes) <= 36
    lines = {"ring": 2, "house": 3, "tree": 2, "lollipop": 2, "flag": 2}.get(shape, 1)
    assert strokes[:, 2].sum() == lines
    turn = np.radians(angle)
    dx, dy = (strokes[:, :2] - thing.centre).T / 15
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    on = np.abs(whole(shape, u.astype(np.float32), v.astype(np.float32)))
    assert (on.max() if lines == 1 or shape == "ring" else np.median(on)) < 0.03
    assert frame(thing, (64, 80))[0][0].stop <= 64


def test_drawing_is_at_the_edge_of_the_mask() -> None:
    world = Drawings(jitter=0.0)
    for i in range(10):
        sample = world[i]
        ink = sample.drawing().numpy() > 0.5
        filled = sample.mask.numpy()
        assert ink.any()
        far = ndimage.distance_transform_edt(~filled)[ink]
        assert far.max() < 3
        assert (ndimage.binary_fill_holes(ink) & filled).sum() > 0.8 * filled.sum()


def test_the_rest_is_faint() -> None:
    sample = Drawings()[2]
    assert len(sample.shapes.scene.things) == 3
    assert torch.allclose(sample.image[:, sample.mask], sample.shapes.image[:, sample.mask])
    other = sample.shapes.visible[:-1].any(0)
    chroma = (sample.image.amax(0) - sample.image.amin(0))[other].mean()
    assert chroma < 0.4 * (sample.shapes.image.amax(0) - sample.shapes.image.amin(0))[other].mean()


def test_a_shifted_drawing_keeps_its_form() -> None:
    a, b = (Drawings(jitter=0.0, shift=s)[5].strokes for s in (0.0, 0.1))
    moved = (b - a)[:, :2]
    assert moved.std(0).max() < 1e-4
    assert moved.norm(dim=1).min() > 0.5
