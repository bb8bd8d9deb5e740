"""An edit by Prompt-to-Prompt changes the thing that the changed word is about and leaves the rest of the picture alone.

Set-up: the trained model ``shapes-diffusion``, 25 steps, guidance 3; 64 captions of two things of different shapes and
colours whose pictures show, as the world's exact judge reads them, what the caption says and nothing else. One word of one
thing is swapped: its colour, or its shape. Compared: the edited prompt painted from the same noise without the controller.

An edit succeeds if the picture holds the thing as it is said now. The rest is preserved if the other thing is still there, its
mask overlapping the old one by 0.8 (intersection over union), and the mean absolute difference of the pixels outside the old
and the new mask of the edited thing is at most 0.05.

Bar: a colour swap succeeds in 70 % and preserves in 80 %, 15 points more than without the controller; blending by the maps
of the thing's word halves the difference outside; over the shares 0, 0.4, 0.8 and 1 of steps in which cross-attention is taken
over, preservation rises and the strength of edits falls (sign of Spearman's rank correlation); the amount of the colour,
chroma of its hue summed over the picture, rises with the weight of its word at every step from 0.5 to 2.

The strength of an edit is taken to be its success, which leaves the bar for it out of reach of a model that paints every
swap rightly with no share at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.claims.claim import Budget, Row
from regard.controllers.prompt_to_prompt import LocalBlend, PromptToPrompt, Replace, Reweight
from regard.core.apply import apply
from regard.core.site import sites
from regard.train.paint import captioned
from regard.train.pretrained import pretrained
from regard.worlds.shapes.facts import Caption, Found, Phrase
from regard.worlds.shapes.judge import hue_and_chroma, judge, labels
from regard.worlds.shapes.scene import COLOURS, SHAPES
from regard.worlds.shapes.world import Shapes

SEEDS = 1
SHARES, TAKEN, FACTORS = (0.0, 0.4, 0.8, 1.0), 0.8, (0.5, 0.75, 1.0, 1.5, 2.0)
OVERLAP, OUTSIDE = 0.8, 0.05
Picture = Tensor


@dataclass(frozen=True)
class Case:
    """A caption, the place of the thing to be edited, what it becomes, and the picture before."""

    said: Caption
    edited: int
    colour: str
    shape: str
    noise: Tensor
    picture: Tensor

    @property
    def phrase(self) -> Phrase:
        return self.said.phrases[self.edited]

    def recoloured(self) -> Phrase:
        return replace(self.phrase, colour=self.colour)

    def reshaped(self) -> Phrase:
        return replace(self.phrase, shape=self.shape)

    def prompt(self, phrase: Phrase | None = None) -> str:
        """The caption, with ``phrase`` in the place of the edited thing's."""
        phrases = list(self.said.phrases)
        phrases[self.edited] = phrase or self.phrase
        return str(replace(self.said, phrases=tuple(phrases)))


def one(found: Sequence[Found], phrase: Phrase) -> Found | None:
    """The largest thing that fits."""
    return max((f for f in found if phrase.fits(f)), key=lambda f: int(f.mask.sum()), default=None)


def cases(painter: Any, count: int, steps: int, seed: int) -> tuple[list[Case], float]:
    """The first ``count`` captions that are painted rightly, and how many are."""
    world = Shapes(size=32, things=(2, 2), sizes=(0.33, 0.46), tilt=0.0, seed=seed, split="test", count=20 * count)
    kept: list[Case] = []
    tried = 0
    for index in range(len(world)):
        _, said = captioned(world, index)
        first, second = said.phrases
        if first.shape == second.shape or first.colour == second.colour:
            continue
        rng = np.random.default_rng([seed, index, 2])
        noise = painter.noise(1, seed=seed * 100_003 + index)
        picture = painter.sample([str(said)], latents=noise, steps=steps)[0]
        found, tried = judge(picture), tried + 1
        if len(found) == 2 and all(one(found, phrase) is not None for phrase in said.phrases):
            colours = [c for c in COLOURS if c not in (first.colour, second.colour)]
            shapes = [s for s in SHAPES if s not in (first.shape, second.shape)]
            kept.append(
                Case(said, int(rng.integers(2)), str(rng.choice(colours)), str(rng.choice(shapes)), noise, picture)
            )
        if len(kept) == count:
            return kept, count / tried
    raise RuntimeError(f"of {tried} captions only {len(kept)} were painted rightly; {count} are needed")


def edited(
    painter: Any,
    case: Case,
    phrase: Phrase,
    steps: int,
    edit: Replace | Reweight,
    *,
    blend: bool = False,
    cross: float = TAKEN,
) -> tuple[Picture, Picture]:
    """The source's picture and the edit's, painted in one batch under the controller."""
    prompts = [case.prompt(), case.prompt(phrase)]
    region = LocalBlend([[str(case.phrase.shape)], [str(phrase.shape)]]) if blend else None
    control = PromptToPrompt(prompts, edit, painter.tokenizer, steps, blend=region, cross=cross)
    with apply(painter.unet, control):
        before, after = painter.sample(prompts, latents=case.noise, steps=steps, after_step=control.blended)
    return before, after


@dataclass(frozen=True)
class Outcome:
    """Whether an edit came out, whether the rest stayed, and the mean absolute difference outside the thing."""

    success: bool
    preserved: bool
    outside: float


