"""Random rooms: four walls, floor, ceiling, and spheres and boxes that stand on the floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.worlds.rooms.cameras import cross_matrix
from regard.worlds.rooms.scene import Scene
from regard.worlds.rooms.solids import Box, Plane, Solid, Sphere
from regard.worlds.rooms.textures import Checker, Noise, Plain, Texture

Style = Literal["kitchen", "nursery", "cellar", "hall"]
STYLES: tuple[Style, ...] = get_args(Style)
COLOURS = {
    "red": (0.85, 0.15, 0.12),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "yellow": (0.95, 0.85, 0.2),
    "orange": (0.95, 0.5, 0.1),
    "purple": (0.55, 0.2, 0.7),
    "cyan": (0.2, 0.75, 0.8),
    "white": (0.95, 0.95, 0.95),
}
PATTERNS = ("plain", "checkered", "mottled")
HEIGHT = 2.6
CROWD = 4.0


@dataclass(frozen=True)
class Look:
    """How the rooms of one style look: side lengths in metres, wall and floor patterns, ambient light, the walls' colour."""

    side: tuple[float, float]
    wall: str
    floor: str
    ambient: float
    colour: tuple[float, float, float]


LOOKS: dict[Style, Look] = {
    "kitchen": Look((4.0, 5.0), "mottled", "checkered", 0.5, (0.85, 0.85, 0.75)),
    "nursery": Look((4.0, 5.0), "plain", "mottled", 0.6, (0.75, 0.85, 0.95)),
    "cellar": Look((4.0, 6.0), "mottled", "mottled", 0.3, (0.6, 0.55, 0.5)),
    "hall": Look((6.0, 8.0), "checkered", "plain", 0.4, (0.9, 0.8, 0.7)),
}


def vector(values: Sequence[int | float] | np.ndarray) -> Float[Tensor, "..."]:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def texture(rng: np.random.Generator, pattern: str, colour: Sequence[float] | np.ndarray, scale: float) -> Texture:
    """A texture of this pattern in a colour and a darker or paler one; ``scale`` is its grain in metres."""
    base = vector(colour)
    other = base * 0.35 if rng.random() < 0.5 else 0.4 * base + 0.6
    if pattern == "plain":
        return Plain(base)
    if pattern == "checkered":
        return Checker(base, other, scale, vector(rng.uniform(0, 2 * scale, 3)))
    directions = rng.normal(size=(3, 8))
    directions /= np.linalg.norm(directions, axis=0)
    waves = directions * 2 * math.pi / (scale * rng.uniform(0.8, 4, 8))
    return Noise(base, other, vector(waves), vector(rng.uniform(0, 2 * math.pi, 8)))


def shell(rng: np.random.Generator, style: Style, extent: Sequence[float]) -> tuple[Solid, ...]:
    """Floor, ceiling and four walls of a room ``extent`` (width, depth, height) whose floor is centred on the origin."""
    look, (w, d, h) = LOOKS[style], extent
    walls = [
        ("floor", (0, 0, 0), (0, 0, 1)),
        ("ceiling", (0, 0, h), (0, 0, -1)),
        ("left wall", (-w / 2, 0, 0), (1, 0, 0)),
        ("right wall", (w / 2, 0, 0), (-1, 0, 0)),
        ("front wall", (0, -d / 2, 0), (0, 1, 0)),
        ("back wall", (0, d / 2, 0), (0, -1, 0)),
    ]
    solids = []
    for name, position, normal in walls:
        pattern = look.floor if name == "floor" else "plain" if name == "ceiling" else look.wall
        tint = np.clip(np.array(look.colour) * rng.uniform(0.75, 1.05, 3), 0, 1)
        n = vector(normal)
        side = vector((1, 0, 0) if normal[0] == 0 else (0, 1, 0))
        frame = torch.stack([side, torch.linalg.cross(n, side), n], 1)
        solids.append(
            Plane(name=name, texture=texture(rng, pattern, tint, 0.5), position=vector(position), rotation=frame)
        )
    return tuple(solids)


