"""The worlds of rooms: the same for the same seed, free of collisions, and what they promise."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from regard.worlds.rooms import RingRooms, Room, RoomClips, Rooms, StereoRooms
from regard.worlds.rooms.furnish import COLOURS, STYLES, furnish
from regard.worlds.rooms.matches import correspond
from regard.worlds.rooms.solids import Sphere
from regard.worlds.rooms.views import nearer
from regard.worlds.world import World

WORLDS = [Rooms(views=3), StereoRooms(), RoomClips(frames=4), RingRooms(views=4, frames=2, movers=2)]
small = [replace(world, size=(24, 32)) for world in WORLDS]
quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 10**6)


def same(a: Room, b: Room) -> bool:
    return a.caption == b.caption and all(
        torch.equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.views, b.views, strict=True)
        for name in ("image", "depth", "normals", "ids")
    )


@pytest.mark.parametrize("world", small, ids=lambda w: type(w).__name__)
def test_a_sample_is_its_number_and_nothing_else(world: World[Room]) -> None:
    again = replace(world)
    assert same(world[3], again[3])
    assert same(world[0], again[0])
    assert not same(world[3], world[4])
    assert not same(world[3], replace(world, seed=1)[3])
    assert not same(world[3], replace(world, split="test")[3])


@pytest.mark.parametrize("world", small, ids=lambda w: type(w).__name__)
def test_fields(world: World[Room]) -> None:
    room = world[1]
    for view in room.views:
        assert view.image.shape == view.normals.shape == (3, 24, 32)
        assert view.depth.shape == view.ids.shape == (24, 32)
        assert view.image.dtype == torch.float32
        assert view.depth.dtype == view.normals.dtype == torch.float64
        assert view.image.min() >= 0
        assert view.image.max() <= 1
        assert view.depth.isfinite().all()
        assert (view.ids >= 0).all()
        torch.testing.assert_close(view.normals.norm(dim=0), torch.ones(24, 32).double())
        assert [s.name for s in view.scene.solids] == [s.name for s in room.scene.solids]
    panels = world.panels(room)
    for panel in panels.values():
        assert isinstance(panel, str) or (panel.shape == (3, 24, 32) and panel.min() >= 0 and panel.max() <= 1)


def test_another_size_is_the_same_room() -> None:
    low, high = (Rooms(size=size)[5] for size in ((32, 40), (96, 120)))
    assert low.caption == high.caption
    for a, b in zip(low.views, high.views):
        torch.testing.assert_close(a.depth, b.depth[1::3, 1::3], rtol=1e-9, atol=0)
        torch.testing.assert_close(a.image, b.image[:, 1::3, 1::3])


def test_more_views_keep_the_first_ones() -> None:
    two, four = Rooms(size=(24, 24))[2], Rooms(size=(24, 24), views=4)[2]
    assert len(four.views) == 4
    assert same(two, replace(four, views=four.views[:2]))


@quick
@given(seeds, st.sampled_from(STYLES), st.integers(0, len(COLOURS)))
def test_things_stand_apart_on_the_floor_inside_the_walls(seed: int, style: str, count: int) -> None:
    import numpy as np

    scene, extent = furnish(np.random.default_rng(seed), style, (count, count), movers=3)
    assert len(scene.solids) == 6 + count
    for time in (0.0, 0.3, 1.0):
        things = scene.at(time).solids[6:]
        surfaces = []
        for solid in things:
            if isinstance(solid, Sphere):
                direction = torch.nn.functional.normalize(torch.randn(400, 3).double(), dim=1)
                surfaces.append(solid.world(solid.radius * direction))
                assert solid.position[2].item() == pytest.approx(solid.radius)
            else:
                corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3) * solid.half
                surfaces.append(solid.world(corners))
                assert surfaces[-1][:, 2].min().abs() < 1e-9
            assert (surfaces[-1][:, :2].abs() <= torch.tensor(extent[:2]) / 2 + 1e-9).all()
            assert surfaces[-1][:, 2].max() < extent[2]
        for i, points in enumerate(surfaces):
            for j, other in enumerate(things):
                assert i == j or (other.distance(points) > 0).all()


@quick
@given(seeds)
def test_cameras_are_clear_of_everything(seed: int) -> None:
    for world, least in zip(small, (0.35, 0.05, 0.35, 0.25)):
        for view in replace(world, seed=seed, objects=(8, 8))[0].views:
            assert view.scene.distance(view.camera.centre) > least


def test_views_overlap_and_hide() -> None:
    sights = [correspond(*Rooms(size=(32, 32), spread=60.0)[i].pair()) for i in range(20)]
    assert torch.stack([s.inside.float().mean() for s in sights]).mean() > 0.5
    assert torch.stack([s.hidden.float().mean() for s in sights]).mean() > 0.02


def test_spread_bounds_the_directions_of_the_cameras() -> None:
    for spread in (0.0, 40.0):
        for i in range(5):
            room = Rooms(size=(16, 16), views=4, spread=spread)[i]
            eyes = torch.stack([v.camera.centre[:2] for v in room.views])
            angles = torch.atan2(eyes[:, 1], eyes[:, 0])
            apart = (angles[:, None] - angles + math.pi) % (2 * math.pi) - math.pi
            assert apart.abs().max() <= math.radians(spread) + 1e-9


def test_stereo_pairs_stand_side_by_side() -> None:
    left, right = StereoRooms(size=(16, 16), baseline=0.1)[0].pair()
    assert (left.camera.centre - right.camera.centre).norm().item() == pytest.approx(0.1)


def test_clips_move() -> None:
    rooms = [RoomClips(size=(16, 16), frames=3)[i] for i in range(20)]
    moving = [sum(bool(s.velocity.any()) for s in room.scene.solids) for room in rooms]
    assert set(moving) <= {0, 1, 2}
    assert sum(moving) > 15
    assert [v.time for v in rooms[0].views] == [0, 0.5, 1]
    assert (rooms[0].views[0].camera.centre - rooms[0].views[2].camera.centre).norm() > 0.01


def test_a_ring_looks_all_around_with_the_overlap_asked_for() -> None:
    world = RingRooms(size=(16, 64), views=6, overlap=0.2, frames=2)
    room = world[0]
    assert [v.time for v in room.views] == [0] * 6 + [1] * 6
    axes = torch.stack([v.camera.R[2] for v in room.views[:6]])
    assert axes.sum(0).norm() < 1e-9
    seen = world.fov
    assert math.degrees(math.acos(axes[0] @ axes[1])) == pytest.approx(60)
    assert (seen - 60) / seen == pytest.approx(0.2)
    f = room.views[0].camera.K[0, 0].item()
    assert 2 * math.degrees(math.atan(32 / f)) == pytest.approx(seen)


def test_style_and_caption() -> None:
    room = Rooms(size=(16, 16), style="cellar", objects=(2, 2))[0]
    assert room.style == "cellar"
    assert room.caption.startswith("a cellar with a")
    assert all(s.name in room.caption for s in room.scene.solids[6:])
    assert Rooms(size=(16, 16), objects=(0, 0))[0].caption.endswith("nothing in it")
    assert {Rooms(size=(16, 16))[i].style for i in range(30)} == set(STYLES)


def test_who_is_nearer() -> None:
    for i in range(10):
        view = Rooms(size=(48, 48), objects=(6, 6))[i].views[0]
        pairs = nearer(view)
        names = [s.name for s in view.scene.solids]
        for a, b in pairs:
            near, far = (view.depth[view.ids == names.index(name)] for name in (a, b))
            assert near.median() * 1.1 < far.median()
            assert names.index(a) >= 6 <= names.index(b)
            assert (b, a) not in pairs
        seen = sorted({names[j] for j in view.ids.unique().tolist() if j >= 6})
        assert len(nearer(view, factor=1.0)) == len(seen) * (len(seen) - 1) // 2


def test_points_are_on_the_surfaces() -> None:
    view = RoomClips(size=(16, 16), frames=2)[0].views[1]
    assert view.points.shape == (16, 16, 3)
    assert view.scene.distance(view.points).abs().max() < 1e-9


def test_occupancy_of_a_room() -> None:
    room = Rooms(size=(16, 16), objects=(4, 4))[1]
    lower, upper = room.bounds
    grid = room.scene.occupancy(lower, upper, (32, 32, 16))
    assert set(grid.unique().tolist()) <= {-1, *range(6, 10)}
    volume = (upper - lower).prod() / grid.numel()
    for i, solid in enumerate(room.scene.solids[6:], 6):
        exact = 4 / 3 * math.pi * solid.radius**3 if isinstance(solid, Sphere) else 8 * solid.half.prod().item()
        assert ((grid == i).sum() * volume).item() == pytest.approx(exact, rel=0.5, abs=0.03)


def test_two_views_are_needed_for_a_pair() -> None:
    one = Rooms(size=(16, 16), views=1)[0]
    with pytest.raises(ValueError, match="two different ones of the room's 1 are needed"):
        one.pair()
    with pytest.raises(ValueError, match="views 0 and 0"):
        Rooms(size=(16, 16))[0].pair(0, 0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Rooms(size=(8, 64)), r"size=\(8, 64\) is too small"),
        (lambda: Rooms(objects=(3, 9)), r"objects=\(3, 9\)"),
        (lambda: Rooms(objects=(3, 2)), r"objects=\(3, 2\)"),
        (lambda: Rooms(style="attic"), "attic"),
        (lambda: Rooms(views=0), "views=0"),
        (lambda: Rooms(spread=400.0), r"spread=400\.0"),
        (lambda: Rooms(fov=180.0), r"fov=180\.0"),
        (lambda: Rooms(split="dev"), "split='dev'"),
        (lambda: StereoRooms(baseline=0.0), r"baseline=0\.0"),
        (lambda: RoomClips(frames=1), "frames=1"),
        (lambda: RoomClips(movers=-1), "movers=-1"),
        (lambda: RingRooms(views=2), "views=2"),
        (lambda: RingRooms(views=3, overlap=0.5), r"overlap=0\.5, views=3 need 240 degrees"),
    ],
)
def test_bad_worlds(make, match: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=match):
        make()
