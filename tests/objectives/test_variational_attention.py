"""Losses of latent alignments against enumeration, sampled gradients against exact ones, and the inference network."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from regard.objectives import variational_attention as losses
from regard.objectives._latent import Alignments, LatentAlignment, divergence, log_weights
from regard.objectives.variational_attention import (
    EnumeratedAlignment,
    ExactAlignment,
    GumbelAlignment,
    HardAlignment,
    InferenceNetwork,
    ReweightedAlignment,
    SoftAlignment,
    VariationalAttention,
)

EVERY = [
    SoftAlignment,
    ExactAlignment,
    EnumeratedAlignment,
    VariationalAttention,
    HardAlignment,
    GumbelAlignment,
    ReweightedAlignment,
]
WEIGHT = torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def readout(query: Tensor, context: Tensor) -> Tensor:
    return 2 * torch.cat([query, context], -1).tanh() @ WEIGHT.T.to(query.dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def batch(b: int = 2, t: int = 3, s: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable, Tensor]:
    return normal(b, t, 4), normal(b, s, 6), torch.randint(7, (b, t)), normal(b, t, s), readout, normal(b, t, s)


def expected(kind: type[LatentAlignment], given: tuple, mask: Tensor, steps: Tensor) -> Tensor:
    """Token by token and place by place."""
    query, memory, target, prior, _, posterior = given
    found = []
    for b in range(len(target)):
        places = [j for j in range(memory.shape[1]) if mask[b, j]]
        for t in range(target.shape[1]):
            if not steps[b, t]:
                continue

            def likely(context: Tensor, b: int = b, t: int = t) -> Tensor:
                return readout(query[b, t], context).softmax(-1)[target[b, t]]

            p, q = (torch.stack([z[b, t, j] for j in places]).softmax(0) for z in (prior, posterior))
            each = torch.stack([likely(memory[b, j]) for j in places])
            if kind is SoftAlignment:
                found.append(-likely(sum(w * memory[b, j] for w, j in zip(p, places, strict=True))).log())
            elif kind is ExactAlignment:
                found.append(-(p * each).sum().log())
            else:
                found.append((q * (q / p).log()).sum() - (q * each.log()).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("kind", [SoftAlignment, ExactAlignment, EnumeratedAlignment])
@pytest.mark.parametrize("chunk", [None, 2])
def test_equals_enumeration(kind: type[LatentAlignment], chunk: int | None) -> None:
    given = batch()
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    steps = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for i, x in enumerate(given) if i in (0, 1, 3, 5)]
    objective = kind() if chunk is None or kind is SoftAlignment else kind(chunk=chunk)
    got, want = objective(*given, mask=mask, steps=steps), expected(kind, given, mask, steps)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    for a, b in zip(*(torch.autograd.grad(x, leaves, materialize_grads=True) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_divergence() -> None:
    q, p = normal(2, 3, 5), normal(2, 3, 5)
    want = kl_divergence(Categorical(logits=q), Categorical(logits=p))
    torch.testing.assert_close(divergence(log_weights(q), log_weights(p)), want, atol=1e-12, rtol=1e-12)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    want = kl_divergence(Categorical(logits=q[..., :3]), Categorical(logits=p[..., :3]))
    torch.testing.assert_close(divergence(log_weights(q, mask), log_weights(p, mask)), want, atol=1e-12, rtol=1e-12)


def true_posterior(given: tuple) -> Tensor:
    query, memory, target, prior, _, _ = given
    a = Alignments(readout, query, memory, target, log_weights(prior), log_weights(prior))
    return (a.log_prior + a.everywhere()).detach()


def test_bound() -> None:
    for _ in range(20):
        given = batch()
        exact = ExactAlignment()(*given)
        assert EnumeratedAlignment()(*given) > exact
        tight = EnumeratedAlignment()(*given[:5], true_posterior(given))
        torch.testing.assert_close(tight, exact, atol=1e-8, rtol=0)


def test_weight_of_the_divergence() -> None:
    given = batch()
    none, half, whole = (EnumeratedAlignment(kl_weight=w)(*given) for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + whole) / 2)
    kl = divergence(log_weights(given[5]), log_weights(given[3])).mean()
    torch.testing.assert_close(whole - none, kl)


class Bare(VariationalAttention):
    def baseline(self, a: Alignments) -> Tensor:
        return torch.zeros_like(a.log_prior[..., 0])


def calm(query: Tensor, context: Tensor) -> Tensor:
    """A readout that has learned little: all places are about as likely to give the target."""
    return readout(query, context) / 4


def draws(objective: LatentAlignment, count: int, reader: Callable = readout) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of single draws, and the exact ones, in memory, prior and posterior."""
    one = [reader if callable(x) else x for x in batch(1, 1, 4)]
    many = [x if callable(x) else x.expand(count, *x.shape[1:]).clone() for x in one]
    leaves = [many[i].requires_grad_() for i in (1, 3, 5)]
    # The loss is a mean over rows, each of which has leaves of its own.
    sampled = torch.autograd.grad(count * objective(*many), leaves, materialize_grads=True)
    leaves = [one[i].requires_grad_() for i in (1, 3, 5)]
    exact = EnumeratedAlignment()(*one) if objective.inferred else EnumeratedAlignment(0.0)(*one[:5], one[3])
    return [g.flatten(1) for g in sampled], list(torch.autograd.grad(exact, leaves, materialize_grads=True))


