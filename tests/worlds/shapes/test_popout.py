"""One thing is odd, and observers look at it first and most."""

import numpy as np
import pytest
import torch

from regard.worlds.shapes.popout import ODD, PopOut


@pytest.mark.parametrize("odd", ODD)
def test_one_thing_is_odd_in_one_way(odd: str) -> None:
    world = PopOut(odd=(odd,), size=(72, 96), grid=(3, 4))
    for i in range(10):
        sample = world[i]
        things = list(sample.shapes.scene.things)
        one, other = things.pop(sample.target), things[0]
        assert len(things) == 11
        assert len({(t.shape, t.colour, t.size) for t in things}) == 1
        differ = {
            "colour": one.colour != other.colour,
            "shape": one.shape != other.shape,
            "angle": abs(one.angle - other.angle) > 70,
            "size": one.size > 1.5 * other.size,
        }
        assert differ == {name: name == odd for name in ODD}
        assert sample.image.shape == (3, 72, 96)
        assert sample.mask.any()
        assert (sample.shapes.index[sample.mask] == sample.target + 1).all()


def test_fixations_follow_their_law() -> None:
    world = PopOut(observers=200, steps=4, pull=30.0, spread=100.0)
    sample = world[0]
    n = len(sample.shapes.scene.things)
    assert torch.equal(sample.fixations[:, 0], torch.full((200, 2), 48.0))
    assert (sample.looked_at[:, 0] == -1).all()
    first = (sample.looked_at[:, 1] == sample.target).float().mean()
    assert first == pytest.approx(30 / (30 + n - 1), abs=0.1)
    centres = np.array([t.centre for t in sample.shapes.scene.things])
    landed = sample.fixations[:, 1:].reshape(-1, 2).numpy()
    meant = centres[sample.looked_at[:, 1:].flatten().numpy()]
    assert np.hypot(*(landed - meant).T).mean() < 3


def test_what_was_seen_is_seldom_seen_again_and_near_things_are_preferred() -> None:
    sample = PopOut(observers=300, steps=3, pull=1.0, spread=0.2)[0]
    again = (sample.looked_at[:, 1] == sample.looked_at[:, 2]).float().mean()
    assert again < 0.15
    centres = torch.tensor([t.centre for t in sample.shapes.scene.things])
    step = (centres[sample.looked_at[:, 1]] - 48).norm(dim=1).mean()
    assert step < (centres - 48).norm(dim=1).mean() - 3


def test_density_adds_up_and_peaks_at_the_target() -> None:
    hits = 0
    for i in range(20):
        sample = PopOut(observers=30)[i]
        density = sample.density()
        assert density.sum().item() == pytest.approx(1, abs=1e-5)
        y, x = divmod(int(density.argmax()), 96)
        hits += np.hypot(*(np.array(sample.shapes.scene.things[sample.target].centre) - (x, y))) < 10
        start = sample.density(0)
        assert divmod(int(start.argmax()), 96) == (48, 48)
    assert hits >= 16
