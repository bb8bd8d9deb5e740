"""Noses point where heads look, and inside means inside."""

import numpy as np
import torch

from regard.worlds.shapes.gaze import Gaze

SAMPLES = [Gaze(wobble=0.0)[i] for i in range(60)]


def test_noses_point_at_the_points() -> None:
    for sample in SAMPLES[:25]:
        dark = (sample.shapes.image - sample.image).amax(0) > 0.4
        for k, i in enumerate(sample.heads.tolist()):
            thing = sample.shapes.scene.things[i]
            assert thing.kind == "pink circle"
            y, x = np.mgrid[:96, :96] + 0.5
            mine = dark.numpy() & (np.hypot(x - thing.centre[0], y - thing.centre[1]) < 0.8 * thing.size)
            nose = np.array([x[mine].mean(), y[mine].mean()]) - thing.centre
            cosine = nose @ sample.directions[k].numpy() / np.hypot(*nose)
            assert cosine > 0.97


def test_points_are_on_what_is_meant() -> None:
    for sample in SAMPLES:
        things = sample.shapes.scene.things
        centres = torch.tensor([t.centre for t in things])
        for point, inside, common in zip(sample.points, sample.inside.tolist(), sample.at_target.tolist()):
            assert inside == bool(((point >= 0) & (point < 96)).all())
            nearest = int((centres - point).norm(dim=1).argmin())
            if common:
                assert nearest == sample.target
            if inside:
                assert (centres[nearest] - point).norm() < 0.01
                assert nearest not in sample.heads.tolist()
        assert sample.target not in sample.heads.tolist()
        assert torch.equal(sample.boxes, sample.shapes.boxes[sample.heads])
    assert 0 < sum(not i for s in SAMPLES for i in s.inside.tolist()) < 60


def test_a_high_role_is_less_reliable() -> None:
    world = Gaze(heads=(4, 4), together=1.0)
    samples = [world[i] for i in range(150)]
    roles = torch.cat([s.roles for s in samples])
    common = torch.cat([s.at_target for s in samples]).float()
    assert common[roles == 0].mean() == 1
    assert abs(common[roles == 8].mean() - 1 / 3) < 0.2


def test_wobble_is_an_angle() -> None:
    sample = Gaze(wobble=10.0, together=1.0)[3]
    centres = torch.tensor([t.centre for t in sample.shapes.scene.things])
    away = centres[sample.target] - centres[sample.heads]
    exact = torch.nn.functional.normalize(away, dim=1)
    length = (sample.points - centres[sample.heads]).norm(dim=1)
    met = sample.at_target
    assert torch.allclose(length[met], away.norm(dim=1)[met], atol=1e-3)
    assert ((exact * sample.directions).sum(1)[met] > 0.85).all()
