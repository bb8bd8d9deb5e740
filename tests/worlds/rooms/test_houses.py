"""Clouds of points: on their surfaces, even by area, in their rooms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from regard.worlds.rooms import Houses
from regard.worlds.rooms.furnish import vector
from regard.worlds.rooms.houses import area, scatter
from regard.worlds.rooms.solids import Box, Plane, Sphere
from regard.worlds.rooms.textures import Plain

PLACE = vector((0.5, 0.5, 0.5))
GREY = Plain(PLACE)
BALL = Sphere(name="ball", texture=GREY, position=PLACE, radius=0.7)
BOX = Box(name="box", texture=GREY, position=PLACE, half=vector((0.2, 0.5, 1.0)))
FLOOR = Plane(name="floor", texture=GREY, position=PLACE)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_points_lie_on_their_solids_and_in_their_rooms(seed: int) -> None:
    house = Houses(seed=seed, points=500)[0]
    assert house.position.shape == house.colour.shape == house.normal.shape == (500, 3)
    assert len(set(house.rooms)) == 6
    for i, solid in enumerate(house.solids):
        x = house.position[house.ids == i]
        assert (solid.distance(x).abs() < 1e-9).all()
        x0, y0, x1, y1 = house.bounds[house.room[i]]
        assert ((x[:, 0] >= x0) & (x[:, 0] <= x1) & (x[:, 1] >= y0) & (x[:, 1] <= y1)).all()
        out = x + 1e-3 * house.normal[house.ids == i]
        torch.testing.assert_close(solid.distance(out), torch.full((len(x),), 1e-3).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(house.colour[house.ids == i], solid.texture(solid.local(x)))
    for a in range(6):
        for b in range(a):
            one, two = house.bounds[a], house.bounds[b]
            assert one[2] < two[0] or two[2] < one[0] or one[3] < two[1] or two[3] < one[1]


def test_areas_by_hand() -> None:
    assert area(BALL, (3.0, 4.0)) == pytest.approx(math.pi * 1.96)
    assert area(BOX, (3.0, 4.0)) == pytest.approx(2 * (0.4 * 1 + 0.4 * 2 + 1 * 2))
    assert area(FLOOR, (3.0, 4.0)) == 12


def test_points_are_even_over_each_surface() -> None:
    rng = np.random.default_rng(0)
    ball = (scatter(rng, BALL, (1.0, 1.0), 4000) - PLACE) / 0.7
    assert stats.kstest(ball[:, 2], stats.uniform(-1, 2).cdf).pvalue > 1e-3
    floor = scatter(rng, FLOOR, (3.0, 4.0), 4000) - PLACE
    assert stats.kstest(floor[:, 0], stats.uniform(-1.5, 3).cdf).pvalue > 1e-3
    assert stats.kstest(floor[:, 1], stats.uniform(-2, 4).cdf).pvalue > 1e-3
    box = scatter(rng, BOX, (1.0, 1.0), 4000) - PLACE
    face = ((box.abs() - BOX.half).abs() < 1e-12).float().argmax(1).bincount(minlength=3).numpy()
    expected = np.array([1 * 2, 0.4 * 2, 0.4 * 1])
    assert stats.chisquare(face, 4000 * expected / expected.sum()).pvalue > 1e-3
    on_top = box[(box[:, 2].abs() - 1).abs() < 1e-12]
    assert 0.4 < (on_top[:, 2] > 0).double().mean() < 0.6


def test_points_are_even_over_the_house() -> None:
    house = Houses(points=20000)[2]
    sides = house.bounds[:, 2:] - house.bounds[:, :2]
    areas = np.array([area(s, tuple(sides[r].tolist())) for s, r in zip(house.solids, house.room.tolist())])
    counts = house.ids.bincount(minlength=len(areas)).numpy()
    assert stats.chisquare(counts, 20000 * areas / areas.sum()).pvalue > 1e-3


def test_things_are_named_by_room() -> None:
    house = Houses(grid=(1, 2), objects=(2, 2), points=10)[0]
    assert len(house.solids) == 6
    assert len(house.things) == 4
    assert [room for room, _ in house.things] == [house.rooms[0]] * 2 + [house.rooms[1]] * 2
    panels = Houses().panels(house)
    assert panels["from above"].shape == panels["solids"].shape
    assert all(name in panels["things"] for _, name in house.things)


def test_a_house_is_its_number_and_nothing_else() -> None:
    world = Houses(points=50)
    assert torch.equal(world[3].position, replace(world)[3].position)
    assert not torch.equal(world[3].position, world[4].position)
    assert not torch.equal(world[3].position, replace(world, seed=2)[3].position)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"grid": (0, 2)}, r"grid=\(0, 2\)"),
        ({"grid": (2, 5)}, r"grid=\(2, 5\) must be rows and columns of 1 to 9"),
        ({"objects": (2, 1)}, r"objects=\(2, 1\)"),
        ({"points": 0}, "points=0"),
    ],
)
def test_bad_houses(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Houses(**arguments)
