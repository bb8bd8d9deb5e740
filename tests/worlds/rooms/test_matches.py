"""Correspondences, flow, disparity and tracks against projection, epipolar lines, brute force and the images themselves."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.worlds.rooms import RoomClips, Rooms, StereoRooms
from regard.worlds.rooms.cameras import beside, fundamental, homogeneous, look_at
from regard.worlds.rooms.matches import Points, correspond, disparity, flow, locate, pick, see, tracks
from regard.worlds.rooms.scene import Scene
from regard.worlds.rooms.solids import Plane, Sphere
from regard.worlds.rooms.textures import Noise, Plain
from regard.worlds.rooms.views import View, render

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)


def vec(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair(seed: int) -> tuple[View, View]:
    return Rooms(seed=seed, size=(32, 40), spread=70.0)[0].pair()


@quick
@given(seeds)
def test_correspondences_reproject(seed: int) -> None:
    a, b = pair(seed)
    sight = correspond(a, b)
    front = sight.depth > 0.05
    world = a.camera.lift(a.camera.pixels(), a.depth)
    back = b.camera.lift(sight.position[front], sight.depth[front])
    assert (back - world[front]).abs().max() < 1e-8
    pixels, _ = a.camera.project(back)
    assert (pixels - a.camera.pixels()[front]).abs().max() < 1e-6
    assert (sight.position[~front & (sight.depth <= 0)]).isnan().all()


@quick
@given(seeds)
def test_correspondences_lie_on_epipolar_lines(seed: int) -> None:
    a, b = pair(seed)
    sight = correspond(a, b)
    xa, xb = homogeneous(a.camera.pixels())[sight.inside], homogeneous(sight.position)[sight.inside]
    line = xa @ fundamental(a.camera, b.camera).mT
    assert sight.inside.any()
    assert ((xb * line).sum(1) / line[:, :2].norm(dim=1)).abs().max() < 1e-6


@quick
@given(seeds)
def test_depth_lies_on_the_surface_it_names(seed: int) -> None:
    a, _ = pair(seed)
    points = a.camera.lift(a.camera.pixels(), a.depth)
    for i in a.ids.unique().tolist():
        assert a.scene.solids[i].distance(points[a.ids == i]).abs().max() < 1e-9
    assert a.scene.distance(points).abs().max() < 1e-9


@quick
@given(seeds)
def test_visible_is_a_clear_line_of_sight(seed: int) -> None:
    """Marching from the camera to the point: the signed distance stays positive on the way exactly where it is visible."""
    a, b = pair(seed)
    sight = correspond(a, b)
    world = a.camera.lift(a.camera.pixels(), a.depth)[sight.inside]
    eye, steps = b.camera.centre, torch.linspace(0, 1, 300, dtype=torch.float64)[:-1]
    deepest = torch.full((len(world),), math.inf, dtype=torch.float64)
    for s in steps:
        deepest = torch.minimum(deepest, b.scene.distance(eye + s * (world - eye)))
    visible = sight.visible[sight.inside]
    assert (deepest[visible] > 0).all()
    assert not visible[deepest < -1e-6].any()
    grazing = (~visible & (deepest > 0)).float().mean()
    assert grazing < 0.02


@quick
@given(seeds)
def test_a_visible_point_is_what_the_other_view_shows_there(seed: int) -> None:
    a, b = pair(seed)
    sight = correspond(a, b)
    visible = sight.visible
    depth, ids = b.scene.cast(b.camera, sight.position[visible])
    colours, _ = b.scene.shade(b.camera.lift(sight.position[visible], depth), ids)
    same = ids == a.ids[visible]
    assert same.float().mean() > 0.99
    assert (depth - sight.depth[visible]).abs().max() < 1e-5
    off = (colours[same] - a.image.permute(1, 2, 0)[visible][same]).abs().amax(1)
    assert (off < 1e-5).float().mean() > 0.995


@quick
@given(seeds)
def test_hidden_points_have_something_before_them(seed: int) -> None:
    a, b = pair(seed)
    sight = correspond(a, b)
    first, _ = b.scene.cast(b.camera, sight.position[sight.hidden])
    assert (first < sight.depth[sight.hidden]).all()
    assert not (sight.hidden & sight.visible).any()
    assert not (sight.visible & ~sight.inside).any()


def smooth_pair() -> tuple[View, View]:
    """A smooth wall behind a smooth ball, from two places."""
    g = torch.Generator().manual_seed(3)
    noise = [
        Noise(
            vec(1, 0.2, 0.1),
            vec(0.1, 0.5, 1),
            2.5 * torch.randn(3, 8, generator=g).double(),
            6 * torch.rand(8, generator=g).double(),
        )
        for _ in "ab"
    ]
    facing = torch.tensor([[1, 0, 0], [0, 0, -1], [0, 1, 0]]).double()
    scene = Scene(
        (
            Plane(name="wall", texture=noise[0], position=vec(0, 2, 0), rotation=facing),
            Sphere(name="ball", texture=noise[1], position=vec(0, 0, 0), radius=0.6),
        ),
        light=vec(0, -1, 0),
    )
    return tuple(render(scene, look_at(vec(x, -3, 0.4), vec(0, 0, 0), (96, 96))) for x in (-0.8, 0.7))


def test_a_warped_image_is_the_other_view_where_visible() -> None:
    a, b = smooth_pair()
    sight = correspond(a, b)
    grid = (2 * sight.position / 96 - 1).float()[None]
    warped = F.grid_sample(b.image[None], grid.nan_to_num(9), align_corners=False)[0]
    cells = F.grid_sample(b.ids[None, None].float(), grid.nan_to_num(9), align_corners=False)[0, 0]
    clean = sight.visible & (cells == a.ids) & (sight.position > 0.5).all(-1) & (sight.position < 95.5).all(-1)
    assert clean.sum() > 4000
    error = (warped - a.image).abs().amax(0)
    assert error[clean].max() < 0.03
    assert error[clean].mean() < 2e-3
    assert error[sight.hidden].mean() > 0.05
    assert sight.hidden.sum() > 200


@quick
@given(seeds)
def test_flow_of_a_room_at_rest_is_the_cameras(seed: int) -> None:
    clip = RoomClips(seed=seed, size=(24, 32), frames=3, movers=0)[0]
    a, b = clip.pair(0, 2)
    uv, visible = flow(a, b)
    x = homogeneous(a.camera.pixels()) @ torch.linalg.inv(a.camera.K).mT * a.depth[..., None]
    turn = b.camera.R @ a.camera.R.mT
    moved = (x @ turn.mT + b.camera.t - turn @ a.camera.t) @ b.camera.K.mT
    expected = moved[..., :2] / moved[..., 2:] - a.camera.pixels()
    front = moved[..., 2] > 0.05
    assert visible.any()
    torch.testing.assert_close(uv.permute(1, 2, 0)[front], expected[front], rtol=1e-9, atol=1e-7)


def test_flow_of_a_moving_ball_by_hand() -> None:
    """A ball that slides 0.3 m to the right, parallel to the image, before a wall at rest, seen by a camera at rest."""
    a, _ = smooth_pair()
    wall, ball = a.scene.solids
    scene = replace(a.scene, solids=(wall, replace(ball, velocity=vec(0.6, 0, 0))))
    eye = look_at(vec(0, -3, 0), vec(0, 0, 0), (64, 64), fov=60.0)
    now, later = render(scene, eye), render(scene, eye, 0.5)
    uv, visible = flow(now, later)
    on = now.ids == 1
    f = 32 / math.tan(math.radians(30))
    torch.testing.assert_close(uv[0][on], f * 0.3 / now.depth[on])
    assert uv[1][on].abs().max() < 1e-9
    assert uv[:, ~on].abs().max() < 1e-9
    assert torch.equal(visible[~on], later.ids[~on] == 0)
    assert visible[on].float().mean() > 0.9


@quick
@given(seeds)
def test_forward_and_backward_flow_cancel(seed: int) -> None:
    clip = RoomClips(seed=seed, size=(24, 32), frames=4)[0]
    a, b = clip.pair(1, 3)
    there = correspond(a, b)
    back = see(pick(b, there.position[there.visible]), a)
    off = (back.position - a.camera.pixels()[there.visible]).norm(dim=1)
    assert (off < 1e-4).float().mean() > 0.99
    assert back.visible[off < 1e-4].float().mean() > 0.99


@quick
@given(seeds)
def test_disparity(seed: int) -> None:
    world = StereoRooms(seed=seed, size=(24, 40))
    left, right = world[0].pair()
    d, visible = disparity(left, right)
    sight = correspond(left, right)
    torch.testing.assert_close(sight.position[..., 1], left.camera.pixels()[..., 1], rtol=0, atol=1e-9)
    torch.testing.assert_close(left.camera.pixels()[..., 0] - sight.position[..., 0], d, rtol=0, atol=1e-8)
    torch.testing.assert_close(d, left.camera.K[0, 0] * 0.25 / left.depth, rtol=1e-12, atol=0)
    assert (d > 0).all()
    assert torch.equal(visible, sight.visible)


def test_disparity_needs_a_rectified_pair() -> None:
    left, right = StereoRooms(size=(24, 24))[0].pair()
    for a, b in ((right, left), (left, left), Rooms(size=(24, 24))[0].pair(), (left, replace(right, time=1.0))):
        with pytest.raises(ValueError, match="own x axis only"):
            disparity(a, b)


@quick
@given(seeds)
def test_tracks_follow_their_solids(seed: int) -> None:
    views = RoomClips(seed=seed, size=(32, 32), frames=5, movers=3)[0].views
    g = torch.Generator().manual_seed(seed)
    pixels = 32 * torch.rand(60, 2, generator=g, dtype=torch.float64)
    found = tracks(views, pixels, frame=2)
    points = pick(views[2], pixels)
    assert found.position.shape == (5, 60, 2)
    torch.testing.assert_close(found.position[2], pixels, rtol=0, atol=1e-7)
    assert found.visible[2].all()
    for t, view in enumerate(views):
        start = Points(points.ids, points.local)
        where = locate(start, view)
        for i in points.ids.unique().tolist():
            solid, before = view.scene.solids[i], views[2].scene.solids[i]
            on = points.ids == i
            assert solid.distance(where[on]).abs().max() < 1e-9
            shift = (where - locate(start, views[2]))[on]
            if not before.spin.any():
                expected = (view.time - views[2].time) * before.velocity
                torch.testing.assert_close(shift, expected.expand_as(shift), rtol=0, atol=1e-9)
        shown = found.visible[t]
        depth, ids = view.scene.cast(view.camera, found.position[t][shown])
        assert (depth - found.depth[t][shown]).abs().max() < 1e-5
        assert (ids == points.ids[shown]).float().mean() > 0.95


def test_a_ball_that_passes_behind_another_is_lost_and_found() -> None:
    front = Sphere(name="front", texture=Plain(vec(1, 0, 0)), position=vec(0, -1, 0), radius=0.25)
    back = Sphere(name="back", texture=Plain(vec(0, 0, 1)), position=vec(-1, 1, 0), radius=0.2, velocity=vec(2, 0, 0))
    eye = look_at(vec(0, -4, 0), vec(0, 0, 0), (64, 64), fov=60.0)
    views = [render(Scene((front, back), vec(0, -1, 0)), eye, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    centre, _ = eye.project(vec(-1, 1, 0)[None])
    found = tracks(views, centre)
    assert found.visible[:, 0].tolist() == [True, True, False, True, True]
    assert found.inside.all()
    assert found.hidden[2, 0]
    assert not (views[2].ids == 1).any()


def test_points_of_nothing() -> None:
    ball = Sphere(name="ball", texture=Plain(vec(1, 0, 0)), position=vec(0, 0, 0), radius=0.5)
    scene = Scene((ball,), vec(0, -1, 0))
    a, b = (render(scene, look_at(vec(x, -3, 0), vec(0, 0, 0), (24, 24))) for x in (0, 1))
    sight = correspond(a, b)
    nothing = a.ids == -1
    assert nothing.any()
    assert sight.position[nothing].isnan().all()
    assert not sight.inside[nothing].any()
    assert not sight.visible[nothing].any()
    assert sight.visible[~nothing].any()


def test_bad_input() -> None:
    a, b = pair(0)
    with pytest.raises(ValueError, match="outside the image of 40 x 32"):
        pick(a, vec(40.0, 3.0)[None])
    with pytest.raises(ValueError, match="frame=2 is not among the 2 views"):
        tracks([a, b], vec(3.0, 3.0)[None], frame=2)
    inside = beside(a.camera, 20.0)
    with pytest.raises(ValueError, match=r"the camera at .* is inside"):
        render(a.scene, inside)
