"""HeadMask: in each training step some attention heads are silenced, drawn at random or the most important ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.core.call import Call
from regard.core.edit import Edit, edit
from regard.nn.attention import Attention

Head = tuple[str, int]
Loss = Callable[..., Tensor]


@contextmanager
def silenced(model: nn.Module, heads: Iterable[Head]) -> Iterator[None]:
    """The outputs of these heads, (site, number), are zero inside the block, forward and backward.

    Raises:
        ValueError: a site that is no module of the model, a head that it does not have, a site that did not run.
    """
    chosen: dict[str, list[int]] = {}
    for site, head in heads:
        chosen.setdefault(site, []).append(head)
    modules = dict(model.named_modules())
    for site in chosen:
        if site not in modules:
            raise ValueError(f"heads name the site {site!r}, which is no module of {type(model).__name__}")
    if not chosen:
        yield
        return
    ran: set[str] = set()

    def gate(call: Call) -> Tensor:
        ran.add(call.site)
        count, silent = call.q.shape[1], chosen.get(call.site, [])
        if silent and not 0 <= min(silent) <= max(silent) < count:
            raise ValueError(f"heads {silent} of {call.site!r}: it has {count}")
        index = torch.tensor(silent, dtype=torch.long, device=call.q.device)
        return torch.ones(count, dtype=call.q.dtype, device=call.q.device).index_fill(0, index, 0.0)

    with edit(model, Edit.heads(gate), where=list(chosen)):
        yield
        missed = chosen.keys() - ran
        if missed:
            raise ValueError(f"no attention ran at {sorted(missed)}, so no head of it was silenced")


def head_importance(model: nn.Module, loss: Loss, *batch: object, sites: Iterable[str]) -> dict[str, Tensor]:
    r"""How much the loss depends on each head's output, in expectation over the examples: one value a head and site.

    .. math:: I_h = \frac1B \sum_b \Big| \frac{\partial L_b}{\partial \xi_{bh}} \Big|
                  = \frac1B \sum_b \Big| \sum_{l} o_{bhl} \cdot \frac{\partial L_b}{\partial o_{bhl}} \Big|

    with a gate :math:`\xi = 1` on every head's output o. Gradients of parameters are left as they are.

    Args:
        loss: called with ``batch``; runs the model and returns the mean of the examples' losses. Where a host folds windows
            into the batch, a window counts as an example.
        sites: names of attention sites.
    """
    wanted = set(sites)
    gates: dict[tuple[str, int], Tensor] = {}

    def gate(call: Call) -> Tensor:
        key = (call.site, len(call.q))
        if call.site not in wanted:
            return torch.ones(call.q.shape[1], dtype=call.q.dtype, device=call.q.device)
        if key not in gates:
            gates[key] = torch.ones(call.q.shape[:2], dtype=call.q.dtype, device=call.q.device, requires_grad=True)
        return gates[key]

    with edit(model, Edit.heads(gate), where=list(wanted)), torch.enable_grad():
        value = loss(*batch)
        missed = wanted - {site for site, _ in gates}
        if missed:
            raise ValueError(f"no attention ran at {sorted(missed)}")
        grads = torch.autograd.grad(value, list(gates.values()))
    importance: dict[str, Tensor] = {}
    for (site, _), grad in zip(gates, grads):
        importance[site] = importance.get(site, torch.zeros_like(grad[0])) + grad.abs().sum(0)
    return importance


def gini(importance: Mapping[str, Tensor]) -> float:
    r"""How unequal the heads are, 0 (all alike) to nearly 1 (one counts): :math:`\sum_{ij} |I_i - I_j| \,/\, 2 n \sum_i I_i`."""
    values = torch.cat([v.detach().double().flatten().cpu() for v in importance.values()])
    if not (values >= 0).all() or values.sum() == 0:
        raise ValueError("importance must not be negative, nor zero everywhere")
    return float((values[:, None] - values).abs().sum() / (2 * len(values) * values.sum()))


class HeadMask(nn.Module):
    """One training step with ``n`` heads of the whole model silenced; which ones is for :meth:`choose` to say.

    Args:
        sites: site -> its number of heads, such as ``{s.name: s.heads for s in regard.sites(model, x).verified}``.
        n: heads silenced in a step.

    Raises:
        ValueError: ``n`` negative or not below the number of heads; a step of a model in ``eval``.
    """

    def __init__(self, sites: Mapping[str, int], n: int) -> None:
        super().__init__()
        if not sites or min(sites.values()) < 1:
            raise ValueError(f"sites={dict(sites)} must name at least one site, each with a positive number of heads")
        if not 0 <= n < sum(sites.values()):
            raise ValueError(f"n={n} must be at least 0 and below the {sum(sites.values())} heads there are")
        self.sites, self.n = dict(sites), n

    def choose(self, model: nn.Module, loss: Loss, batch: tuple[object, ...]) -> list[Head]:
        raise NotImplementedError

    def all_heads(self) -> list[Head]:
        return [(site, head) for site, count in self.sites.items() for head in range(count)]

    @contextmanager
    def step(self, model: nn.Module, loss: Loss, *batch: object) -> Iterator[Tensor]:
        """The loss with heads silenced until the end of the block: call ``backward`` inside it.

        Under activation checkpointing the forward runs again in the backward pass, and must meet the same mask.
        """
        if not model.training:
            raise ValueError("model is in eval: heads are silenced in training only")
        with silenced(model, self.choose(model, loss, batch)):
            yield loss(*batch)

    def forward(self, model: nn.Module, loss: Loss, *batch: object) -> Tensor:
        """The loss of one step, for a model without activation checkpointing; see :meth:`step` for one with it."""
        with self.step(model, loss, *batch) as value:
            return value

    def toy(self, seed: int) -> tuple[nn.Module, Loss, Tensor]:
        """Arguments of a small call."""
        torch.manual_seed(seed)
        model = nn.Sequential()
        for site, count in self.sites.items():
            model.add_module(site, Attention(4 * count, count))
        first = next(iter(self.sites.values()))
        return model, lambda x: model(x).square().mean(), torch.randn(2, 5, 4 * first, requires_grad=True)


_EXAMPLE = {"sites": {"first": 2, "second": 2}, "n": 1}


@method("headmask", kind="objective", tags=Tags(random=True), example=_EXAMPLE)
class RandomHeadMask(HeadMask):
    r"""Train with ``n`` heads silenced at random in every step, so that the model stops depending on few of them.

    All sites of the model are one pool: encoder, decoder and cross-attention alike. The mask holds for the whole batch,
    nothing is rescaled, and nothing changes at inference. Called "Random-n" in the paper.

    .. math:: o_h \leftarrow \xi_h\, o_h, \qquad \xi \in \{0, 1\}^{heads}, \; \textstyle\sum_h (1 - \xi_h) = n

    Args:
        sites: site -> its number of heads, such as ``{s.name: s.heads for s in regard.sites(model, x).verified}``.
        n: heads silenced in a step; the paper takes an eighth.
        generator: of the draw; processes that train together need generators of one seed. Default torch's own.

    Shape: called with a model, a loss, and the loss's arguments -> scalar. Hosts with grouped keys lose query heads only.

    Raises:
        ValueError: ``n`` negative or not below the number of heads; a step of a model in ``eval``; an unknown site.

    Cost: that of the step without it.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(Attention(8, 4))
        >>> mask = RandomHeadMask({"0": 4}, n=1)
        >>> x = torch.randn(2, 5, 8)
        >>> with mask.step(model, lambda x: model(x).square().mean(), x) as loss:
        ...     loss.backward()
        >>> sum(not rows.any() for rows in model[0].v.weight.grad.split(2))
        1

    Differs: the paper leaves rescaling and granularity open; here there is none, and the mask is one for the batch.

    Reference: Zewei Sun, Shujian Huang, Xin-Yu Dai, Jiajun Chen, Alleviating the Inequality of Attention Heads for Neural
        Machine Translation, COLING 2022, arXiv:2009.09672
    """

    def __init__(self, sites: Mapping[str, int], n: int, generator: torch.Generator | None = None) -> None:
        super().__init__(sites, n)
        self.generator = generator

    def choose(self, model: nn.Module, loss: Loss, batch: tuple[object, ...]) -> list[Head]:
        every = self.all_heads()
        return [every[i] for i in torch.randperm(len(every), generator=self.generator)[: self.n].tolist()]


@method("headmask-important", kind="objective", paper="headmask", example=_EXAMPLE)
class ImportantHeadMask(HeadMask):
    r"""Train with the ``n`` heads silenced that the batch depends on most, by :func:`head_importance`.

    A first pass with all heads finds the importance, a second one trains without the most important. Both see the same
    random numbers, hence the same dropout. Called "Impt-n" in the paper.

    .. math:: \xi_h = 0 \iff h \in \mathrm{top}_n\, I

    Args:
        sites: site -> its number of heads, such as ``{s.name: s.heads for s in regard.sites(model, x).verified}``.
        n: heads silenced in a step.

    Shape: called with a model, a loss that is a mean over examples, and the loss's arguments -> scalar.

    Cost: about twice the step without it.

    Example:
        >>> mask = ImportantHeadMask({"first": 2, "second": 2}, n=1)
        >>> model, loss, x = mask.toy(seed=0)
        >>> mask(model, loss, x).shape
        torch.Size([])

    Differs: importance is compared over all sites as it is, without a norm by layer. Statistics of batch norms see both
        passes.

    Reference: Zewei Sun, Shujian Huang, Xin-Yu Dai, Jiajun Chen, Alleviating the Inequality of Attention Heads for Neural
        Machine Translation, COLING 2022, arXiv:2009.09672
    """

    def choose(self, model: nn.Module, loss: Loss, batch: tuple[object, ...]) -> list[Head]:
        if self.n == 0:
            return []
        devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            found = head_importance(model, loss, *batch, sites=self.sites)
        every = self.all_heads()
        values = torch.cat([found[site] for site in self.sites])
        return [every[i] for i in values.topk(self.n).indices.tolist()]
