"""Head masks on every kind of host, importance against finite differences, and what a silenced head means."""

import copy
from functools import partial

import pytest
import timm
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regard
from regard.nn.attention import Attention
from regard.objectives.headmask import ImportantHeadMask, RandomHeadMask, gini, head_importance, silenced


class Two(nn.Module):
    """Self-attention with grouped keys, and cross-attention; different head counts."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.reader = Attention(12, 6, 2, dropout=dropout), Attention(12, 3, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.inner(x)
        return x + self.reader(x, context)


SITES = {"inner": 6, "reader": 3}


def made(dropout: float = 0.0):
    model = Two(dropout).double()
    x, context = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 4, 12, dtype=torch.float64)
    weights = torch.randn(3, 5, 12, dtype=torch.float64)
    return model, lambda: ((model(x, context) * weights).sum((1, 2)).tanh()).mean(), (x, context)


def test_importance_is_the_gradient_of_a_gate() -> None:
    model, loss, _ = made()
    importance = head_importance(model, loss, sites=SITES)
    assert {site: len(values) for site, values in importance.items()} == SITES
    step = 1e-5
    for site, count in SITES.items():
        for head in range(count):
            slopes = []
            for row in range(3):
                values = []
                for sign in (1, -1):
                    gate = torch.ones(3, count, dtype=torch.float64)
                    gate[row, head] += sign * step
                    with regard.edit(model, regard.Edit.heads(gate), where=site):
                        values.append(loss().item())
                slopes.append(abs(values[0] - values[1]) / (2 * step))
            assert importance[site][head].item() == pytest.approx(sum(slopes), rel=1e-6, abs=1e-9)


def test_importance_is_output_times_its_gradient() -> None:
    model, loss, _ = made()
    importance = head_importance(model, loss, sites=SITES)
    with regard.capture(model, list(SITES), grad=True) as cap:
        loss().backward()
    for site in SITES:
        call = cap[site]
        by_hand = (call.out * call.out_grad).sum((2, 3)).abs().sum(0)
        torch.testing.assert_close(importance[site], by_hand, atol=1e-10, rtol=1e-10)


def test_importance_leaves_gradients_and_model_alone() -> None:
    model, loss, _ = made()
    loss().backward()
    before = [p.grad.clone() for p in model.parameters()]
    value = loss()
    head_importance(model, loss, sites=SITES)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert torch.equal(loss(), value)
    with torch.no_grad():
        assert head_importance(model, loss, sites=SITES).keys() == SITES.keys()


def test_a_silenced_head_is_a_deleted_one() -> None:
    model, loss, given = made()
    with silenced(model, [("inner", 1), ("inner", 4), ("reader", 0)]):
        out = model(*given)
        loss().backward()
    cut = copy.deepcopy(model)
    for site, heads in (("inner", (1, 4)), ("reader", (0,))):
        layer = getattr(cut, site)
        for head in heads:
            layer.out.weight.data[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0
    torch.testing.assert_close(out, cut(*given), atol=1e-14, rtol=1e-12)
    assert not torch.allclose(out, model(*given))
    d = model.inner.head_dim
    rows = model.inner.q.weight.grad.split(d)
    assert [bool(r.any()) for r in rows] == [True, False, True, True, False, True]
    first = model.reader
    for projection in (first.q, first.k, first.v):
        assert not projection.weight.grad[: first.head_dim].any()
        assert projection.weight.grad[first.head_dim :].any()


def test_all_heads_of_a_site_silenced_leaves_the_bias() -> None:
    model, _, (x, context) = made()
    with silenced(model, [("reader", h) for h in range(3)]):
        torch.testing.assert_close(model(x, context), x + model.inner(x) + model.reader.out.bias)


def test_exactly_n_heads_are_silenced_and_each_as_often() -> None:
    mask = RandomHeadMask(SITES, n=2)
    model, loss, _ = made()
    counts = dict.fromkeys(mask.all_heads(), 0)
    for _ in range(1000):
        chosen = mask.choose(model, loss, ())
        assert len(set(chosen)) == 2
        for head in chosen:
            counts[head] += 1
    assert chisquare(list(counts.values())).pvalue > 0.01
    with mask.step(model, loss) as value:
        value.backward()
    silent = 0
    for layer in (model.inner, model.reader):
        silent += sum(not rows.any() for rows in layer.q.weight.grad.split(layer.head_dim))
    assert silent == 2


def test_a_generator_decides() -> None:
    draws = []
    for _ in range(2):
        mask = RandomHeadMask(SITES, 3, generator=torch.Generator().manual_seed(5))
        draws.append([mask.choose(*made()[:2], ()) for _ in range(4)])
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws[0]}) > 1


def test_the_most_important_are_silenced() -> None:
    model, loss, _ = made()
    importance = head_importance(model, loss, sites=SITES)
    ranked = sorted(((importance[s][h].item(), (s, h)) for s, n in SITES.items() for h in range(n)), reverse=True)
    mask = ImportantHeadMask(SITES, n=3)
    assert set(mask.choose(model, loss, ())) == {head for _, head in ranked[:3]}
    with silenced(model, [head for _, head in ranked[:3]]):
        want = loss()
    assert torch.equal(mask(model, loss), want)


def test_both_passes_see_the_same_dropout() -> None:
    model, loss, _ = made(dropout=0.5)
    mask = ImportantHeadMask(SITES, n=1)
    torch.manual_seed(1)
    got = mask(model, loss)
    after = torch.rand(1)
    torch.manual_seed(1)
    chosen = max(
        (
            (v.item(), (site, h))
            for site, vs in head_importance(model, loss, sites=SITES).items()
            for h, v in enumerate(vs)
        )
    )[1]
    torch.manual_seed(1)
    with silenced(model, [chosen]):
        assert torch.equal(loss(), got)
    assert torch.equal(torch.rand(1), after)


def test_no_heads_and_no_training_change_nothing() -> None:
    model, loss, _ = made()
    for kind in (RandomHeadMask, ImportantHeadMask):
        assert torch.equal(kind(SITES, 0)(model, loss), loss())
        with pytest.raises(ValueError, match="model is in eval"):
            kind(SITES, 1)(model.eval(), loss)
        model.train()
    value = loss()
    RandomHeadMask(SITES, 4)(model, loss)
    assert torch.equal(loss(), value), "something was left behind"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_meets_the_same_mask(reentrant: bool) -> None:
    model, _, (x, context) = made()
    x.requires_grad_()
    run = partial(checkpoint, model, x, context, use_reentrant=reentrant)
    found = []
    for forward in (run, partial(model, x, context)):
        model.zero_grad()
        mask = RandomHeadMask(SITES, 4, generator=torch.Generator().manual_seed(2))
        with mask.step(model, lambda forward=forward: forward().square().mean()) as value:
            value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert sum(not rows.any() for rows in model.inner.q.weight.grad.split(2)) > 0


def torch_encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 16)


def timm_vit() -> tuple[nn.Module, Tensor]:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes), torch.randn(2, 3, 32, 32)


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config), torch.randint(20, (2, 6))


@pytest.mark.parametrize("host", [torch_encoder, timm_vit, llama])
def test_any_host(host) -> None:
    model, x = host()
    sites = {s.name: s.heads for s in regard.sites(model, x).verified}
    assert len(sites) == 2

    def loss(x: Tensor) -> Tensor:
        out = model(x)
        return getattr(out, "logits", out).float().square().mean()

    model.train()
    mask = RandomHeadMask(sites, n=2, generator=torch.Generator().manual_seed(0))
    chosen = RandomHeadMask(sites, n=2, generator=torch.Generator().manual_seed(0)).choose(model, loss, (x,))
    with mask.step(model, loss, x) as value:
        value.backward()
    cut = copy.deepcopy(model)
    for site, head in chosen:
        module = cut.get_submodule(site)
        projection = next(getattr(module, n) for n in ("out_proj", "proj", "o_proj") if hasattr(module, n))
        width = projection.in_features // sites[site]
        projection.weight.data[:, head * width : (head + 1) * width] = 0
    plain, model_value = model, loss(x)
    model = cut
    torch.testing.assert_close(value, loss(x), atol=1e-6, rtol=1e-5)
    assert abs(model_value - value) > 1e-7
    model = plain
    importance = head_importance(model, loss, x, sites=sites)
    assert all((v > 0).all() for v in importance.values())
    assert 0 < gini(importance) < 1


def test_gini() -> None:
    assert gini({"a": torch.ones(3), "b": torch.ones(2)}) == pytest.approx(0.0)
    assert gini({"a": torch.tensor([0.0, 0, 0, 5])}) == pytest.approx(0.75)
    assert gini({"a": torch.tensor([1.0, 3.0])}) == pytest.approx(0.25)
    for bad in (torch.zeros(3), torch.tensor([-1.0, 2.0])):
        with pytest.raises(ValueError, match="importance"):
            gini({"a": bad})


@pytest.mark.parametrize("kind", [RandomHeadMask, ImportantHeadMask])
@pytest.mark.parametrize(
    ("sites", "n", "word"),
    [
        ({}, 0, "at least one site"),
        ({"a": 0}, 0, "positive number"),
        ({"a": 4}, -1, "n=-1"),
        ({"a": 2, "b": 2}, 4, "n=4"),
    ],
)
def test_refuses_bad_arguments(kind, sites: dict, n: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kind(sites, n)


def test_refuses_what_is_not_there() -> None:
    model, loss, _ = made()
    for heads, word in (
        ([("nowhere", 0)], "no module of Two"),
        ([("reader", 3)], "it has 3"),
        ([("inner.out", 0)], "no attention ran"),
    ):
        with pytest.raises(ValueError, match=word), silenced(model, heads):
            loss()
    with pytest.raises(ValueError, match="no attention ran"):
        head_importance(model, loss, sites=["inner.out"])


def test_a_site_named_like_a_kind_is_that_site_alone() -> None:
    model = nn.Sequential()
    model.add_module("first", Attention(8, 2))
    model.add_module("self", Attention(8, 2))
    x = torch.randn(1, 3, 8)
    loss = lambda: model(x).square().mean()  # noqa: E731
    assert head_importance(model, loss, sites=["self"]).keys() == {"self"}
    with silenced(model, [("self", 1)]):
        loss().backward()
    assert all(rows.any() for rows in model[0].v.weight.grad.split(4))
    assert [bool(rows.any()) for rows in model[1].v.weight.grad.split(4)] == [True, False]