def off(samples: Tensor, exact: Tensor) -> float:
    """Standard errors between them, the largest."""
    error = samples.std(0) / math.sqrt(len(samples))
    gap = (samples.mean(0) - exact.flatten()).abs()
    assert (gap[error == 0] < 1e-12).all()
    return (gap / error.masked_fill(error == 0, 1.0)).max().item()


@pytest.mark.parametrize(
    "objective",
    [VariationalAttention(), VariationalAttention(5), Bare(), HardAlignment()],
    ids=["1", "5", "bare", "hard"],
)
def test_sampled_gradients_are_unbiased(objective: LatentAlignment) -> None:
    torch.manual_seed(2)
    sampled, exact = draws(objective, 20_000)
    for got, want in zip(sampled, exact, strict=True):
        # The largest of up to 24 numbers: beyond 3.8 in one case of 300.
        assert off(got, want) < 3.8
    used = sampled[2] if objective.inferred else sampled[1]
    assert used.abs().mean() > 0.01


def test_the_baseline_makes_gradients_quieter() -> None:
    noise = []
    for objective in (Bare(), VariationalAttention()):
        torch.manual_seed(2)
        noise.append(draws(objective, 20_000, calm)[0][2].var(0).sum().item())
    assert noise[0] > 2 * noise[1]


def test_the_baseline_gets_no_gradient_of_its_own() -> None:
    query, memory, target, prior, _, posterior = batch()
    prior.requires_grad_()
    objective = VariationalAttention(kl_weight=0.0)
    (grad,) = torch.autograd.grad(
        objective(query, memory.requires_grad_(), target, prior, readout, posterior), prior, materialize_grads=True
    )
    assert not grad.any()


def test_cold_gumbel_weights_are_draws() -> None:
    torch.manual_seed(1)
    one = batch(1, 1, 4)
    many = [x if callable(x) else x.expand(20_000, *x.shape[1:]) for x in one]
    values = []
    objective = GumbelAlignment(1e-4)
    tokens = objective.tokens
    objective.tokens = lambda a: values.append(tokens(a)) or values[-1]  # type: ignore[method-assign]
    objective(*many)
    assert off(values[0], EnumeratedAlignment()(*one)) < 3
    warm = one[5].requires_grad_()
    (grad,) = torch.autograd.grad(GumbelAlignment(0.5, num_samples=4)(*one), warm)
    assert grad.abs().max() > 1e-3


def test_reweighted_draws_follow_the_marginal() -> None:
    """With many draws the readout and the prior see the gradient of the marginal, the posterior that of the true one."""
    torch.manual_seed(1)
    given = batch(1, 1, 4)
    leaves = [given[i].requires_grad_() for i in (1, 3, 5)]
    memory, prior, posterior = torch.autograd.grad(ReweightedAlignment(200_000)(*given), leaves)
    want = torch.autograd.grad(ExactAlignment()(*given), leaves[:2])
    wake = given[5].softmax(-1) - true_posterior(given).softmax(-1)
    for got, exact in zip((memory, prior, posterior), (*want, wake), strict=True):
        assert (got - exact).norm() < 0.02 * exact.norm()


