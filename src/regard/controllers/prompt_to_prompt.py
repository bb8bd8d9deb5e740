"""Prompt-to-Prompt: edit a generated image through its prompt, by giving the edited prompt the source's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog import Tags, method
from regard.controllers._words import Tokenizer, Words, positions_of, refine_mapper, replace_matrix
from regard.core.apply import SiteView
from regard.core.edit import Edit
from regard.core.step import Step


class Replace:
    r"""Word swap: :math:`A^{new}_j = \sum_i A^{source}_i M_{ij}`, M the identity, realigned where token counts differ."""

    def weights(self, source: str, target: str, tokenizer: Tokenizer) -> Callable[[Tensor, Tensor], Tensor]:
        matrix = replace_matrix(source, target, tokenizer)
        return lambda from_source, own: from_source @ matrix.to(from_source)


class Refine:
    r"""Added words: :math:`A^{new}_j = A^{source}_{m(j)}` where token j of the target is aligned, its own weight elsewhere."""

    def weights(self, source: str, target: str, tokenizer: Tokenizer) -> Callable[[Tensor, Tensor], Tensor]:
        mapper = refine_mapper(tokenizer.encode(source), tokenizer.encode(target), tokenizer.model_max_length)
        aligned = mapper >= 0

        def change(from_source: Tensor, own: Tensor) -> Tensor:
            return torch.where(aligned.to(own.device), from_source[..., mapper.clamp_min(0).to(own.device)], own)

        return change


@dataclass(frozen=True)
class Reweight:
    """Word strength: the weights that ``base`` gives (default the source's), times a factor at chosen words of the target."""

    factors: Mapping[str, float]
    base: Replace | Refine | None = None

    def weights(self, source: str, target: str, tokenizer: Tokenizer) -> Callable[[Tensor, Tensor], Tensor]:
        equalizer = torch.ones(tokenizer.model_max_length)
        for word, factor in self.factors.items():
            equalizer[positions_of(word, target, tokenizer)] = factor
        first = self.base.weights(source, target, tokenizer) if self.base else lambda from_source, own: from_source
        return lambda from_source, own: first(from_source, own) * equalizer.to(own)


@dataclass
class LocalBlend:
    """Keeps an edit inside the region that chosen words attend to: one word for each prompt, or several.

    Args:
        words: for each prompt the words whose maps are the region.
        threshold: share of the map's maximum above which a place belongs to the region.
        start: share of the steps after which blending begins.
        resolution: side of the cross-attention maps that are used.
    """

    words: Sequence[Sequence[str]]
    threshold: float = 0.3
    start: float = 0.2
    resolution: int = 16

    def region(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """(b, 1, H, W) boolean from summed maps (b, h, w): 3x3 maximum, nearest to ``size``, threshold, source or edit."""
        pooled = F.max_pool2d(maps[:, None], 3, 1, 1)
        grown = F.interpolate(pooled, size=size, mode="nearest")
        peak = grown.amax((2, 3), keepdim=True).clamp_min(torch.finfo(grown.dtype).tiny)
        mask = grown / peak > self.threshold
        return mask | mask[:1]


@method(
    "prompt-to-prompt",
    kind="controller",
    tags=Tags(off={"cross": 0.0, "self_attention": 0.0}),
    example={"prompts": ["a red circle", "a blue circle"], "edit": Replace(), "num_steps": 4},
)
class PromptToPrompt:
    r"""Denoises a source and edited prompts in one batch from one noise, and gives the edits the source's attention.

    The layout of an image stands in its cross-attention maps: where the edited prompt uses those of the source, the image
    stays and only what the words say changes. Self-attention at low resolution is taken over for a shorter while.

    .. math:: A_{edit} \leftarrow a_i f(A_{source}, A_{edit}) + (1 - a_i) A_{edit}, \qquad a_i \in \{0, 1\}^{window}

    Args:
        prompts: the source first, then the edits.
        edit: :class:`Replace`, :class:`Refine` or :class:`Reweight`, one for all edited prompts.
        tokenizer: of the text encoder; its ``model_max_length`` is the window that prompts are padded to, 77 in CLIP.
        num_steps: denoising steps of the loop around the model.
        cross: share of the steps in which cross-attention is taken over, or {word of the edit: (from, to)} with ``"default_"``.
        self_attention: share of the steps in which self-attention is taken over.
        self_resolution: only self-attention over at most this squared number of pixels.
        guided: the batch is [unconditional, conditional]; only the conditional half is changed.
        blend: restricts the change to a region; call :meth:`blended` on the latents after each step.

    Shape: the host's batch is (len(prompts), ...), twice that when guided; keys of cross-attention are the tokens of the window.

    Raises:
        ValueError: fewer than two prompts, a word that is not there, prompts that do not fit the edit, shares outside [0, 1],
            a host of joint attention.

    Cost: cross-attention sites with a taken-over map hold their matrix, heads x N x window; self-attention stays fused.

    Example:
        >>> import regard as rg
        >>> edit = rg.create("prompt-to-prompt", prompts=["a cat", "a dog"], edit=Replace(), tokenizer=Words(), num_steps=4)
        >>> edit.schedule[0, 0, 1].item(), edit.schedule[3, 0, 1].item()
        (1.0, 0.0)

    Differs: self-attention of the source is taken over by taking its queries and keys, which gives the same maps through the
    fused kernel. Rows are not normalised again after a change, as in the official code. Null-text optimisation for real
    photographs is not part of this file.

    Reference: Amir Hertz, Ron Mokady, Jay Tenenbaum, Kfir Aberman, Yael Pritch, Daniel Cohen-Or. Prompt-to-Prompt Image
    Editing with Cross Attention Control. 2022. arXiv:2208.01626
    """

    def __init__(
        self,
        prompts: Sequence[str],
        edit: Replace | Refine | Reweight,
        tokenizer: Tokenizer | None = None,
        num_steps: int = 50,
        *,
        cross: float | Mapping[str, tuple[float, float]] = 0.8,
        self_attention: float = 0.4,
        self_resolution: int = 16,
        guided: bool = True,
        blend: LocalBlend | None = None,
    ) -> None:
        if len(prompts) < 2:
            raise ValueError(f"prompts={list(prompts)} must hold the source and at least one edit")
        tokenizer = Words() if tokenizer is None else tokenizer
        spans = [cross] if isinstance(cross, float | int) else [x for pair in cross.values() for x in pair]
        for share in (*spans, self_attention):
            if not 0 <= share <= 1:
                raise ValueError(f"a share of the steps must be in [0, 1]; got {share}")
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be 1 or more")
        self.prompts, self.num_steps, self.guided, self.blend = tuple(prompts), num_steps, guided, blend
        self.window = tokenizer.model_max_length
        self.changes = [edit.weights(prompts[0], target, tokenizer) for target in prompts[1:]]
        self.schedule = _schedule(prompts, cross, num_steps, tokenizer)
        self.self_steps = int(self_attention * num_steps)
        self.self_pixels = self_resolution**2
        self.maps: Tensor | None = None
        if blend is not None:
            if len(blend.words) != len(prompts):
                raise ValueError(
                    f"blend.words must name words for each of {len(prompts)} prompts; got {len(blend.words)}"
                )
            self.region_tokens = torch.zeros(len(prompts), self.window)
            for i, (words, prompt) in enumerate(zip(blend.words, prompts, strict=True)):
                self.region_tokens[i, [p for w in words for p in positions_of(w, prompt, tokenizer)]] = 1

    def edits(self, site: SiteView, step: Step) -> Iterable[Edit]:
        index = step.index
        if index >= self.num_steps:
            raise ValueError(
                f"step {index} of a loop that was said to have {self.num_steps}: num_steps must be the loop's own"
            )
        if site.kind == "joint":
            raise ValueError(
                f"{site.name} attends to text and image in one sequence; prompt-to-prompt edits cross-attention"
            )
        if site.kind == "cross" and bool(self.schedule[index].any()):
            yield Edit.weights(lambda weights, call: self._cross(weights, index))
        if site.kind == "self" and index < self.self_steps and site.call.q.shape[2] <= self.self_pixels:
            yield Edit.q(lambda q, call: self._from_source(q))
            yield Edit.k(lambda k, call: self._from_source(k))

    def rows(self, batch: int) -> tuple[int, int]:
        """First and last+1 batch row that belong to the prompts (the conditional half when guided)."""
        expected = len(self.prompts) * (2 if self.guided else 1)
        if batch != expected:
            raise ValueError(
                f"the batch has {batch} rows; {len(self.prompts)} prompts, guided={self.guided}, make {expected}"
            )
        return batch - len(self.prompts), batch

    def _from_source(self, x: Tensor) -> Tensor:
        first, last = self.rows(len(x))
        return torch.cat([x[:first], x[first : first + 1].expand(last - first, *x.shape[1:])])

    def _cross(self, weights: Tensor, index: int) -> Tensor:
        first, _ = self.rows(len(weights))
        if weights.shape[-1] != self.window:
            raise ValueError(
                f"cross-attention to {weights.shape[-1]} text tokens; the prompts are padded to {self.window}"
            )
        source = weights[first]
        rows = list(weights)
        for i, change in enumerate(self.changes):
            own = weights[first + 1 + i]
            taken = self.schedule[index, i].to(own.device) > 0
            rows[first + 1 + i] = torch.where(taken, change(source, own), own)
        return torch.stack(rows)

    def seen(self, site: SiteView, step: Step) -> None:
        """Add up the maps of the region's words."""
        if self.blend is None or site.kind != "cross" or site.call.q.shape[2] != self.blend.resolution**2:
            return
        first, last = self.rows(site.call.q.shape[0])
        weights = site.call.weights()[first:last]
        maps = torch.einsum("bhns,bs->bn", weights, self.region_tokens.to(weights)) / weights.shape[1]
        side = self.blend.resolution
        maps = maps.view(-1, side, side).detach()
        self.maps = maps if self.maps is None else self.maps + maps

    def blended(self, latents: Tensor, step: int) -> Tensor:
        """Latents (prompts, c, H, W) after step ``step``: outside the region each edit is the source again."""
        if self.blend is None or self.maps is None or step + 1 <= self.blend.start * self.num_steps:
            return latents
        region = self.blend.region(self.maps, (latents.shape[-2], latents.shape[-1]))
        return torch.where(region, latents, latents[:1])

    def on_step_end(self, pipeline: Any, index: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """``callback_on_step_end`` of a diffusers pipeline."""
        return {**values, "latents": self.blended(values["latents"], index)}


def _schedule(
    prompts: Sequence[str], cross: float | Mapping[str, tuple[float, float]], num_steps: int, tokenizer: Tokenizer
) -> Tensor:
    """(steps, edits, window), 1 where the map of a token is taken over in a step."""
    spans = {"default_": (0.0, float(cross))} if isinstance(cross, float | int) else dict(cross)
    default = spans.pop("default_", (0.0, 1.0))
    schedule = torch.zeros(num_steps, len(prompts) - 1, tokenizer.model_max_length)
    schedule[int(default[0] * num_steps) : int(default[1] * num_steps)] = 1
    for word, (start, end) in spans.items():
        named = [i for i, prompt in enumerate(prompts[1:]) if word in [w.strip(".,;:!?") for w in prompt.split()]]
        if not named:
            raise ValueError(f"word={word!r} of cross is in none of the edited prompts {list(prompts[1:])}")
        for i in named:
            places = positions_of(word, prompts[1 + i], tokenizer)
            schedule[:, i, places] = 0
            schedule[int(start * num_steps) : int(end * num_steps), i, places] = 1
    return schedule
