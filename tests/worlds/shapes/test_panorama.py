"""Directions and things on the sphere by hand."""

import numpy as np
import pytest
import torch

from regard.worlds.shapes.panorama import Panoramas, Patch, axes, look, pinhole, sphere
from regard.worlds.shapes.scene import CLASSES


def test_directions() -> None:
    rays = sphere(180, 360)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=-1), 1)
    np.testing.assert_allclose(rays[89:91, 179:181].mean((0, 1)), [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(rays[0].mean(0), [0, -1, 0], atol=1e-2)
    np.testing.assert_allclose(rays[89:91, 269:271].mean((0, 1)), [1, 0, 0], atol=1e-3)
    ahead = pinhole(9, 90)
    np.testing.assert_allclose(ahead[4, 4], [0, 0, 1], atol=1e-12)
    assert np.degrees(np.arctan2(ahead[4, -1, 0], ahead[4, -1, 2])) == pytest.approx(np.degrees(np.arctan(8 / 9)))
    turned = axes(Patch("star", "red", 30, -40, 20))
    np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    assert turned[1, 1] > 0


@pytest.mark.parametrize(("longitude", "latitude"), [(0, 0), (90, 0), (-120, 40), (179, -60)])
def test_a_circle_covers_its_cap(longitude: float, latitude: float) -> None:
    view = look([Patch("circle", "red", longitude, latitude, 40)], sphere(180, 360), 0.9)
    rays = sphere(180, 360)
    centre = axes(Patch("circle", "red", longitude, latitude, 40))[2]
    angle = np.degrees(np.arccos((rays @ centre).clip(-1, 1)))
    mask = view.amodal[0].numpy()
    assert mask[angle < 19].all()
    assert not mask[angle > 21].any()


def test_both_views_show_the_same_things() -> None:
    for i in range(10):
        sample = Panoramas()[i]
        for view in (sample.around, sample.ahead):
            n = len(sample.things)
            top = (view.amodal * torch.arange(1, n + 1).view(-1, 1, 1)).amax(0)
            assert torch.equal(top, view.index)
            classes = torch.tensor([0] + [CLASSES.index(t.shape) + 1 for t in sample.things])
            assert torch.equal(view.semantic, classes[view.index])
        assert sample.around.image.shape == (3, 64, 256)
        assert sample.ahead.image.shape == (3, 64, 64)
        rays = pinhole(64, 90.0)
        longitude = np.degrees(np.arctan2(rays[..., 0], rays[..., 2]))
        latitude = np.degrees(np.arcsin(-rays[..., 1]))
        u, v = ((longitude + 180) / 360 * 256).astype(int), ((90 - latitude) / 180 * 64).astype(int)
        same = sample.around.index.numpy()[v, u] == sample.ahead.index.numpy()
        assert same.mean() > 0.9
