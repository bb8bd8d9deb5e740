"""Pairs of pictures that differ in known ways, with a sentence for each difference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.worlds.shapes.facts import truth
from regard.worlds.shapes.language import refer
from regard.worlds.shapes.place import apart
from regard.worlds.shapes.render import reach
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import COLOURS, SHAPES, Thing, known
from regard.worlds.shapes.world import Shapes
from regard.worlds.world import World

SCENES = Shapes(things=(3, 5))
EDITS = ("appear", "disappear", "move", "recolour", "reshape")


@dataclass(frozen=True)
class Edit:
    """One difference.

    Args:
        kind: one of ``EDITS``.
        before, after: the thing's place in the two scenes; None where it is not there.
        sentence: what a reader would say, ``"the red circle has moved left"``.
    """

    kind: str
    before: int | None
    after: int | None
    sentence: str


@dataclass(frozen=True, eq=False)
class PairSample:
    """Two scenes, their pictures as a camera saw them, and the edits in a random order.

    Args:
        images: (2, 3, h, w), with noise and a change of light where the world has them.
        changed: (h, w), where an edited thing is seen in either scene.
    """

    before: ShapesSample
    after: ShapesSample
    images: Float[Tensor, "2 3 h w"]
    edits: tuple[Edit, ...]
    changed: Bool[Tensor, "h w"]

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(edit.sentence for edit in self.edits) or ("nothing has changed",)


@dataclass(frozen=True, kw_only=True)
class Pairs(World[PairSample]):
    """Two pictures of one scene with a few edits between them, each of another thing.

    Args:
        scenes: where the scenes come from, without overlap; its seed, split and count play no part.
        edits: fewest and most edits.
        kinds: what is drawn from, of ``EDITS``.
        light: the second picture is brighter or darker by up to this share.
        noise: deviation of the noise of both pictures.

    Raises:
        ValueError: an unknown kind, more edits than things, overlapping scenes, a negative share.
    """

    scenes: Shapes = SCENES
    edits: tuple[int, int] = (1, 1)
    kinds: tuple[str, ...] = EDITS
    light: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            known("kinds", kind, EDITS)
        if not self.kinds:
            raise ValueError(f"kinds=() must name at least one of {EDITS}")
        if self.scenes.overlap > 0 or self.scenes.composites:
            raise ValueError(f"scenes={self.scenes} must have neither overlap nor composites")
        if not 0 <= self.edits[0] <= self.edits[1] <= self.scenes.things[0]:
            raise ValueError(
                f"edits={self.edits} must rise and be at most the {self.scenes.things[0]} things of a scene"
            )
        if self.light < 0 or self.noise < 0:
            raise ValueError(f"light={self.light} and noise={self.noise} must not be negative")

    def make(self, rng: np.random.Generator) -> PairSample:
        while True:
            scene = self.scenes.scene(rng)
            count = int(rng.integers(self.edits[0], self.edits[1] + 1))
            chosen = [int(i) for i in rng.choice(len(scene.things), count, replace=False)]
            roles = {i: self.kinds[int(rng.integers(len(self.kinds)))] for i in chosen}
            changed = {i: self._edited(rng, scene.things, i, roles[i]) for i in chosen if roles[i] in EDITS[2:]}
            if len({*map(_spot, changed.values())}) == len(changed) and _fit(scene.things, changed):
                break
        things = scene.things
        before = [i for i in range(len(things)) if roles.get(i) != "appear"]
        after = [i for i in range(len(things)) if roles.get(i) != "disappear"]
        first = ShapesSample.of(replace(scene, things=tuple(things[i] for i in before)))
        second = ShapesSample.of(replace(scene, things=tuple(changed.get(i, things[i]) for i in after)))
        edits = []
        for i in chosen:
            b = before.index(i) if i in before else None
            a = after.index(i) if i in after else None
            edits.append(Edit(roles[i], b, a, _sentence(roles[i], first, second, b, a)))
        where = torch.zeros_like(first.index, dtype=torch.bool)
        for edit in edits:
            where |= first.visible[edit.before] if edit.before is not None else False
            where |= second.visible[edit.after] if edit.after is not None else False
        images = torch.stack([first.image, second.image * (1 + self.light * float(rng.uniform(-1, 1)))])
        images = images + self.noise * torch.from_numpy(rng.standard_normal(images.shape, np.float32))
        return PairSample(first, second, images.clamp(0, 1), tuple(edits), where)

    def _edited(self, rng: np.random.Generator, things: tuple[Thing, ...], i: int, kind: str) -> Thing:
        thing = things[i]
        if kind == "recolour":
            others = [c for c in self.scenes.colours if c != thing.colour] or [c for c in COLOURS if c != thing.colour]
            return replace(thing, colour=others[int(rng.integers(len(others)))])
        if kind == "reshape":
            shapes = [s for s in self.scenes.shapes if s != thing.shape] or [s for s in SHAPES if s != thing.shape]
            return replace(thing, shape=shapes[int(rng.integers(len(shapes)))])
        half = reach(thing) + 0.5
        for x, y in rng.uniform(half, self.scenes.size - half, (60, 2)).tolist():
            moved = replace(thing, centre=(x, y))
            if np.hypot(x - thing.centre[0], y - thing.centre[1]) < thing.size / 2:
                continue
            if all(apart(moved, other) for j, other in enumerate(things) if j != i):
                return moved
        return thing

    def panels(self, sample: PairSample) -> dict[str, Tensor | str]:
        """Both pictures, where they differ, and how."""
        return {
            "before": sample.images[0],
            "after": sample.images[1],
            "changed": sample.changed.float().expand(3, -1, -1),
            "edits": ", ".join(sample.sentences),
        }


def _spot(thing: Thing) -> tuple[float, float]:
    return thing.centre


def _fit(things: tuple[Thing, ...], changed: dict[int, Thing]) -> bool:
    """Whether every edit changed something and the moved things keep clear of each other."""
    now = [changed.get(i, thing) for i, thing in enumerate(things)]
    clear = all(apart(a, b) for i, a in enumerate(now) for b in now[:i])
    return clear and all(thing != things[i] for i, thing in changed.items())


def _sentence(kind: str, first: ShapesSample, second: ShapesSample, before: int | None, after: int | None) -> str:
    if before is None:
        assert after is not None
        return f"a {second.scene.things[after].kind} has appeared"
    old = first.scene.things[before]
    name = refer(truth(first), before) or f"a {old.kind}"
    if after is None:
        return f"{name} has disappeared"
    new = second.scene.things[after]
    if kind == "recolour":
        return f"{name} has turned {new.colour}"
    if kind == "reshape":
        return f"{name} has become a {new.shape}"
    dx, dy = new.centre[0] - old.centre[0], new.centre[1] - old.centre[1]
    side = ("left", "right")[dx > 0] if abs(dx) >= abs(dy) else ("up", "down")[dy > 0]
    return f"{name} has moved {side}"
