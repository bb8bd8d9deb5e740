"""Where cameras stand in a room."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from regard.worlds.rooms.cameras import Camera, look_at
from regard.worlds.rooms.furnish import vector
from regard.worlds.rooms.scene import Scene

MARGIN = 0.35
TRIES = 400


def free(scene: Scene, eye: torch.Tensor, times: Sequence[float] = (0.0,)) -> bool:
    """Whether a camera at ``eye`` keeps its distance from everything at these times."""
    return all(scene.at(t).distance(eye).item() > MARGIN for t in times)


def around(
    rng: np.random.Generator,
    scene: Scene,
    extent: Sequence[float],
    views: int,
    size: tuple[int, int],
    spread: float,
    fov: float = 70.0,
) -> list[Camera]:
    """Cameras that look to the middle of the room from directions within ``spread`` degrees of each other.

    Raises:
        ValueError: there is no free place for them.
    """
    middle = rng.uniform(0, 2 * math.pi)
    cameras: list[Camera] = []
    for _ in range(views * TRIES):
        if len(cameras) == views:
            break
        angle = middle + math.radians(spread) * rng.uniform(-0.5, 0.5)
        reach = rng.uniform(0.6, 0.95) * (min(extent[:2]) / 2 - MARGIN)
        eye = vector((reach * math.cos(angle), reach * math.sin(angle), rng.uniform(0.8, 1.9)))
        target = vector((*rng.uniform(-0.5, 0.5, 2), rng.uniform(0.2, 0.8)))
        if free(scene, eye):
            cameras.append(look_at(eye, target, size, fov, roll=rng.uniform(-0.15, 0.15)))
    if len(cameras) < views:
        raise ValueError(f"views={views}: the room has no free place for so many cameras")
    return cameras


def path(
    rng: np.random.Generator, scene: Scene, extent: Sequence[float], times: Sequence[float], size: tuple[int, int]
) -> list[Camera]:
    """One camera that glides, turning, from one place to another and stays clear of everything at all ``times``.

    Raises:
        ValueError: there is no free way.
    """
    for _ in range(TRIES):
        angle, step = rng.uniform(0, 2 * math.pi), rng.uniform(-0.4, 0.4)
        reach = rng.uniform(0.7, 0.95) * (min(extent[:2]) / 2 - MARGIN)
        height = rng.uniform(0.8, 1.9, 2)
        targets = vector(rng.uniform((-0.4, -0.4, 0.3), (0.4, 0.4, 0.7), (2, 3)))
        angles = np.array((angle, angle + step))
        eyes = vector(np.stack([reach * np.cos(angles), reach * np.sin(angles), height], 1))
        ways = [(torch.lerp(eyes[0], eyes[1], t), torch.lerp(targets[0], targets[1], t)) for t in times]
        if all(free(scene, eye, [t]) for (eye, _), t in zip(ways, times)):
            return [look_at(eye, target, size) for eye, target in ways]
    raise ValueError("the room has no free way for a moving camera")


def ring(
    rng: np.random.Generator,
    scene: Scene,
    extent: Sequence[float],
    views: int,
    times: Sequence[float],
    size: tuple[int, int],
    fov: float,
) -> list[list[Camera]]:
    """At each time, ``views`` cameras on a small ring that look outward, evenly turned; the ring drives straight on.

    Raises:
        ValueError: there is no free way.
    """
    for _ in range(TRIES):
        start, heading = rng.uniform(-0.3, 0.3, 2) * extent[:2], rng.uniform(0, 2 * math.pi)
        step = rng.uniform(0, 1) * np.array((math.cos(heading), math.sin(heading)))
        turns = heading + 2 * math.pi * np.arange(views) / views
        outward = [vector((math.cos(a), math.sin(a), 0)) for a in turns]
        hubs = [vector((*(start + t * step), 1.2)) for t in times]
        if all(free(scene, hub, [t]) for hub, t in zip(hubs, times)):
            return [[look_at(hub + 0.1 * out, hub + out, size, fov) for out in outward] for hub in hubs]
    raise ValueError("the room has no free way for a ring of cameras")
