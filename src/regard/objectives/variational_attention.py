"""Attention as a distribution over alignments: exact marginals, hard choices, and variational bounds, as losses."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard.catalog.registry import Tags, method
from regard.objectives._latent import Alignments, LatentAlignment, Losses, Readout, divergence, log_weights
from regard.ops import normalizers


@method("variational-attention-soft", kind="objective", paper="variational-attention")
class SoftAlignment(LatentAlignment):
    r"""Soft attention: :math:`-\log p(y \mid \sum_s p_s m_s)`, the likelihood of a mean context. The posterior is not used."""

    def tokens(self, a: Alignments) -> Losses:
        return -a.soft()


@method("variational-attention-exact", kind="objective", paper="variational-attention")
class ExactAlignment(LatentAlignment):
    r"""The marginal likelihood, :math:`-\log \sum_s p_s\, p(y \mid m_s)`, over all places or the ``topk`` likeliest.

    The ``topk`` likeliest share the whole probability, as decoding wants it. The posterior is not used.
    """

    def __init__(self, topk: int | None = None, *, chunk: int | None = None) -> None:
        super().__init__(chunk)
        if topk is not None and topk < 1:
            raise ValueError(f"topk={topk} must be at least 1")
        self.topk = topk

    def tokens(self, a: Alignments) -> Losses:
        if self.topk is None:
            return -(a.log_prior + a.everywhere()).logsumexp(-1)
        log_p, places = a.log_prior.topk(min(self.topk, a.log_prior.shape[-1]))
        return -(log_p.log_softmax(-1) + a.of(a.contexts(places))).logsumexp(-1)

    def predict(
        self,
        query: Float[Tensor, "b t e"],
        memory: Float[Tensor, "b s d"],
        prior: Float[Tensor, "b t s"],
        readout: Readout,
        *,
        mask: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Log-probabilities of the next token, for beam search."""
        log_p, places = log_weights(prior, mask).topk(min(self.topk or memory.shape[1], memory.shape[1]))
        a = Alignments(readout, query, memory, places[..., 0], log_p, log_p)
        return (log_p.log_softmax(-1)[..., None] + a.log_probs(a.contexts(places))).logsumexp(2)


class Variational(LatentAlignment):
    """A loss with a posterior, and the divergence of it from the prior at ``kl_weight``, which may be raised while training."""

    inferred = True

    def __init__(self, kl_weight: float = 1.0, *, chunk: int | None = None) -> None:
        super().__init__(chunk)
        if kl_weight < 0:
            raise ValueError(f"kl_weight={kl_weight} must not be negative")
        self.kl_weight = kl_weight

    def kl(self, a: Alignments) -> Losses:
        return self.kl_weight * divergence(a.log_posterior, a.log_prior)


@method("variational-attention-enum", kind="objective", paper="variational-attention")
class EnumeratedAlignment(Variational):
    r"""The bound without sampling, :math:`-\sum_s q_s \log p(y \mid m_s) + KL(q \| p)`."""

    def tokens(self, a: Alignments) -> Losses:
        return self.kl(a) - (a.log_posterior.exp() * a.everywhere()).sum(-1)


