"""Cameras, solids and scenes of rooms against implicit equations, brute force and textbook identities."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from regard.worlds.rooms.cameras import (
    Camera,
    beside,
    cross_matrix,
    essential,
    fundamental,
    homogeneous,
    homography,
    intrinsics,
    look_at,
    relative,
)
from regard.worlds.rooms.scene import Scene, voxel_centres
from regard.worlds.rooms.solids import Box, Plane, Solid, Sphere
from regard.worlds.rooms.textures import Checker, Noise, Plain
from regard.worlds.rooms.views import render

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
GREY = Plain(torch.full((3,), 0.5, dtype=torch.float64))
UP = torch.tensor([0.0, 0, 1], dtype=torch.float64)


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(g: torch.Generator) -> torch.Tensor:
    return torch.linalg.matrix_exp(cross_matrix(torch.randn(3, generator=g, dtype=torch.float64)))


def camera(g: torch.Generator, size: tuple[int, int] = (24, 32)) -> Camera:
    u = torch.rand(5, generator=g, dtype=torch.float64)
    K = intrinsics(*size, 40 + 60 * u[0].item())
    K[1, 1] *= 0.8 + 0.4 * u[1]
    K[:2, 2] += 6 * u[2:4] - 3
    K[0, 1] = u[4] - 0.5
    return Camera(K, rotation(g), 3 * torch.randn(3, generator=g, dtype=torch.float64), *size)


def solids(g: torch.Generator) -> list[Solid]:
    """One of each, turned and moved."""
    common = [
        {"name": "x", "texture": GREY, "position": torch.randn(3, generator=g).double(), "rotation": rotation(g)}
        for _ in "abc"
    ]
    half = 0.3 + torch.rand(3, generator=g, dtype=torch.float64)
    return [Sphere(**common[0], radius=0.7), Box(**common[1], half=half), Plane(**common[2])]


# --- cameras -------------------------------------------------------------------------------------------------------


def test_a_point_by_hand() -> None:
    eye = look_at(vec(0, -2, 1), vec(0, 0, 1), (20, 40), fov=90.0)
    f = 20.0
    pixels, depth = eye.project(torch.stack([vec(0, 0, 1), vec(1, 0, 1), vec(0, 2, 2), vec(0, -3, 1)]))
    assert depth.tolist() == pytest.approx([2, 2, 4, -1])
    assert pixels[:3].flatten().tolist() == pytest.approx([20, 10, 20 + f / 2, 10, 20, 10 - f / 4])
    assert pixels[3].isnan().all()
    assert eye.pixels()[0, 0].tolist() == [0.5, 0.5]
    assert eye.pixels()[3, 7].tolist() == [7.5, 3.5]
    assert eye.centre.tolist() == pytest.approx([0, -2, 1])


@quick
@given(seeds)
def test_lift_undoes_project_and_poses_are_inverse(seed: int) -> None:
    g = draws(seed)
    c = camera(g)
    pixels = 40 * torch.rand(50, 2, generator=g, dtype=torch.float64) - 5
    depth = 0.1 + 9 * torch.rand(50, generator=g, dtype=torch.float64)
    back, z = c.project(c.lift(pixels, depth))
    torch.testing.assert_close(back, pixels, rtol=0, atol=1e-9)
    torch.testing.assert_close(z, depth, rtol=0, atol=1e-11)
    torch.testing.assert_close(c.world_to_camera @ c.camera_to_world, torch.eye(4).double(), rtol=0, atol=1e-12)
    by_matrix = (c.world_to_camera @ homogeneous4(c.lift(pixels, depth)).mT).mT[:, :3] @ c.K.mT
    torch.testing.assert_close(by_matrix[:, :2] / by_matrix[:, 2:], pixels, rtol=0, atol=1e-9)


def homogeneous4(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


@quick
@given(seeds)
def test_epipolar_geometry(seed: int) -> None:
    g = draws(seed)
    a, b = camera(g), camera(g)
    points = 6 * torch.randn(60, 3, generator=g, dtype=torch.float64)
    xa, xb = (points @ c.R.mT + c.t for c in (a, b))
    E, F = essential(a, b), fundamental(a, b)
    assert ((xb @ E) * xa).sum(1).abs().max() < 1e-10 * (xa.norm(dim=1) * xb.norm(dim=1)).max() * E.norm()
    front = (xa[:, 2] > 0.1) & (xb[:, 2] > 0.1)
    pa, pb = (homogeneous(c.project(points[front])[0]) for c in (a, b))
    line = pa @ F.mT
    off = ((pb * line).sum(1) / line[:, :2].norm(dim=1)).abs()
    assert (off < 1e-6).all()
    values = torch.linalg.svdvals(E)
    torch.testing.assert_close(values, values[0] * vec(1, 1, 0), rtol=0, atol=1e-9)
    epipole = (
        homogeneous(b.project(a.centre[None])[0])[0] if (b.R @ a.centre + b.t)[2] > 0 else b.K @ (b.R @ a.centre + b.t)
    )
    assert (epipole @ F).norm() < 1e-9 * epipole.norm() * F.norm()


@quick
@given(seeds)
def test_homography_of_a_plane(seed: int) -> None:
    g = draws(seed)
    a, b = camera(g), camera(g)
    n = torch.nn.functional.normalize(torch.randn(3, generator=g, dtype=torch.float64), dim=0)
    spanned = torch.linalg.svd(n[None]).Vh[1:]
    x = 2.0 * n + torch.randn(40, 2, generator=g, dtype=torch.float64) @ spanned
    world = (x - a.t) @ a.R
    (pa, za), (pb, zb) = a.project(world), b.project(world)
    keep = (za > 0.2) & (zb > 0.2)
    mapped = homogeneous(pa[keep]) @ homography(a, b, n, 2.0).mT
    torch.testing.assert_close(mapped[:, :2] / mapped[:, 2:], pb[keep], rtol=1e-7, atol=1e-6)


def test_roll_turns_the_camera_clockwise_as_seen_from_behind() -> None:
    eye, target = vec(0, -2, 1), vec(0, 0, 1)
    turned = look_at(eye, target, (20, 20), fov=90.0, roll=math.pi / 2)
    pixels, _ = turned.project(torch.stack([target, vec(1, 0, 1)]))
    assert pixels[0].tolist() == pytest.approx([10, 10])
    assert pixels[1].tolist() == pytest.approx([10, 5])


def test_right_camera_is_on_the_right() -> None:
    left = look_at(vec(1, -2, 1), vec(0, 0, 0.5), (32, 32))
    right = beside(left, 0.2)
    R, t = relative(left, right)
    torch.testing.assert_close(R, torch.eye(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(t, vec(-0.2, 0, 0), rtol=0, atol=1e-12)
    assert left.project(right.centre[None] + left.R[2])[0][0, 0] > 16


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"K": torch.eye(3)[:2]}, "K"),
        ({"K": torch.diag(vec(0, 5, 1))}, "positive focal"),
        ({"K": torch.diag(vec(5, 5, 2))}, "1 in the corner"),
        ({"R": torch.diag(vec(1, 1, -1))}, "must be a rotation"),
        ({"R": 1.01 * torch.eye(3).double()}, "must be a rotation"),
        ({"t": vec(0, 0, math.nan)}, "t of shape"),
        ({"width": 15}, "too small"),
    ],
)
def test_bad_cameras(change: dict, match: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=match):
        replace(look_at(vec(0, -2, 1), vec(0, 0, 1), (20, 40)), **change)


def test_bad_rigs() -> None:
    with pytest.raises(ValueError, match="aside of eye"):
        look_at(vec(0, 0, 2), vec(0, 0, 0), (20, 20))
    with pytest.raises(ValueError, match=r"fov=180"):
        intrinsics(20, 20, 180.0)
    eye = look_at(vec(0, -2, 1), vec(0, 0, 1), (20, 20))
    with pytest.raises(ValueError, match="baseline=0"):
        beside(eye, 0.0)
    with pytest.raises(ValueError, match="offset=0"):
        homography(eye, eye, UP, 0.0)


# --- solids --------------------------------------------------------------------------------------------------------


def implicit(solid: Solid, points: torch.Tensor) -> torch.Tensor:
    """The solid's equation in its own frame, written out again; zero on the surface, negative inside."""
    x = torch.linalg.solve(solid.rotation, (points - solid.position).mT).mT
    if isinstance(solid, Sphere):
        return x.square().sum(1) - solid.radius**2
    if isinstance(solid, Box):
        return (x.abs() / solid.half).amax(1) - 1
    return x[:, 2]