def outcome(case: Case, after: Picture, phrase: Phrase) -> Outcome:
    """What became of ``case.picture`` when its thing was to become ``phrase``."""
    before, found = judge(case.picture), judge(after)
    old, new = one(before, case.phrase), one(found, phrase)
    rest = case.said.phrases[1 - case.edited]
    stays, stayed = one(before, rest), one(found, rest)
    assert old is not None
    assert stays is not None
    overlap = 0.0
    if stayed is not None:
        overlap = float((stays.mask & stayed.mask).sum() / (stays.mask | stayed.mask).sum())
    away = ~(old.mask if new is None else old.mask | new.mask)
    change = (after - case.picture).abs().mean(0)
    outside = float(change[away].mean())
    return Outcome(new is not None, overlap >= OVERLAP and outside <= OUTSIDE, outside)


def amount(picture: Picture, colour: str) -> float:
    """Chroma of the pixels of this hue, summed over the picture."""
    rgb = picture.numpy().astype(np.float32)
    nearest, coloured = labels(rgb)
    return float(hue_and_chroma(rgb)[1][coloured & (nearest == list(COLOURS).index(colour))].sum())


def share(outcomes: Sequence[Outcome], what: str) -> float:
    """Mean of a fact or figure; facts in per cent."""
    values = [getattr(o, what) for o in outcomes]
    return fmean(values) * (100 if isinstance(values[0], bool) else 1)


def rank(values: Sequence[float]) -> float:
    """Spearman's correlation with ``SHARES``; 0 where all values are alike."""
    from scipy.stats import spearmanr

    return float(spearmanr(SHARES, values).statistic) if len(set(values)) > 1 else 0.0


def run(budget: Budget, seeds: int) -> list[Row]:
    count, few, steps = (2, 1, 4) if budget == "smoke" else (64, 24, 25)
    painter: Any = pretrained("shapes-diffusion")
    sites(painter.unet, run=lambda: painter.sample([""], steps=1))  # Known ones are watched at less cost.
    chosen, right = [], []
    for seed in range(seeds):
        some, rightly = cases(painter, count, steps, 100 + seed)
        chosen += some
        right.append(100 * rightly)

    def swapped(cases: Sequence[Case], into: Callable[[Case], Phrase], **options: Any) -> list[Outcome]:
        painted = [edited(painter, case, into(case), steps, Replace(), **options) for case in cases]
        return [outcome(case, after, into(case)) for case, (_, after) in zip(cases, painted)]

    def alone(cases: Sequence[Case], into: Callable[[Case], Phrase]) -> list[Outcome]:
        prompts, noise = [case.prompt(into(case)) for case in cases], torch.cat([case.noise for case in cases])
        painted = painter.sample(prompts, latents=noise, steps=steps)
        return [outcome(case, after, into(case)) for case, after in zip(cases, painted)]

    colour, plain = swapped(chosen, Case.recoloured), alone(chosen, Case.recoloured)
    shape, plain_shape = swapped(chosen, Case.reshaped), alone(chosen, Case.reshaped)
    blended = swapped(chosen, Case.recoloured, blend=True)
    places = [i * count + j for i in range(seeds) for j in range(few)]
    subset = [chosen[i] for i in places]
    sweep = [
        [colour[i] for i in places] if cross == TAKEN else swapped(subset, Case.recoloured, cross=cross)
        for cross in SHARES
    ]
    amounts = []
    for factor in FACTORS:
        strengths = [
            amount(
                edited(painter, case, case.phrase, steps, Reweight({str(case.phrase.colour): factor}))[1],
                str(case.phrase.colour),
            )
            for case in subset
        ]
        amounts.append(fmean(strengths))
    rises = [after - before for before, after in pairwise(amounts)]
    ranks = {what: rank([share(outcomes, what) for outcomes in sweep]) for what in ("preserved", "success")}
    kept = {name: share(outcomes, "preserved") for name, outcomes in (("ours", colour), ("plain", plain))}
    return [
        Row("colour swaps that succeed, %", share(colour, "success"), 70, ">=", share(plain, "success")),
        Row("colour swaps that preserve the rest, %", kept["ours"], 80, ">=", kept["plain"]),
        Row("preserving, points more than without", kept["ours"] - kept["plain"], 15, ">="),
        Row(
            "difference outside with blending over without",
            share(blended, "outside") / share(colour, "outside"),
            0.5,
            "<=",
        ),
        Row(
            "rank correlation of share and preserving",
            ranks["preserved"],
            0,
            ">",
            values=tuple(share(o, "preserved") for o in sweep),
        ),
        Row(
            "rank correlation of share and success",
            ranks["success"],
            0,
            "<",
            values=tuple(share(o, "success") for o in sweep),
        ),
        Row("smallest step in colour as its word's weight rises", min(rises), 0, ">", values=tuple(amounts)),
        Row("colour swaps with blending that succeed, %", share(blended, "success")),
        Row("colour swaps with blending that preserve the rest, %", share(blended, "preserved")),
        Row("shape swaps that succeed, %", share(shape, "success"), baseline=share(plain_shape, "success")),
        Row(
            "shape swaps that preserve the rest, %", share(shape, "preserved"), baseline=share(plain_shape, "preserved")
        ),
        Row("captions painted rightly, %", fmean(right), values=tuple(right)),
    ]