class Sampled(Variational):
    """A loss from ``num_samples`` places of the posterior, drawn by ``generator`` (default torch's own)."""

    def __init__(
        self, num_samples: int = 1, kl_weight: float = 1.0, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(kl_weight)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        self.num_samples, self.generator = num_samples, generator

    def expanded(self, log_q: Float[Tensor, "b t s"]) -> Float[Tensor, "b t k s"]:
        return log_q[:, :, None].expand(-1, -1, self.num_samples, -1)

    def draw(self, log_q: Float[Tensor, "b t s"]) -> Int[Tensor, "b t k"]:
        return normalizers.hard_sample(self.expanded(log_q), generator=self.generator).argmax(-1)

    def baseline(self, a: Alignments) -> Losses:
        """What a draw is expected to reach: the same readout of the mean context."""
        return a.soft().detach()

    def reinforced(self, a: Alignments, log_q: Float[Tensor, "b t s"]) -> Losses:
        r""":math:`-\log p(y \mid m_k) - (\log p(y \mid m_k) - b) \log q_k`, the factor in brackets without gradient."""
        places = self.draw(log_q)
        reached = a.of(a.contexts(places))
        reward = reached.detach() - self.baseline(a)[..., None]
        return -(reached + reward * log_q.gather(-1, places)).mean(-1)


@method("variational-attention-hard", kind="objective", paper="variational-attention", tags=Tags(random=True))
class HardAlignment(Sampled):
    """Hard attention: a place drawn from the prior, by REINFORCE. The posterior is not used."""

    inferred = False

    def __init__(self, num_samples: int = 1, *, generator: torch.Generator | None = None) -> None:
        super().__init__(num_samples, generator=generator)

    def tokens(self, a: Alignments) -> Losses:
        return self.reinforced(a, a.log_prior)


@method("variational-attention-gumbel", kind="objective", paper="variational-attention", tags=Tags(random=True))
class GumbelAlignment(Sampled):
    """The bound with relaxed draws, weights of Gumbel softmax at ``temperature``; the divergence is that of the choices."""

    def __init__(
        self,
        temperature: float = 0.1,
        num_samples: int = 1,
        kl_weight: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_samples, kl_weight, generator=generator)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        self.temperature = temperature

    def tokens(self, a: Alignments) -> Losses:
        drawn = normalizers.gumbel(self.expanded(a.log_posterior), None, self.temperature, self.generator)
        context = torch.einsum("btks,bsd->btkd", drawn.to(a.memory.dtype), a.memory)
        return self.kl(a) - a.of(context).mean(-1)


@method("variational-attention-wsram", kind="objective", paper="variational-attention", tags=Tags(random=True))
class ReweightedAlignment(Sampled):
    r"""Reweighted wake-sleep: draws k of q are weighed, :math:`w_k \propto p_k\, p(y \mid m_k) / q_k`, and made likelier.

    .. math:: -\sum_k w_k \log p(y \mid m_k) + (w_k - u_k) \log p_k + (w_k - \tfrac1K) \log q_k, \qquad u_k \propto p_k / q_k

    Weights have no gradient; u and 1/K take away what the weights are without the target.
    """

    def __init__(self, num_samples: int = 5, *, generator: torch.Generator | None = None) -> None:
        super().__init__(num_samples, generator=generator)

    def tokens(self, a: Alignments) -> Losses:
        places = self.draw(a.log_posterior)
        reached = a.of(a.contexts(places))
        log_p, log_q = (log.gather(-1, places) for log in (a.log_prior, a.log_posterior))
        ratio = (log_p - log_q).detach()
        w, u = (ratio + reached.detach()).softmax(-1), ratio.softmax(-1)
        return -(w * reached + (w - u) * log_p + (w - 1 / self.num_samples) * log_q).sum(-1)


def _read(lstm: nn.LSTM, x: Tensor, there: Tensor | None, name: str) -> Tensor:
    if not x.shape[1]:
        return x.new_zeros(len(x), 0, 2 * lstm.hidden_size)
    if there is None:
        return lstm(x)[0]
    if (there[:, 1:] > there[:, :-1]).any():
        raise ValueError(f"{name} must be True from the left on, without gaps")
    packed = pack_padded_sequence(x, there.sum(1).clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class InferenceNetwork(nn.Module):
    r"""Scores of a posterior: an LSTM in both directions over the source, one over the target, compared by a linear map.

    .. math:: z_{ts} = h^{target\top}_t W\, h^{source}_s

    Step t of the target is the token that is predicted there, and all that follow it are seen as well.

    Args:
        source_dim: channels of the source.
        target_dim: channels of the target.
        hidden: channels of either direction.

    Shape: source (b, s, source_dim), target (b, t, target_dim) -> (b, t, s). ``mask`` (b, s) and ``steps`` (b, t) are True
        where there is a token, from the left.
    """

    def __init__(self, source_dim: int, target_dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.source = nn.LSTM(source_dim, hidden, batch_first=True, bidirectional=True)
        self.target = nn.LSTM(target_dim, hidden, batch_first=True, bidirectional=True)
        self.compare = nn.Linear(2 * hidden, 2 * hidden, bias=False)

    def forward(
        self,
        source: Float[Tensor, "b s c"],
        target: Float[Tensor, "b t e"],
        *,
        mask: Bool[Tensor, "b s"] | None = None,
        steps: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t s"]:
        sources, targets = _read(self.source, source, mask, "mask"), _read(self.target, target, steps, "steps")
        return self.compare(targets) @ sources.transpose(1, 2)


@method("variational-attention", kind="objective", tags=Tags(random=True))
class VariationalAttention(Sampled):
    r"""Train attention as a latent alignment, with a posterior that sees the target and a bound that is sampled from it.

    Attention weights p are the prior of the place z that a token is read from; the likelihood is that of single places, and
    not, as in soft attention, that of their mean. An inference network that knows the target gives a posterior q. One draw of
    it trains readout and posterior, the latter by its likelihood above what the mean context reaches. Only p is used
    to predict, with :class:`ExactAlignment` for likelihood and decoding.

    .. math:: -\log p(y) \le -\mathbb E_{z \sim q} \log p(y \mid m_z) + KL(q \| p)

    Other losses, called alike: :class:`SoftAlignment`, :class:`ExactAlignment`, :class:`HardAlignment`,
    :class:`EnumeratedAlignment`, :class:`GumbelAlignment`, :class:`ReweightedAlignment`. Those that use no posterior may
    be given one, so that one loop can begin with soft attention and go on with a bound; from a random start
    posterior and readout may settle on a wrong pairing.

    Args:
        num_samples: draws a token, K; the bound is averaged over them.
        kl_weight: of the divergence; may be raised from 0 in training.
        generator: of the draws; default torch's own.

    Shape: called with query (b, t, e), memory (b, s, d), target (b, t), scores of the prior (b, t, s), a readout, and scores of
        the posterior (b, t, s), such as those of :class:`InferenceNetwork` -> scalar, nats a token. ``readout(query,
        context)`` maps (b, t, k, e) and (b, t, k, d) to logits (b, t, k, v). ``mask`` (b, s) is True where the memory
        is, ``steps`` (b, t) where the target is. In a recurrent decoder the query may hold the mean context of the steps
        before, whatever the loss.

    Raises:
        ValueError: scores of another shape, no posterior, a row without a place, arguments out of range.

    Cost: 1 + K readouts a token; :class:`ExactAlignment` and :class:`EnumeratedAlignment` take s of them.

    Example:
        >>> import torch
        >>> bound = VariationalAttention(num_samples=2)
        >>> query, memory, target, prior, readout, posterior = bound.toy(seed=0)
        >>> loss = bound(query, memory, target, prior, readout, posterior)
        >>> loss.shape, torch.autograd.grad(loss, posterior)[0].shape
        (torch.Size([]), torch.Size([2, 3, 5]))

    Differs: with several draws the log-likelihoods are averaged, a bound for any K; the official code has one draw. The value
        includes the term whose gradient trains the posterior, so it is no estimate of the bound. To train the baseline
        too, add :class:`SoftAlignment`. Alignments in the simplex (Dirichlet) are left out. ``topk`` renormalises, as
        the official decoder does.

    Reference: Yuntian Deng, Yoon Kim, Justin Chiu, Demi Guo, Alexander M. Rush, Latent Alignment and Variational Attention,
        NeurIPS 2018, arXiv:1807.03756
    """

    def tokens(self, a: Alignments) -> Losses:
        return self.reinforced(a, a.log_posterior) + self.kl(a)