@quick
@given(seeds)
def test_rays_enter_on_the_surface_and_nowhere_before(seed: int) -> None:
    g = draws(seed)
    for solid in solids(g):
        origin = solid.position + 4 * torch.nn.functional.normalize(torch.randn(3, generator=g).double(), dim=0)
        if solid.distance(origin) <= 0.05:
            continue
        rays = torch.nn.functional.normalize(solid.position - origin + torch.randn(200, 3, generator=g).double(), dim=1)
        s = solid.enter(origin, rays)
        hit = s.isfinite()
        assert hit.any()
        assert implicit(solid, origin + s[hit, None] * rays[hit]).abs().max() < 1e-9
        steps = torch.linspace(0, 1, 400, dtype=torch.float64)[:-1]
        far = torch.where(hit, s, 12.0)
        way = origin + (steps[:, None] * far)[..., None] * rays
        first = implicit(solid, way.flatten(0, 1))
        assert first.min() > -1e-12


@quick
@given(seeds)
def test_distance_is_that_to_the_nearest_of_many_surface_points(seed: int) -> None:
    g = draws(seed)
    sphere, box, _ = solids(g)
    x = box.position + 1.5 * torch.randn(30, 3, generator=g, dtype=torch.float64)
    grid = torch.linspace(-1, 1, 61, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    faces = [torch.stack([a, b, torch.full_like(a, s)], -1).roll(k, -1) for s in (-1.0, 1.0) for k in range(3)]
    surface = box.world(torch.cat([f.reshape(-1, 3) for f in faces]) * box.half)
    nearest = torch.cdist(x, surface).amin(1) * torch.where(implicit(box, x) < 0, -1, 1)
    assert (box.distance(x) - nearest).abs().max() < 0.05
    assert (sphere.distance(x) - ((x - sphere.position).norm(dim=1) - 0.7)).abs().max() < 1e-12


@quick
@given(seeds)
def test_distance_rises_by_one_along_the_normal(seed: int) -> None:
    g = draws(seed)
    for solid in solids(g):
        origin = solid.position + 3 * solid.rotation.mT[2]
        rays = solid.position - origin + 0.2 * torch.randn(50, 3, generator=g).double()
        s = solid.enter(origin, rays)
        points = (origin + s[:, None] * rays)[s.isfinite()]
        normals = solid.normal(points)
        assert (normals.norm(dim=1) - 1).abs().max() < 1e-12
        assert (solid.distance(points + 0.01 * normals) - 0.01).abs().max() < 1e-9
        assert ((normals * rays[s.isfinite()]).sum(1) < 0).all()


def test_a_ray_along_a_face_or_an_axis() -> None:
    box = Box(name="b", texture=GREY, position=vec(0, 0, 0), half=vec(1, 1, 1))
    rays = torch.stack([vec(1, 0, 0), vec(0, 1, 0), vec(-1, 0, 0)])
    assert box.enter(vec(-3, 0, 0), rays).tolist() == [2.0, math.inf, math.inf]
    assert box.enter(vec(-3, 2, 0), rays).tolist() == [math.inf] * 3


def test_motion_turns_about_the_own_origin() -> None:
    box = Box(
        name="b",
        texture=GREY,
        position=vec(1, 2, 3),
        half=vec(1, 2, 3),
        velocity=vec(2, 0, 0),
        spin=vec(0, 0, math.pi / 2),
    )
    moved = box.at(1.0)
    torch.testing.assert_close(moved.position, vec(3, 2, 3))
    torch.testing.assert_close(moved.world(vec(1, 0, 0)), vec(3, 3, 3))
    assert box.at(0.0) is box
    torch.testing.assert_close(box.at(0.5).at(0.5).rotation, moved.rotation)
    tipped = replace(box, rotation=torch.tensor([[1, 0, 0], [0, 0, -1], [0, 1, 0]]).double()).at(1.0)
    torch.testing.assert_close(tipped.world(vec(0, 0, 1)), vec(4, 2, 3))
    torch.testing.assert_close(tipped.world(vec(0, 1, 0)), vec(3, 2, 4))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bad_solids(bad: float) -> None:
    with pytest.raises(ValueError, match="radius="):
        Sphere(name="s", texture=GREY, position=vec(0, 0, 0), radius=bad)
    with pytest.raises(ValueError, match="half="):
        Box(name="b", texture=GREY, position=vec(0, 0, 0), half=vec(1, bad, 1))


def test_textures() -> None:
    red, blue = vec(1, 0, 0), vec(0, 0, 1)
    checker = Checker(red, blue, 0.5, vec(0, 0, 0))
    x = torch.stack([vec(0.1, 0.1, 0.1), vec(0.6, 0.1, 0.1), vec(0.6, 0.6, 0.1), vec(-0.1, 0.1, 0.1)])
    assert checker(x).tolist() == [red.tolist(), blue.tolist(), red.tolist(), blue.tolist()]
    noise = Noise(red, blue, 9 * torch.randn(3, 8).double(), torch.rand(8).double())(torch.randn(4000, 3).double())
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert (noise.sum(1) - 1).abs().max() < 1e-12
    assert noise[:, 0].std() > 0.2


# --- scenes --------------------------------------------------------------------------------------------------------


def two_spheres() -> Scene:
    red, blue = Plain(vec(1, 0, 0)), Plain(vec(0, 0, 1))
    return Scene(
        (
            Sphere(name="far", texture=blue, position=vec(0, 4, 0), radius=2.0),
            Sphere(name="near", texture=red, position=vec(0, 0, 0), radius=0.5),
        ),
        light=vec(0, -1, 0),
        ambient=0.25,
        background=vec(0, 1, 0),
    )


def test_the_nearest_surface_is_seen_and_depth_is_along_the_axis() -> None:
    view = render(two_spheres(), look_at(vec(0, -4, 0), vec(0, 0, 0), (33, 33), fov=60.0))
    assert view.ids[16, 16] == 1
    assert view.depth[16, 16].item() == pytest.approx(3.5)
    assert view.ids[16, 9] == 0
    assert view.ids[0, 0] == -1
    assert view.depth[0, 0] == math.inf
    assert view.normals[:, 0, 0].tolist() == [0, 0, 0]
    assert view.image[:, 0, 0].tolist() == [0, 1, 0]
    assert view.image[:, 16, 16].tolist() == [1, 0, 0]
    flat = render(
        Scene(
            (
                Plane(
                    name="wall",
                    texture=GREY,
                    position=vec(0, 0, 0),
                    rotation=torch.tensor([[1, 0, 0], [0, 0, -1], [0, 1, 0]]).double(),
                ),
            ),
            UP,
        ),
        look_at(vec(0, -4, 0), vec(0, 0, 0), (33, 33), fov=60.0),
    )
    torch.testing.assert_close(flat.depth, torch.full((33, 33), 4.0).double())


def test_light_is_lambert() -> None:
    view = render(two_spheres(), look_at(vec(1, -4, 0.5), vec(0, 0, 0), (24, 24)))
    on = view.ids >= 0
    expected = 0.25 + 0.75 * (view.normals.permute(1, 2, 0) @ vec(0, -1, 0)).clamp(min=0)
    albedo = torch.where(view.ids == 1, view.image[0], view.image[2])
    torch.testing.assert_close(albedo[on].double(), expected[on], rtol=0, atol=1e-6)


@quick
@given(seeds)
def test_occupancy_agrees_with_the_equations(seed: int) -> None:
    g = draws(seed)
    scene = Scene(tuple(solids(g)), UP)
    lower, upper, shape = vec(-2, -1.5, -2), vec(2, 2, 1), (9, 8, 7)
    grid = scene.occupancy(lower, upper, shape)
    centres = voxel_centres(lower, upper, shape)
    values = torch.stack([implicit(s, centres.flatten(0, 2)).unflatten(0, shape) for s in scene.solids])
    assert grid.shape == shape
    assert torch.equal(grid >= 0, (values <= 0).any(0))
    assert torch.equal(grid >= 0, scene.distance(centres) <= 0)
    for i in range(3):
        assert (values[i][grid == i] <= 0).all()
    assert centres[0, 0, 0].tolist() == pytest.approx([-2 + 2 / 9, -1.5 + 3.5 / 16, -2 + 3 / 14])


def test_bad_scenes() -> None:
    scene = two_spheres()
    with pytest.raises(ValueError, match="inside 'near'"):
        render(scene, look_at(vec(0, -0.3, 0), vec(0, 0, 0), (24, 24)))
    with pytest.raises(ValueError, match="shape="):
        scene.occupancy(vec(0, 0, 0), vec(1, 1, 1), (0, 2, 2))
    with pytest.raises(ValueError, match="lower="):
        scene.occupancy(vec(0, 2, 0), vec(1, 1, 1), (2, 2, 2))
    with pytest.raises(ValueError, match="at least one solid"):
        Scene((), UP)
    with pytest.raises(ValueError, match=r"ambient=1\.5"):
        replace(scene, ambient=1.5)
    with pytest.raises(ValueError, match="light="):
        replace(scene, light=2 * UP)
