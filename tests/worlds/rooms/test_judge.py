"""The judge finds every surface of a true view, noisy or not, and misses what is removed, recoloured, moved or turned."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from regard.worlds.rooms import Room, Rooms, View, render
from regard.worlds.rooms.judge import read_surfaces, shows, surfaces
from regard.worlds.rooms.solids import Solid
from regard.worlds.rooms.textures import Plain

ROOMS = 8


@cache
def room(i: int) -> Room:
    return Rooms(split="test")[i]


def largest(view: View) -> int:
    """The number of the thing, walls and floors left out, that the view shows most of."""
    counts = view.ids[view.ids >= 6].bincount(minlength=7)
    return int(counts.argmax())


def changed(view: View, number: int, solid: Solid | None) -> Tensor:
    """The view with another solid in the place of one, or without it."""
    solids = [one for i, one in enumerate(view.scene.solids) if i != number]
    scene = replace(view.scene, solids=tuple(solids if solid is None else [*solids, solid]))
    return render(scene, view.camera).image


def noisy(image: Tensor, seed: int) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + 0.03 * noise).clamp(0, 1)


@pytest.mark.parametrize("spoil", [lambda image, i: image, noisy])
def test_every_surface_of_a_true_view_is_read(spoil) -> None:
    right = []
    for i in range(ROOMS):
        for view in room(i).views:
            image = spoil(view.image, i)
            right.append((read_surfaces(image, view) == view.ids).double().mean().item())
            seen = surfaces(image, view)
            assert all(one.iou > 0.95 and one.error < 0.05 for one in seen)
            assert sum(one.pixels for one in seen) == (view.ids >= 0).sum()
            assert shows(image, view)
    assert sum(right) / len(right) >= 0.999


def test_what_a_ray_meets_behind_is_read_where_a_thing_is_removed() -> None:
    told = 0
    for i in range(ROOMS):
        view = room(i).views[0]
        number = largest(view)
        image = changed(view, number, None)
        off = (image - view.image).norm(dim=0) > 0.16
        without = render(replace(view.scene, solids=view.scene.solids[:number]), view.camera)
        here = (view.ids == number) & off
        if number == len(view.scene.solids) - 1:
            assert (read_surfaces(image, view)[here] == without.ids[here]).double().mean() > 0.95
        if here.sum() > 0.5 * (view.ids == number).sum():
            told += 1
            facts = dict(shows(image, view).facts)
            assert not facts[f"the {view.scene.solids[number].name}"]
            assert not facts.keys() - {f"the {one.name}" for one in surfaces(view.image, view)}
    assert told >= 5


def test_a_recoloured_thing_has_wrong_colours_and_the_others_do_not() -> None:
    for i in range(ROOMS):
        view = room(i).views[0]
        number = largest(view)
        strange = replace(view.scene.solids[number], texture=Plain(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)))
        image = changed(view, number, strange)
        for one in surfaces(image, view):
            assert (one.iou < 0.7) == (one.solid == number), one
            assert (one.error > 0.05) == (one.solid == number), one
        assert (read_surfaces(image, view)[view.ids == number] == -2).double().mean() > 0.9


def test_a_moved_thing_is_told() -> None:
    told = 0
    for i in range(ROOMS):
        view = room(i).views[0]
        number = largest(view)
        solid = view.scene.solids[number]
        aside = torch.linalg.inv(view.camera.R)[:, 0] * 0.7
        image = changed(view, number, replace(solid, position=solid.position + aside))
        told += not dict(shows(image, view).facts)[f"the {solid.name}"]
    assert told >= 6


def test_the_view_of_another_camera_is_not_the_one_that_was_asked_for() -> None:
    for i in range(ROOMS):
        a, b = room(i).pair()
        verdict = shows(b.image, a)
        assert not verdict
        assert verdict.score < 0.7


def test_nothing_and_its_background() -> None:
    view = room(0).views[0]
    empty = render(replace(view.scene, solids=view.scene.solids[6:]), view.camera)
    nothing = empty.ids == -1
    assert nothing.any()
    assert (read_surfaces(empty.image, empty)[nothing] == -1).all()
    assert shows(empty.image, empty)


def test_bad_input_is_refused() -> None:
    view = room(0).views[0]
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) must be \(3, 64, 64\)"):
        surfaces(torch.zeros(3, 8, 8), view)
    with pytest.raises(ValueError, match="tolerance=0 must be positive"):
        read_surfaces(view.image, view, 0)
