"""Reads the things of a film and their tracks off its frames, and what sounds off its audio, without any network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from regard.worlds.audio import LOUDNESS, RATE, TONES
from regard.worlds.clips import HIDDEN, Clip
from regard.worlds.shapes.facts import Verdict
from regard.worlds.shapes.fit import Fit, overlap, pixels, refine
from regard.worlds.shapes.judge import BLUR, CHROMA, working
from regard.worlds.shapes.sample import tight_boxes
from regard.worlds.shapes.scene import CLASSES, COLOURS, SHAPES

PURE, LEAST, PIECES, SPECK = 0.25, 12, 8, 3
FRAMES = 5
SIZES, LEAN = (0.19, 0.23, 0.27, 0.36, 0.46), 10
REACH, KEEP, CLOSE = 0.2, 10, 0.1
ACCEPT = 0.6
LOUD = 0.3
NEAR = 0.1


@dataclass(frozen=True, eq=False)
class Track:
    """A thing that is read off a film: one shape of one colour, size and angle in all frames.

    Args:
        shape, colour: words of ``SHAPES`` and ``COLOURS``.
        size: in pixels.
        masks: (t, h, w), what is seen of it.
        boxes: (t, 4), tight around that; zeros where nothing is.
        centres: (t, 2), (x, y) of the whole thing in pixels; NaN where it is hidden.
        share: (t,), seen pixels over those of the whole thing, at most 1.
        score: how well the film and the thing agree in the frames that show most of it, at most 1.
    """

    shape: str
    colour: str
    size: float
    masks: Bool[Tensor, "t h w"]
    boxes: Float[Tensor, "t 4"]
    centres: Float[Tensor, "t 2"]
    share: Float[Tensor, "t"]
    score: float

    @property
    def hidden(self) -> Bool[Tensor, "t"]:
        """Whether less than a tenth of it is seen."""
        return self.share < HIDDEN


def judge_clip(frames: Float[Tensor, "t 3 h w"]) -> list[Track]:
    """The things in a film, each of a colour of its own, in the order of ``COLOURS``.

    A thing of which never six tenths are seen may be taken for one of another shape, or for none;
    :class:`~regard.worlds.clips.Clips` makes one only when told to.

    Args:
        frames: (t, 3, h, w) in [0, 1]; of a grey background and things in the colours of the world.

    Raises:
        ValueError: not frames of three channels.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"frames of shape {tuple(frames.shape)} must be (t, 3, h, w)")
    rgb = frames.detach().cpu().numpy().astype(np.float32)
    small, scales = zip(*(working(frame) for frame in rgb))
    numbered = np.stack([named(frame) for frame in small])
    found = []
    for colour in range(len(COLOURS)):
        seen = numbered == colour
        if not one_thing(seen[seen.sum((1, 2)).argmax()]):
            continue
        read = follow(seen, (numbered >= 0) & ~seen)
        if read is not None:
            found.append(track(read, colour, seen, 1 / scales[0], rgb.shape[2:]))
    return found


def one_thing(mask: Bool[ndarray, "h w"]) -> bool:
    """Whether pixels are enough for a thing, wider than a seam somewhere, and in few pieces, specks aside."""
    from scipy import ndimage

    pieces = np.bincount(ndimage.label(mask)[0].ravel())[1:]
    return bool(mask.sum() >= LEAST and ndimage.binary_erosion(mask).any() and (pieces > SPECK).sum() <= PIECES)


def named(rgb: Float[ndarray, "3 h w"]) -> Int[ndarray, "h w"]:
    """The place in ``COLOURS`` of each pixel, -1 for the ground.

    A mixed pixel takes the nearest of the colours that are pure close by: at a seam two may mix to a third one.
    """
    from scipy import ndimage

    flat = rgb.mean(0)[np.ptp(rgb, 0) <= CHROMA]
    ground = np.full(3, np.median(flat if flat.size else rgb))
    palette = np.array([*COLOURS.values(), ground], np.float32)
    away = np.linalg.norm(rgb - palette[..., None, None], axis=1)
    pure = (away == away.min(0)) & (away < PURE)
    smooth = np.linalg.norm(ndimage.gaussian_filter(rgb, (0, BLUR, BLUR)) - palette[..., None, None], axis=1)
    close = ndimage.maximum_filter(pure, (1, 5, 5))
    nearest = np.where(close, smooth, np.inf).argmin(0)
    return np.where(close.any(0) & (nearest < len(COLOURS)), nearest, -1)


def follow(seen: Bool[ndarray, "t h w"], others: Bool[ndarray, "t h w"]) -> list[Fit | None] | None:
    """One shape in every frame: the one that fits best where most is seen, then moved to fit the other frames.

    None where no shape explains what is seen.
    """
    areas = seen.sum((1, 2))
    first, *rest = np.argsort(-areas, kind="stable")[:FRAMES]
    rest = [k for k in rest if areas[k] >= LEAST]
    sizes = [share * min(seen.shape[1:]) for share in SIZES]
    fits = [placed(shape, sizes, (-LEAN, 0, LEAN), seen[first], others[first], (1 / 12, LEAN / 3)) for shape in SHAPES]
    most = max(one.score for one in fits)
    if most < ACCEPT:
        return None
    close = [one for one in fits if one.score > most - CLOSE]
    for i, one in enumerate(close if len(close) > 1 else []):
        more = [placed(one.shape, (one.size,), (one.angle,), seen[k], others[k], (0, 0)).score for k in rest]
        close[i] = replace(one, score=float(np.average([one.score, *more], weights=areas[[first, *rest]])))
    best = max(close, key=lambda one: one.score)
    size, angle = (best.size,), (best.angle,)
    return [placed(best.shape, size, angle, *both, (0, 0)) if both[0].any() else None for both in zip(seen, others)]