def test_reweighted_draws_by_hand() -> None:
    query, memory, target, prior, _, posterior = given = batch(1, 1, 4)
    objective = ReweightedAlignment(6, generator=torch.Generator().manual_seed(3))
    got = objective(*given)
    objective.generator = torch.Generator().manual_seed(3)
    places = objective.draw(log_weights(posterior))[0, 0]
    assert places.unique().numel() > 1
    p, q = prior[0, 0].softmax(-1)[places], posterior[0, 0].softmax(-1)[places]
    likely = torch.stack([readout(query[0, 0], memory[0, j]).softmax(-1)[target[0, 0]] for j in places])
    w, u = p / q * likely, p / q
    w, u = w / w.sum(), u / u.sum()
    want = -(w * likely.log() + (w - u) * p.log() + (w - 1 / 6) * q.log()).sum()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_sampled_value_by_hand() -> None:
    query, memory, target, prior, _, posterior = given = batch(1, 1, 4)
    objective = VariationalAttention(3, kl_weight=0.5, generator=torch.Generator().manual_seed(3))
    got = objective(*given)
    objective.generator = torch.Generator().manual_seed(3)
    places = objective.draw(log_weights(posterior))[0, 0]
    likely = torch.stack([readout(query[0, 0], memory[0, j]).log_softmax(-1)[target[0, 0]] for j in places])
    soft = -SoftAlignment()(*given)
    log_q = posterior[0, 0].log_softmax(-1)[places]
    kl = kl_divergence(Categorical(logits=posterior), Categorical(logits=prior)).mean()
    torch.testing.assert_close(got, -(likely + (likely - soft) * log_q).mean() + 0.5 * kl, atol=1e-12, rtol=1e-12)


def test_draws_have_the_probabilities_of_the_posterior() -> None:
    scores = normal(1, 1, 5)
    mask = torch.tensor([[True, False, True, True, True]])
    places = VariationalAttention(40_000).draw(log_weights(scores, mask))
    share = torch.bincount(places.flatten(), minlength=5) / 40_000
    want = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)[0, 0]
    torch.testing.assert_close(share.double(), want, atol=0.01, rtol=0)
    assert share[1] == 0


def test_a_certain_prior_makes_all_alike() -> None:
    given = list(batch())
    given[3] = 1e4 * torch.nn.functional.one_hot(torch.randint(5, (2, 3)), 5).double()
    soft = SoftAlignment()(*given)
    torch.testing.assert_close(ExactAlignment()(*given), soft)
    torch.testing.assert_close(HardAlignment()(*given), soft)


def test_one_place_makes_all_alike() -> None:
    given = batch(3, 2, 1)
    want = SoftAlignment()(*given)
    for kind in EVERY:
        torch.testing.assert_close(kind()(*given), want, atol=1e-12, rtol=1e-12)


def test_soft_attention_is_no_bound() -> None:
    gaps = torch.stack([SoftAlignment()(*given) - ExactAlignment()(*given) for given in (batch() for _ in range(50))])
    assert gaps.min() < -0.01
    assert gaps.max() > 0.01


