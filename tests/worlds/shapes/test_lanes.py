"""Lines, ground and vehicles against each other."""

import numpy as np
import pytest

from regard.worlds.shapes.lanes import HORIZON, VEHICLES, Lanes, across

SAMPLES = [Lanes()[i] for i in range(25)]


def test_distance_to_a_line_by_hand() -> None:
    line = np.array([[2.5, 0.5], [2.5, 8.5]])
    distance = across(line, (10, 6))
    assert distance[4].tolist() == [2, 1, 0, 1, 2, 3]
    assert distance[9, 2] == pytest.approx(1)


def test_lines_rise_to_the_horizon_and_keep_their_order() -> None:
    for sample in SAMPLES:
        assert 2 <= len(sample.seen) <= 5
        y = sample.lanes[..., 1]
        assert (y.diff(dim=1) < 0).all()
        assert y[:, 0].eq(96).all()
        np.testing.assert_allclose(y[:, -1], HORIZON * 96, atol=1e-4)
        assert (sample.lanes[..., 0].diff(dim=0) > 0).all()
        assert not sample.dashed[0]
        assert not sample.dashed[-1]


def test_points_are_on_their_masks_and_lines_are_bright() -> None:
    for sample in SAMPLES:
        masks = sample.masks()
        assert masks.shape[1:] == (96, 192)
        for lane, seen, mask, visible in zip(sample.lanes, sample.seen, masks, sample.visible):
            for (x, y), there in zip(lane.tolist(), seen.tolist()):
                if there and y < 95:
                    assert mask[int(y), int(x)]
            assert not (visible & ~mask).any()
            assert visible.any()
            assert sample.image[:, visible].mean() > 0.6


def test_the_ground_is_between_the_outer_lines() -> None:
    for sample in SAMPLES:
        for row in (50, 70, 90):
            outer = [
                np.interp(row + 0.5, line[:, 1].flip(0), line[:, 0].flip(0))
                for line in (sample.lanes[0], sample.lanes[-1])
            ]
            inside = sample.drivable[row].nonzero().flatten()
            if len(inside):
                assert inside.min() + 0.5 >= max(0, outer[0]) - 1e-6
                assert inside.max() + 0.5 <= min(192, outer[1]) + 1e-6
        assert not sample.drivable[: int(HORIZON * 96) - 1].any()


def test_vehicles_are_seen_and_hide_lines() -> None:
    hidden = 0
    for sample in SAMPLES:
        vehicles = sample.vehicles
        assert [VEHICLES[c] for c in sample.vehicle_classes.tolist()] == [t.shape for t in vehicles.scene.things]
        assert not (sample.visible & (vehicles.index > 0)).any()
        assert vehicles.boxes.shape == (len(vehicles.scene.things), 4)
        hidden += len(vehicles.scene.things)
    assert hidden > 10