def placed(
    shape: str,
    sizes: Sequence[float],
    angles: Sequence[float],
    region: Bool[ndarray, "h w"],
    free: Bool[ndarray, "h w"],
    steps: tuple[float, float],
) -> Fit:
    """The shape where it explains a region best, tried in its middle and from its sides inwards, at these sizes and angles.

    ``steps`` are how far at first size, as a share, and angle, in degrees, may change.
    """
    ys, xs = region.nonzero()
    low, high = np.array([xs.min(), ys.min()], float), np.array([xs.max() + 1, ys.max() + 1], float)
    kind, guesses = CLASSES.index(shape), []
    for size, angle in itertools.product(sizes, angles):
        inward = np.stack([(low + high) / 2, low + size / 2, high - size / 2])
        guesses += [(kind, x, y, size, angle) for x, y in itertools.product(inward[:, 0], inward[:, 1])]
    x, y = pixels((region.shape[0], region.shape[1]))
    pad = REACH * min(region.shape)
    (left, top), (right, bottom) = (low - pad).astype(int).clip(0), (high + pad).astype(int)
    window = [p[top:bottom, left:right].astype(np.float32) for p in (x, y, region, ~free)]
    coarse, fine = ([p[::n, ::n].ravel() for p in window] for n in (2, 1))
    tried = np.array(guesses, np.float32)
    kept = tried[np.argsort(-overlap(tried, *coarse))[: KEEP if len(sizes) > 1 else 2]]
    step = min(sizes) / 8
    return refine(kept, np.array([step, step, *steps], np.float32), coarse, fine)


def track(
    read: Sequence[Fit | None], colour: int, seen: Bool[ndarray, "t h w"], scale: float, size: tuple[int, int]
) -> Track:
    """A track at the size of the film."""
    whole = next(one for one in read if one is not None).scaled(scale)
    masks = torch.from_numpy(seen)
    if masks.shape[1:] != size:
        masks = torch.nn.functional.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0] > 0.5
    area = max(1, int((whole.distance(size) < 0).sum()))
    share = (masks.flatten(1).sum(1) / area).clamp(max=1)
    centres = torch.tensor([one.scaled(scale).centre if one else (np.nan, np.nan) for one in read]).float()
    centres[share < HIDDEN] = np.nan
    score = max(one.score for one in read if one is not None)
    return Track(whole.shape, list(COLOURS)[colour], whole.size, masks, tight_boxes(masks), centres, share, score)


def heard(audio: Float[Tensor, "samples"], frames: int) -> Bool[Tensor, "t classes"]:
    """Which of ``CLASSES`` sounds during each frame: whose tone has a good part of its loudness in a fit to all tones.

    Raises:
        ValueError: not one channel, a length that frames do not share evenly, frames shorter than 50 milliseconds.
    """
    if audio.ndim != 1 or frames < 1 or len(audio) % frames:
        raise ValueError(f"audio of shape {tuple(audio.shape)} must be samples that {frames} frames share evenly")
    length = len(audio) // frames
    if length < RATE // 20:
        raise ValueError(f"frames={frames} of {length} samples each are too short to tell tones: {RATE // 20} or more")
    time = np.arange(length) / RATE
    phase = 2 * np.pi * np.outer(time, [TONES[shape] for shape in CLASSES])
    window = np.hanning(length + 2)[1:-1, None]
    waves = np.concatenate([np.cos(phase), np.sin(phase)], 1) * window
    pieces = audio.detach().cpu().double().numpy().reshape(frames, length).T * window
    found = np.linalg.lstsq(waves, pieces, rcond=None)[0].reshape(2, len(CLASSES), frames)
    return torch.from_numpy(np.hypot(*found).T > LOUD * LOUDNESS)


def shows(frames: Float[Tensor, "t 3 h w"], clip: Clip) -> Verdict:
    """Whether a film shows the things of a clip, each in its place in every frame in which a tenth of it or more is seen.

    Raises:
        ValueError: as for :func:`judge_clip`, frames of another number or size than the clip's.
    """
    if frames.shape != clip.frames.shape:
        raise ValueError(
            f"frames of shape {tuple(frames.shape)} must be {tuple(clip.frames.shape)} as those of the clip"
        )
    found = {(one.colour, one.shape): one for one in judge_clip(frames)}
    margin, facts = NEAR * min(frames.shape[2:]), []
    for i, thing in enumerate(clip.things):
        one = found.pop((thing.colour, thing.shape), None)
        for k in (clip.visible_share[:, i] >= HIDDEN).nonzero()[:, 0].tolist():
            away = (one.boxes[k] - clip.boxes[k, i]).abs().max() if one is not None else torch.inf
            facts.append((f"a {thing.kind} in frame {k}", bool(away <= margin)))
    facts.append(("nothing else", not found))
    return Verdict(tuple(facts))
