"""Errors of maps: none of the true ones, known ones of maps that are off by a known amount, and loops as oracles."""

import math

import pytest
import torch

from regard.worlds.rooms import RoomClips, Rooms
from regard.worlds.rooms.errors import depth_error, flow_error, match_error, normal_error
from regard.worlds.rooms.matches import correspond, flow

WORLD = Rooms(split="test", count=20, size=(32, 40))


def test_true_maps_have_no_error() -> None:
    for i in range(5):
        a, b = WORLD[i].pair()
        assert depth_error(a.depth, a) == depth_error(a.depth, a, align=True)
        assert depth_error(a.depth, a).rmse == 0
        assert normal_error(a.normals * 3, a).mean < 1e-6
        motion, visible = flow(a, b)
        error = flow_error(motion, a, b)
        assert error.seen == 0
        assert error.outliers == 0
        where = visible.nonzero()
        pixels = where.flip(1).double() + 0.5
        there = correspond(a, b).position[visible]
        matched = match_error(torch.cat([pixels, there], 1), a, b)
        assert matched.seen.all()
        assert matched.off.max() < 1e-9
        assert matched.within(0.001) == 1


def test_maps_that_are_off_by_a_known_amount() -> None:
    a, b = WORLD[1].pair()
    longer = depth_error(a.depth * 1.3, a)
    assert longer.relative == pytest.approx(0.3)
    assert longer.within == 0
    aligned = depth_error(a.depth * 1.3, a, align=True)
    assert aligned.scale == pytest.approx(1 / 1.3)
    assert aligned.rmse == pytest.approx(0, abs=1e-9)
    axis = torch.linalg.cross(
        a.normals, torch.tensor([0.3, 0.5, 0.8]).double()[:, None, None].expand_as(a.normals), dim=0
    )
    axis = axis / axis.norm(dim=0)
    turned = math.cos(math.radians(10)) * a.normals + math.sin(math.radians(10)) * axis
    found = normal_error(turned, a)
    assert (found.mean, found.median, found.within) == (pytest.approx(10), pytest.approx(10), 1)
    assert normal_error(-a.normals, a).mean == pytest.approx(180)
    motion, _ = flow(a, b)
    off = flow_error(motion + torch.tensor([3.0, 4.0])[:, None, None], a, b)
    assert (off.seen, off.hidden) == (pytest.approx(5), pytest.approx(5))


def test_against_loops() -> None:
    world = RoomClips(split="test", size=(16, 24), frames=2)
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        a, b = world[i].pair()
        depth = a.depth * (0.5 + torch.rand(a.depth.shape, generator=generator, dtype=torch.float64))
        motion, visible = flow(a, b)
        guess = motion + 4 * torch.randn(motion.shape, generator=generator, dtype=torch.float64)
        relative, squares, good, seen, hidden, outliers = [], [], [], [], [], []
        for y in range(16):
            for x in range(24):
                d, z = depth[y, x].item(), a.depth[y, x].item()
                relative.append(abs(d - z) / z)
                squares.append((d - z) ** 2)
                good.append(max(d / z, z / d) < 1.25)
                u, v = motion[:, y, x].tolist()
                if math.isnan(u):
                    continue
                error = math.dist((u, v), guess[:, y, x].tolist())
                (seen if visible[y, x] else hidden).append(error)
                outliers.append(error > 3 and error > 0.05 * math.hypot(u, v))
        found, moved = depth_error(depth, a), flow_error(guess, a, b)
        assert found.relative == pytest.approx(sum(relative) / len(relative))
        assert found.rmse == pytest.approx(math.sqrt(sum(squares) / len(squares)))
        assert found.within == pytest.approx(sum(good) / len(good))
        assert moved.seen == pytest.approx(sum(seen) / len(seen))
        assert moved.hidden == pytest.approx(sum(hidden) / len(hidden)) if hidden else math.isnan(moved.hidden)
        assert moved.outliers == pytest.approx(sum(outliers) / len(outliers))


def test_a_match_of_a_hidden_point_is_no_match() -> None:
    for i in range(20):
        a, b = WORLD[i].pair()
        sight = correspond(a, b)
        where = sight.hidden.nonzero()
        if not len(where):
            continue
        pairs = torch.cat([where.flip(1).double() + 0.5, sight.position[sight.hidden]], 1)
        found = match_error(pairs, a, b)
        assert found.off.max() < 1e-9
        assert not found.seen.any()
        assert found.within(5) == 0
        return
    pytest.fail("no point is hidden in any pair")


def test_bad_input_is_refused() -> None:
    a, b = WORLD[0].pair()
    with pytest.raises(ValueError, match=r"depth of shape \(4, 4\) must be \(32, 40\)"):
        depth_error(torch.ones(4, 4), a)
    with pytest.raises(ValueError, match="depth must be positive"):
        depth_error(-a.depth, a)
    with pytest.raises(ValueError, match="normals must not be of length 0"):
        normal_error(torch.zeros(3, 32, 40), a)
    with pytest.raises(ValueError, match=r"flowed of shape \(2, 4, 4\)"):
        flow_error(torch.zeros(2, 4, 4), a, b)
    with pytest.raises(ValueError, match="outside the image"):
        match_error(torch.tensor([[99.0, 1, 1, 1]]), a, b)
