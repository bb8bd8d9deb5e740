"""Which place of a memory belongs to which token of a target: distributions and likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.ops.rows import single

Readout = Callable[[Tensor, Tensor], Tensor]
Losses = Float[Tensor, "b t"]


def log_weights(scores: Float[Tensor, "b t s"], mask: Bool[Tensor, "b s"] | None = None) -> Float[Tensor, "b t s"]:
    """Logarithms of the softmax; the least finite number where ``mask`` is False, so that no product with zero is NaN."""
    z = single(scores)
    if mask is None:
        return z.log_softmax(-1)
    hidden = ~mask[:, None]
    return z.masked_fill(hidden, float("-inf")).log_softmax(-1).masked_fill(hidden, torch.finfo(z.dtype).min)


def divergence(log_q: Float[Tensor, "b t s"], log_p: Float[Tensor, "b t s"]) -> Losses:
    r""":math:`KL(q \| p) = \sum_s q_s (\log q_s - \log p_s)`."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@dataclass(frozen=True)
class Alignments:
    """What is known of the alignments of a batch: their distributions, and how likely the target is under any of them."""

    readout: Readout
    query: Float[Tensor, "b t e"]
    memory: Float[Tensor, "b s d"]
    target: Int[Tensor, "b t"]
    log_prior: Float[Tensor, "b t s"]
    log_posterior: Float[Tensor, "b t s"]
    chunk: int | None = None

    def log_probs(self, context: Float[Tensor, "b t k d"]) -> Float[Tensor, "b t k v"]:
        """The log-probability of every token, for each of k contexts."""
        query = self.query[:, :, None].expand(-1, -1, context.shape[2], -1)
        return single(self.readout(query, context)).log_softmax(-1)

    def of(self, context: Float[Tensor, "b t k d"]) -> Float[Tensor, "b t k"]:
        """The log-likelihood of the target, for each of k contexts."""
        index = self.target[:, :, None, None].expand(-1, -1, context.shape[2], 1)
        return self.log_probs(context).gather(-1, index)[..., 0]

    def contexts(self, places: Int[Tensor, "b t k"]) -> Float[Tensor, "b t k d"]:
        return self.memory[torch.arange(len(places), device=places.device)[:, None, None], places]

    def everywhere(self) -> Float[Tensor, "b t s"]:
        """The log-likelihood of the target for every place, ``chunk`` places at a time, forward and backward."""
        all_places = self.memory[:, None].expand(-1, self.query.shape[1], -1, -1)
        if self.chunk is None:
            return self.of(all_places)
        parts = (checkpoint(self.of, part, use_reentrant=False) for part in all_places.split(self.chunk, 2))
        return torch.cat(list(parts), -1)

    def soft(self) -> Losses:
        """The log-likelihood of the target for the mean context of the prior."""
        context = self.log_prior.exp().to(self.memory.dtype) @ self.memory
        return self.of(context[:, :, None])[..., 0]


class LatentAlignment(nn.Module):
    """A loss of the target given a memory and scores over its places; what it is per token is for :meth:`tokens` to say.

    Args:
        chunk: places whose likelihood is held at a time, where all are asked for; default all.
    """

    inferred = False

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        self.chunk = chunk

    def tokens(self, a: Alignments) -> Losses:
        raise NotImplementedError

    def forward(
        self,
        query: Float[Tensor, "b t e"],
        memory: Float[Tensor, "b s d"],
        target: Int[Tensor, "b t"],
        prior: Float[Tensor, "b t s"],
        readout: Readout,
        posterior: Float[Tensor, "b t s"] | None = None,
        *,
        mask: Bool[Tensor, "b s"] | None = None,
        steps: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, ""]:
        shape = (*target.shape, memory.shape[1])
        for name, scores in (("prior", prior), ("posterior", posterior)):
            if scores is not None and tuple(scores.shape) != shape:
                raise ValueError(f"{name} must be {shape}, target tokens by places; got {tuple(scores.shape)}")
        if self.inferred and posterior is None:
            raise ValueError(f"posterior=None: {type(self).__name__} needs the scores of an inference network")
        if mask is not None and mask.shape != memory.shape[:2]:
            raise ValueError(f"mask must be {tuple(memory.shape[:2])}, as the memory; got {tuple(mask.shape)}")
        if not shape[-1] or (mask is not None and not mask.any(-1).all()):
            raise ValueError(f"mask or memory {tuple(memory.shape)} leaves a row without a place to align to")
        steps = torch.ones_like(target, dtype=torch.bool) if steps is None else steps
        log_p = log_weights(prior, mask)
        log_q = log_p if posterior is None else log_weights(posterior, mask)
        a = Alignments(readout, query, memory, target.masked_fill(~steps, 0), log_p, log_q, self.chunk)
        return self.tokens(a).masked_fill(~steps, 0.0).sum() / steps.sum().clamp(min=1)

    def toy(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Readout, Tensor]:
        """Arguments of a small call."""
        world = torch.Generator().manual_seed(seed)
        query, memory, prior, posterior, w = (
            torch.randn(shape, generator=world) for shape in ((2, 3, 4), (2, 5, 6), (2, 3, 5), (2, 3, 5), (7, 10))
        )
        target = torch.randint(7, (2, 3), generator=world)
        for x in (query, memory, prior, posterior):
            x.requires_grad_()
        return query, memory, target, prior, lambda q, c: torch.cat([q, c], -1).tanh() @ w.T, posterior
