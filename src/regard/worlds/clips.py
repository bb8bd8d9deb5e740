"""Short films of coloured shapes that move, hide behind each other and sound: every shape has a tone of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from regard.worlds.audio import RATE, chorus, log_mel
from regard.worlds.shapes.render import reach
from regard.worlds.shapes.sample import ShapesSample
from regard.worlds.shapes.scene import CLASSES, COLOURS, SHAPES, TONES, Background, Scene, Thing, known
from regard.worlds.shapes.show import paint
from regard.worlds.world import World

STAYS = "stays"
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "circles", "zigzags", "bounces")
HIDDEN = 0.1
TRIES = 50


def offsets(motion: str, s: Float[ndarray, "t"]) -> Float[ndarray, "t 2"]:
    """Where a motion has led (x, y) at the shares ``s`` of its time; it is one unit long, or 0.6 across, y down."""
    zero = np.zeros_like(s)
    if motion == "circles":
        x, y = 0.3 * np.cos(2 * np.pi * s), 0.3 * np.sin(2 * np.pi * s)
    elif motion == "zigzags":
        x, y = s, 0.3 * np.abs((4 * s) % 2 - 1)
    elif motion == "bounces":
        x, y = s, -0.6 * np.abs(np.sin(2 * np.pi * s))
    else:
        x, y = {
            STAYS: (zero, zero),
            "moves left": (-s, zero),
            "moves right": (s, zero),
            "moves up": (zero, -s),
            "moves down": (zero, s),
        }[motion]
    return np.stack([x, y], 1)


@dataclass(frozen=True)
class Event:
    """A thing does something from frame ``first`` to frame ``last``, both included; ``by`` is the thing that hides it."""

    thing: int
    verb: str
    first: int
    last: int
    by: int | None = None


def runs(flags: Bool[Tensor, "t"]) -> Iterator[tuple[int, int]]:
    """First and last index of each unbroken stretch of True."""
    edges = torch.diff(flags.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int()).nonzero()[:, 0].tolist()
    for start, stop in zip(edges[::2], edges[1::2]):
        yield start, stop - 1


@dataclass(frozen=True, eq=False)
class Clip:
    """t frames of n things, the same things in the same painter's order in all of them: a thing's number is its track.

    Args:
        samples: the frames with all that is true of each of them.
        motions: what each thing does, one of ``MOTIONS`` or ``stays``.
        moving: whether each thing moves, and so sounds, during each frame.
        fps: frames in a second.
        audio: mono, 16 kHz, as long as the frames.
    """

    samples: tuple[ShapesSample, ...]
    motions: tuple[str, ...]
    moving: Bool[Tensor, "t n"]
    fps: int
    audio: Float[Tensor, "samples"]

    @property
    def things(self) -> tuple[Thing, ...]:
        """As they are in the first frame."""
        return self.samples[0].scene.things

    @cached_property
    def frames(self) -> Float[Tensor, "t 3 h w"]:
        return torch.stack([sample.image for sample in self.samples])

    @cached_property
    def visible(self) -> Bool[Tensor, "t n h w"]:
        """What is seen of each thing."""
        return torch.stack([sample.visible for sample in self.samples])

    @cached_property
    def amodal(self) -> Bool[Tensor, "t n h w"]:
        """Each thing as if nothing hid it."""
        return torch.stack([sample.amodal for sample in self.samples])

    @cached_property
    def boxes(self) -> Float[Tensor, "t n 4"]:
        """Tight around what is seen; zeros where nothing is."""
        return torch.stack([sample.boxes for sample in self.samples])

    @cached_property
    def amodal_boxes(self) -> Float[Tensor, "t n 4"]:
        return torch.stack([sample.amodal_boxes for sample in self.samples])

    @cached_property
    def centres(self) -> Float[Tensor, "t n 2"]:
        """(x, y) in pixels, also of hidden things."""
        return torch.tensor([[thing.centre for thing in sample.scene.things] for sample in self.samples])

    @cached_property
    def visible_share(self) -> Float[Tensor, "t n"]:
        """Seen pixels over amodal ones."""
        return torch.stack([sample.visible_share for sample in self.samples])

    @cached_property
    def hidden_by(self) -> Int[Tensor, "t n n"]:
        """[t, i, j]: how many pixels of thing i show thing j instead."""
        counts = torch.einsum("tihw,tjhw->tij", self.amodal.float(), self.visible.float()).long()
        return counts * ~torch.eye(len(self.things), dtype=torch.bool)

    @cached_property
    def occlusions(self) -> tuple[Event, ...]:
        """``is covered``: every stretch of time in which one thing hides pixels of another."""
        n = len(self.things)
        pairs = [(i, j) for i in range(n) for j in range(n)]
        return tuple(Event(i, "is covered", *run, by=j) for i, j in pairs for run in runs(self.hidden_by[:, i, j] > 0))

    @cached_property
    def actions(self) -> tuple[Event, ...]:
        """The motions, and ``hides``: less than a tenth of a thing is seen, by whatever hides most of it."""
        found = []
        for i, motion in enumerate(self.motions):
            found += [Event(i, motion, *run) for run in runs(self.moving[:, i])]
            for first, last in runs(self.visible_share[:, i] < HIDDEN):
                by = int(self.hidden_by[first : last + 1, i].sum(0).argmax())
                found.append(Event(i, "hides", first, last, by))
        return tuple(found)

    @cached_property
    def sounding(self) -> Bool[Tensor, "t h w"]:
        """What is seen of the things that sound."""
        return (self.visible & self.moving[..., None, None]).any(1)

    @cached_property
    def tags(self) -> Bool[Tensor, "t classes"]:
        """Which of ``CLASSES`` sounds during each frame."""
        tags = torch.zeros(len(self.samples), len(CLASSES), dtype=torch.bool)
        for i, thing in enumerate(self.things):
            tags[:, CLASSES.index(thing.shape)] |= self.moving[:, i]
        return tags

    @cached_property
    def caption(self) -> str:
        """``a red circle moves left, a blue square stays``."""
        told = (f"{'an' if t.kind[0] in 'aeiou' else 'a'} {t.kind} {m}" for t, m in zip(self.things, self.motions))
        return ", ".join(told)


@dataclass(frozen=True, kw_only=True)
class Clips(World[Clip]):
    """Things of different colours that move one way each, all inside the picture, or stay where they are.

    A thing sounds while it moves, hidden or not. In front of the first things that move stand large still squares, the
    screens, each across the middle of one's way.

    Args:
        size: height and width, pixels.
        frames: how many there are.
        fps: frames in a second; a frame shows the middle of its time.
        things: fewest and most things beside the screens.
        screens: at most so many; there are none for things that stay, nor in a single frame.
        shapes: what is drawn from, each alike.
        motions: what is drawn from, each alike.
        still: share of the things that stay.
        active: least and greatest share of the frames during which a thing that moves does so.
        travel: least and greatest length of a motion, in shorter sides of the picture.
        visible: how much of every thing is seen at least, in the frame that shows most of it.

    Raises:
        ValueError: a word, a range or a share that makes no sense, ``fps`` that does not divide 16,000, more things and
            screens than colours; on drawing, things that hide each other too much whichever way they are placed.
    """

    size: tuple[int, int] = (64, 64)
    frames: int = 8
    fps: int = 10
    things: tuple[int, int] = (2, 4)
    screens: int = 1
    shapes: tuple[str, ...] = SHAPES
    motions: tuple[str, ...] = MOTIONS
    still: float = 0.3
    active: tuple[float, float] = (0.5, 1.0)
    travel: tuple[float, float] = (0.4, 0.6)
    visible: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size) < 32:
            raise ValueError(f"size={self.size} is too small: 32 pixels a side or more")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames} must be 1 or more")
        if self.fps < 1 or RATE % self.fps:
            raise ValueError(f"fps={self.fps} must divide the {RATE} samples of a second")
        if self.screens < 0 or not 1 <= self.things[0] <= self.things[1] <= len(COLOURS) - self.screens:
            raise ValueError(
                f"things={self.things} and screens={self.screens} must be 1 thing or more and no more than {len(COLOURS)} in all"
            )
        for name, words in (("shapes", SHAPES), ("motions", MOTIONS)):
            if not getattr(self, name):
                raise ValueError(f"{name}=() must name at least one of {', '.join(map(repr, words))}")
            for word in getattr(self, name):
                known(name, word, words)
        for name in ("still", "visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 < self.active[0] <= self.active[1] <= 1:
            raise ValueError(f"active={self.active} must rise and lie above 0 and up to 1")
        if not 0 < self.travel[0] <= self.travel[1] <= 0.65:
            raise ValueError(f"travel={self.travel} must rise and lie above 0 and up to 0.65")

    def make(self, rng: np.random.Generator) -> Clip:
        for _ in range(TRIES):
            clip = self._draw(rng)
            if bool((clip.visible_share.amax(0) >= self.visible).all()):
                return clip
        raise ValueError(f"things={self.things} cannot be placed so that visible={self.visible} of each is seen once")

    def _draw(self, rng: np.random.Generator) -> Clip:
        count = int(rng.integers(self.things[0], self.things[1] + 1))
        colours = rng.permutation(list(COLOURS)).tolist()
        motions = [STAYS if rng.random() < self.still else str(rng.choice(self.motions)) for _ in range(count)]
        tracks, moving = zip(*[self._track(rng, motion, colours[i]) for i, motion in enumerate(motions)])
        movers = [i for i, motion in enumerate(motions) if motion != STAYS and self.frames > 1]
        screens = [self._screen(rng, tracks[i], colours[-1 - k]) for k, i in enumerate(movers[: self.screens])]
        background = Background(tone=str(rng.choice(list(TONES))))
        tracks, motions = (*tracks, *screens), motions + [STAYS] * len(screens)
        moves = np.stack([*moving, *[np.zeros(self.frames, bool)] * len(screens)], 1)
        samples = tuple(ShapesSample.of(Scene(self.size, background, things)) for things in zip(*tracks))
        shapes = [track[0].shape for track in tracks]
        audio = chorus(shapes, moves, self.frames * RATE // self.fps, rng.uniform(0, 2 * np.pi, len(shapes)))
        return Clip(samples, tuple(motions), torch.from_numpy(moves), self.fps, audio)

    def _track(self, rng: np.random.Generator, motion: str, colour: str) -> tuple[list[Thing], Bool[ndarray, "t"]]:
        """One thing in every frame, and when it moves."""
        h, w = self.size
        side = min(h, w)
        shape = str(rng.choice(self.shapes))
        thing = Thing(shape, colour, (0.0, 0.0), side * rng.uniform(0.18, 0.28), float(rng.uniform(-15, 15)))
        length = max(1, round(self.frames * rng.uniform(*self.active)))
        start = int(rng.integers(self.frames - length + 1))
        share = ((np.arange(self.frames) + 0.5 - start) / length).clip(0, 1)
        way = side * rng.uniform(*self.travel) * offsets(motion, share)
        lowest, highest = reach(thing) - way.min(0), np.array([w, h]) - reach(thing) - way.max(0)
        centres = rng.uniform(lowest, highest) + way
        active = (np.arange(self.frames) >= start) & (np.arange(self.frames) < start + length) & (motion != STAYS)
        return [replace(thing, centre=tuple(centre)) for centre in centres.tolist()], active

    def _screen(self, rng: np.random.Generator, track: list[Thing], colour: str) -> list[Thing]:
        """A still square, larger than the thing, in the middle of the box of its way."""
        centres = np.array([thing.centre for thing in track])
        x, y = ((centres.min(0) + centres.max(0)) / 2).tolist()
        return [Thing("square", colour, (x, y), track[0].size * rng.uniform(1.3, 1.8))] * self.frames

    def panels(self, sample: Clip) -> dict[str, Tensor | str]:
        mel = log_mel(sample.audio)
        mel = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-6)
        shown: dict[str, Tensor | str] = {"caption": sample.caption}
        for k in sorted({0, len(sample.samples) // 2, len(sample.samples) - 1}):
            shown[f"frame {k}"] = sample.frames[k]
            shown[f"things {k}"] = paint(sample.samples[k].index)
        shown["sound"] = mel.flip(0).expand(3, -1, -1)
        return shown
