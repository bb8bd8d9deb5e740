"""What holds for every world of the package: the same in any order, no picture in two splits, panels that can be shown."""

from dataclasses import FrozenInstanceError, is_dataclass, replace

import pytest
import torch

from regard.worlds.shapes.degraded import Degraded
from regard.worlds.shapes.drawings import Drawings
from regard.worlds.shapes.gaze import Gaze
from regard.worlds.shapes.lanes import Lanes
from regard.worlds.shapes.mazes import Mazes
from regard.worlds.shapes.organs import Organs
from regard.worlds.shapes.pairs import Pairs
from regard.worlds.shapes.panorama import Panoramas
from regard.worlds.shapes.popout import PopOut
from regard.worlds.shapes.screens import Screens
from regard.worlds.shapes.world import Shapes
from regard.worlds.world import World

WORLDS = [
    Shapes(),
    Pairs(),
    PopOut(),
    Gaze(),
    Degraded(),
    Drawings(),
    Lanes(),
    Panoramas(),
    Organs(),
    Screens(),
    Mazes(),
]
every = pytest.mark.parametrize("world", WORLDS, ids=lambda w: type(w).__name__)


def picture(world: World, index: int) -> torch.Tensor:
    sample = world[index]
    return sample.images if isinstance(world, Pairs) else sample.image


@every
def test_the_same_in_any_order(world: World) -> None:
    first = [picture(world, i) for i in (0, 1, 2)]
    again = [picture(replace(world), i) for i in (2, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first, [again[1], again[2], again[0]]))


@every
def test_splits_and_seeds_share_no_picture(world: World) -> None:
    worlds = [replace(world, split=split, seed=seed) for split in ("train", "val", "test") for seed in (0, 1)]  # type: ignore[arg-type]
    pictures = {picture(w, i).numpy().tobytes() for w in worlds for i in range(5)}
    assert len(pictures) == 30


@every
def test_pictures_and_panels(world: World) -> None:
    image = picture(world, 3)
    assert image.dtype == torch.float32
    assert image.shape[-3] == 3
    assert torch.equal(image, image.clamp(0, 1))
    for panel in world.panels(world[3]).values():
        if not isinstance(panel, str):
            assert panel.ndim == 3
            assert len(panel) == 3
            assert torch.equal(panel, panel.clamp(0, 1))


@every
def test_samples_are_frozen(world: World) -> None:
    sample = world[0]
    assert is_dataclass(sample)
    name = next(iter(sample.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(sample, name, None)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Pairs, {"edits": (1, 9)}, r"edits=\(1, 9\)"),
        (Pairs, {"kinds": ("vanish",)}, "kinds='vanish'"),
        (Pairs, {"scenes": Shapes(overlap=0.2)}, "overlap"),
        (Pairs, {"noise": -1}, "noise=-1"),
        (PopOut, {"grid": (1, 2)}, "three things"),
        (PopOut, {"grid": (20, 20)}, "does not fit"),
        (PopOut, {"odd": ("smell",)}, "odd='smell'"),
        (PopOut, {"steps": 0}, "steps=0"),
        (Gaze, {"heads": (0, 2)}, "heads="),
        (Gaze, {"heads": (8, 9)}, "do not fit"),
        (Gaze, {"size": 32}, "size=32"),
        (Gaze, {"together": 2}, "together=2"),
        (Degraded, {"kinds": ("mud",)}, "kinds='mud'"),
        (Degraded, {"at_once": (1, 9)}, "at_once="),
        (Drawings, {"points": 5}, "points=5"),
        (Drawings, {"jitter": -1}, "jitter=-1"),
        (Drawings, {"scenes": Shapes()}, "things="),
        (Lanes, {"lanes": (1, 2)}, "lanes="),
        (Lanes, {"size": (20, 90)}, "size="),
        (Lanes, {"vehicles": (3, 1)}, "vehicles="),
        (Lanes, {"points": 1}, "points=1"),
        (Panoramas, {"widths": (0, 5)}, "widths="),
        (Panoramas, {"view": 180}, "view=180"),
        (Panoramas, {"things": (3, 1)}, "things="),
        (Panoramas, {"size": (8, 8)}, "size="),
        (Organs, {"size": 20}, "size=20"),
        (Organs, {"speckle": -1}, "speckle=-1"),
        (Screens, {"size": (40, 40)}, "size="),
        (Screens, {"kinds": ("knob",)}, "kinds='knob'"),
        (Mazes, {"cells": (1, 5)}, "cells="),
    ],
)
def test_bad_input(kind: type, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