def thing(rng: np.random.Generator, colour: str) -> tuple[Solid, float]:
    """A sphere or a box, upright or tilted, on the floor at the origin, and the radius of the circle it stays in."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    skin = texture(rng, pattern, COLOURS[colour], 0.2)
    name = colour if pattern == "plain" else f"{pattern} {colour}"
    if rng.random() < 0.5:
        radius = rng.uniform(0.2, 0.5)
        return Sphere(name=f"{name} sphere", texture=skin, position=vector((0, 0, radius)), radius=radius), radius
    half = vector(rng.uniform((0.15, 0.15, 0.2), (0.45, 0.45, 0.7)))
    turn = vector((0, 0, rng.uniform(0, 2 * math.pi)))
    if rng.random() < 0.3:
        turn = vector(rng.uniform(-1.5, 1.5, 3))
    rotation = torch.linalg.matrix_exp(cross_matrix(turn))
    x, y, z = (rotation.abs() @ half).tolist()
    position = vector((0, 0, z))
    return Box(name=f"{name} box", texture=skin, position=position, rotation=rotation, half=half), math.hypot(x, y)


def furnish(
    rng: np.random.Generator, style: Style, objects: tuple[int, int], movers: int = 0
) -> tuple[Scene, tuple[float, float, float]]:
    """A room with between ``objects[0]`` and ``objects[1]`` things of different colours, apart from each other; and its extent.

    Things stand in a square in the middle, which grows, and the room with it, until they fit. The first ``movers`` things
    slide over the floor and turn, without touching anything between times 0 and 1.

    Raises:
        ValueError: more things than there are colours, or fewer than none.
    """
    low, high = objects
    if not 0 <= low <= high <= len(COLOURS):
        raise ValueError(f"objects={objects} must be two numbers, rising, from 0 to {len(COLOURS)}")
    look = LOOKS[style]
    width, depth = rng.uniform(*look.side, 2).tolist()
    count = int(rng.integers(low, high + 1))
    things = [thing(rng, colour) for colour in rng.permutation(list(COLOURS))[:count].tolist()]
    placed: list[tuple[Solid, float]] = []
    crowd = CROWD
    while len(placed) < count:
        solid, radius = things[len(placed)]
        for _ in range(50):
            spot = rng.uniform(-0.5, 0.5, 2) * (crowd - 2 * radius)
            if all(np.linalg.norm(spot - other.position[:2].numpy()) > radius + r for other, r in placed):
                placed.append((replace(solid, position=solid.position + vector((*spot, 0))), radius))
                break
        else:
            crowd *= 1.1
    extent = (max(width, crowd), max(depth, crowd), HEIGHT)
    for i in range(min(movers, count)):
        placed[i] = (push(rng, i, placed, extent), placed[i][1])
    slope = vector(rng.normal(size=3)) * vector((1, 1, 0)) + vector((0, 0, 1.5))
    scene = Scene((*shell(rng, style, extent), *(solid for solid, _ in placed)), slope / slope.norm(), look.ambient)
    return scene, extent


def push(rng: np.random.Generator, i: int, placed: Sequence[tuple[Solid, float]], extent: Sequence[float]) -> Solid:
    """Thing ``i`` with a velocity and a spin that let it touch nothing between times 0 and 1; at rest where it has no room."""
    solid, radius = placed[i]
    times = torch.linspace(0, 1, 33, dtype=torch.float64)[:, None]
    wall = vector(extent[:2]) / 2 - radius
    spin = vector((0, 0, rng.uniform(-2, 2)))
    for speed in np.geomspace(3, 0.3, 60):
        angle = rng.uniform(0, 2 * math.pi)
        velocity = vector((speed * math.cos(angle), speed * math.sin(angle), 0))
        path = solid.position[:2] + times * velocity[:2]
        others = [(o.position[:2] + times * o.velocity[:2], r) for j, (o, r) in enumerate(placed) if j != i]
        clear = all(((path - way).norm(dim=1) > radius + r + 0.1).all() for way, r in others)
        if clear and (path.abs() <= wall).all():
            return replace(solid, velocity=velocity, spin=spin)
    return solid