def test_likeliest_places() -> None:
    query, memory, target, prior, _, _ = given = batch()
    for k in (5, 9):
        torch.testing.assert_close(ExactAlignment(topk=k)(*given), ExactAlignment()(*given))
    best = memory.gather(1, prior.argmax(-1)[..., None].expand(-1, -1, 6))
    want = readout(query, best).log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(ExactAlignment(topk=1)(*given), -want)
    mask = torch.tensor([[True] * 5, [False] * 4 + [True]])
    for topk in (None, 2):
        objective = ExactAlignment(topk)
        said = objective.predict(query, memory, prior, readout, mask=mask)
        torch.testing.assert_close(said.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
        found = -said.gather(-1, target[..., None]).mean()
        torch.testing.assert_close(found, objective(*given, mask=mask))


@pytest.mark.parametrize("kind", EVERY)
def test_padding_changes_nothing(kind: type[LatentAlignment]) -> None:
    query, memory, target, prior, _, posterior = given = batch()
    wide = [torch.cat([z, 9 * normal(2, 1, 5)], 1) for z in (prior, posterior)]
    wide = [torch.cat([z, 9 * normal(2, 4, 2)], 2).requires_grad_() for z in wide]
    longer = torch.cat([query, 9 * normal(2, 1, 4)], 1).requires_grad_()
    deeper = torch.cat([memory, 9 * normal(2, 2, 6)], 1).requires_grad_()
    padded = torch.cat([target, torch.full((2, 1), -100)], 1)
    mask, steps = torch.arange(7).expand(2, -1) < 5, torch.arange(4).expand(2, -1) < 3
    value = kind()(longer, deeper, padded, wide[0], readout, wide[1], mask=mask, steps=steps)
    if kind in EVERY[:3]:
        torch.testing.assert_close(value, kind()(*given), atol=1e-12, rtol=1e-12)
    grads = torch.autograd.grad(value, [longer, deeper, *wide], materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)
    assert any(g.any() for g in grads)
    assert not grads[0][:, 3:].any()
    assert not grads[1][:, 5:].any()
    for g in grads[2:]:
        assert not g[:, 3:].any()
        assert not g[..., 5:].any()


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_to_predict_costs_nothing(kind: type[LatentAlignment]) -> None:
    query, memory, target, prior, _, posterior = batch(2, 0, 3)
    value = kind()(query.requires_grad_(), memory.requires_grad_(), target, prior, readout, posterior)
    value.backward()
    assert value.item() == 0
    given = batch(1, 2, 3)
    assert kind()(*given, steps=torch.zeros(1, 2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("kind", EVERY)
def test_half_precision(kind: type[LatentAlignment]) -> None:
    given = batch()
    half = [x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    value = kind()(*half)
    assert value.dtype == torch.float32
    if kind in EVERY[:3]:
        assert value.item() == pytest.approx(kind()(*given).item(), rel=1e-2)
    assert value.isfinite()


def test_inference_network_sees_what_comes() -> None:
    network = InferenceNetwork(3, 4, hidden=5).double()
    source, target = normal(1, 6, 3), normal(1, 4, 4).requires_grad_()
    scores = network(source, target)
    assert scores.shape == (1, 4, 6)
    for t in range(4):
        (grad,) = torch.autograd.grad(scores[0, t].sum(), target, retain_graph=True)
        assert (grad[0].abs().sum(-1) > 0).all(), "past, present and future are all seen"
    left, right = network.source(source)[0][0], network.target(target)[0][0]
    for t in range(4):
        for s in range(6):
            want = right[t] @ network.compare.weight.T @ left[s]
            torch.testing.assert_close(scores[0, t, s], want, atol=1e-12, rtol=1e-12)


def test_inference_network_leaves_padding_out() -> None:
    network = InferenceNetwork(3, 4, hidden=5).double()
    source, target = normal(2, 6, 3), normal(2, 4, 4)
    mask, steps = (torch.arange(n).expand(2, -1) < torch.tensor(k)[:, None] for n, k in ((6, [6, 2]), (4, [4, 3])))
    scores = network(source, target, mask=mask, steps=steps)
    torch.testing.assert_close(scores[:1], network(source[:1], target[:1]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(scores[1:, :3, :2], network(source[1:, :2], target[1:, :3]), atol=1e-12, rtol=1e-12)
    assert network(source, target[:, :0]).shape == (2, 0, 6)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: VariationalAttention(0), "num_samples=0"),
        (lambda: HardAlignment(0), "num_samples=0"),
        (lambda: GumbelAlignment(0.0), "temperature=0.0"),
        (lambda: EnumeratedAlignment(-1.0), "kl_weight=-1.0"),
        (lambda: ExactAlignment(topk=0), "topk=0"),
        (lambda: ExactAlignment(chunk=0), "chunk=0"),
        *((lambda kind=kind: kind()(*batch()[:5]), "posterior=None") for kind in EVERY if kind.inferred),
        (lambda: SoftAlignment()(*batch(), mask=torch.tensor([[True] * 5, [False] * 5])), "without a place"),
        (lambda: SoftAlignment()(*batch(s=0)), "without a place"),
        (lambda: SoftAlignment()(*batch(), mask=torch.ones(2, 4, dtype=torch.bool)), r"mask must be \(2, 5\)"),
        (lambda: SoftAlignment()(*batch()[:3], normal(2, 3, 4), readout), r"prior must be \(2, 3, 5\)"),
        (lambda: VariationalAttention()(*batch()[:5], normal(2, 2, 5)), r"posterior must be \(2, 3, 5\)"),
        (
            lambda: InferenceNetwork(3, 4, 5)(
                torch.randn(1, 3, 3), torch.randn(1, 2, 4), mask=torch.tensor([[True, False, True]])
            ),
            "mask must be True from the left",
        ),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()


def test_all_are_here() -> None:
    made = {x for x in vars(losses).values() if isinstance(x, type) and x.__module__ == losses.__name__}
    assert {x for x in made if "tokens" in vars(x)} == set(EVERY)
