"""Sensory and relational heads: against messages pair by pair, against the authors' package, and what may pass to whom."""

import pytest
import torch
from torch import Tensor, nn

from regard.layers.sequence.dual_attention_transformer import (
    DualAttention,
    PositionalSymbols,
    SplitLinear,
    SymbolicAttention,
    naive,
)
from regard.nn import Attention, Rotary
from regard.ops.attend import attend

exact = {"rtol": 0, "atol": 1e-12}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(dim: int = 12, num_heads: int = 4, **options) -> DualAttention:
    layer = DualAttention(dim, num_heads, **{"num_symbols": 5, **options}).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize("m", [0, 1, 3, 4])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"symmetric": True, "num_relations": 1}, {"bias": True}], ids=str
)
def test_equals_messages_pair_by_pair(m: int, options: dict) -> None:
    layer = build(num_relational=m, **options)
    for b, n in ((1, 1), (2, 7)):
        x = normal(b, n, 12).requires_grad_()
        mask = torch.rand(b, 4, n, n) > 0.3
        mask[0, :, 0] = False
        context = None if layer.causal else normal(b, 5, 12)
        for given in ({}, {"mask": mask}, {"mask": mask[:, :1]}, {"context": context}):
            fast, slow = layer(x, **given), naive(layer, x, **given)
            torch.testing.assert_close(fast, slow, **exact)
            leaves, pull = [x, *layer.parameters()], torch.randn_like(fast)
            grads = [torch.autograd.grad((y * pull).sum(), leaves, materialize_grads=True) for y in (fast, slow)]
            for got, expected in zip(*grads):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_relations", [1, 2, 3, 6])
def test_order_of_sums(num_relations: int) -> None:
    """Weights times relations in the open, then the map of the relations: what the fast path avoids."""
    layer = build(num_relational=2, num_relations=num_relations)
    x = normal(2, 7, 12)
    q, k, v = layer.project(x, x)
    weights = layer.normalize(layer.scores(q, k), None)
    read = torch.einsum("bhij,brij->bhir", weights[:, 2:], layer.relations(q, k))
    expected = weights @ v
    expected[:, 2:] += torch.einsum("bhir,hdr->bhid", read, layer.w_r)
    torch.testing.assert_close(layer.attend(q, k, v, None), expected, **exact)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"num_relations": 8}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_authors_package(options: dict, causal: bool) -> None:
    package = pytest.importorskip("dual_attention.dual_attention")
    layer = build(24, 6, num_relational=4, causal=causal, **options)
    theirs = package.DualAttention(
        24,
        2,
        4,
        0.0,
        ra_kwargs={"n_relations": layer.num_relations, "symmetric_rels": layer.symmetric},
    ).double()
    sensory, relational = theirs.self_attention, theirs.relational_attention
    with torch.no_grad():
        for bias in (part.bias for part in layer.out.parts):
            bias.zero_()
        for name in ("q", "k"):
            first, second = getattr(layer, name).weight.split([8, 16])
            getattr(sensory, f"w{name}").weight.copy_(first)
            getattr(relational, f"w{name}_attn").weight.copy_(second)
        for linear, weight in (
            (sensory.wv, layer.v.weight),
            (sensory.wo, layer.out.parts[0].weight),
            (relational.wv, layer.v_symbol.weight),
            (relational.wo, layer.out.parts[1].weight),
            (relational.wq_rel, layer.q_rel.weight),
            (relational.wk_rel, (layer.k_rel or layer.q_rel).weight),
        ):
            linear.weight.copy_(weight)
        relational.wr.copy_(layer.w_r)
    x = normal(2, 9, 24)
    symbols = layer.symbols(x)
    torch.testing.assert_close(layer(x), theirs(x, symbols, is_causal=causal)[0], **exact)
    retriever = pytest.importorskip("dual_attention.symbol_retrieval").SymbolicAttention(24, 3, 5).double()
    ours = SymbolicAttention(24, 3, 5).double()
    ours.q.load_state_dict(retriever.q_proj.state_dict())
    with torch.no_grad():
        ours.templates.copy_(retriever.template_features)
        ours.library.copy_(retriever.symbol_library)
    torch.testing.assert_close(ours(x), retriever(x), **exact)


def test_sensory_heads_alone_are_attention() -> None:
    layer, plain = build(num_relational=0, bias=True), Attention(12, 4).double()
    for name in ("q", "k", "v"):
        getattr(plain, name).load_state_dict(getattr(layer, name).state_dict())
    plain.out.load_state_dict(layer.out.parts[0].state_dict())
    x, context = normal(2, 7, 12), normal(2, 5, 12)
    torch.testing.assert_close(layer(x, context), plain(x, context), **exact)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())


def test_relational_heads_alone_need_no_values() -> None:
    layer = build(num_relational=4)
    assert layer.v is None
    assert len(layer.out.parts) == 1
    assert layer(normal(2, 5, 12)).shape == (2, 5, 12)


def test_without_relations_and_with_one_symbol_all_tokens_get_the_same() -> None:
    layer = build(num_relational=4)
    nn.init.zeros_(layer.q_rel.weight)
    symbols = normal(1, 1, 12).expand(2, 7, -1)
    out = layer(normal(2, 7, 12), symbols=symbols)
    torch.testing.assert_close(out, out[:1, :1].expand(2, 7, -1), **exact)


def test_symmetric_relations() -> None:
    x = normal(2, 7, 12)
    for symmetric in (False, True):
        layer = build(symmetric=symmetric, num_relations=3)
        q, k, _ = layer.project(x, x)
        relations = layer.relations(q, k)
        assert relations.shape == (2, 3, 7, 7)
        assert torch.allclose(relations, relations.mT) == symmetric


def test_relational_heads_never_see_what_the_sender_is() -> None:
    """A change of a token that no choice and no relation reads moves sensory heads and leaves relational ones."""
    layer = build(16, 4, num_relational=2, head_dim=3)
    x = normal(1, 6, 16)
    reads = torch.cat([layer.k.weight[6:], layer.k_rel.weight])
    hidden = torch.linalg.svd(reads)[2][-1]
    torch.testing.assert_close(reads @ hidden, torch.zeros(12).double(), **exact)
    changed = x.clone()
    changed[:, 2] += hidden
    symbols = normal(1, 6, 16)
    q, k, v = layer.project(x, x, symbols=symbols)
    _, k2, v2 = layer.project(changed, changed, symbols=symbols)
    before, after = layer.attend(q, k, v, None), layer.attend(q, k2, v2, None)
    torch.testing.assert_close(after[:, 2:], before[:, 2:], **exact)
    assert not torch.allclose(after[:, :2], before[:, :2], atol=1e-3)


def test_relations_are_shared_by_heads() -> None:
    """One head's map set to a single relation reads that relation, whichever head it is."""
    layer = build(num_relational=2)
    with torch.no_grad():
        layer.w_r.zero_()
        layer.w_r[0, 0, 1] = 1.0
        layer.v_symbol.weight.zero_()
    x = normal(1, 5, 12)
    q, k, v = layer.project(x, x)
    weights, relations = layer.normalize(layer.scores(q, k), None), layer.relations(q, k)
    expected = (weights[:, 2] * relations[:, 1]).sum(-1)
    torch.testing.assert_close(layer.attend(q, k, v, None)[:, 2, :, 0], expected, **exact)


def test_order_of_tokens_matters_only_with_symbols_of_positions() -> None:
    layer, order = build(), torch.tensor([3, 1, 4, 0, 2])
    x, positional = normal(2, 5, 12), PositionalSymbols(12, 8).double()
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], **exact)
    moved = layer(x[:, order], symbols=positional(x))
    assert not torch.allclose(moved, layer(x, symbols=positional(x))[:, order])
    torch.testing.assert_close(positional(x[:, :2], start=3), positional(x)[:, 3:], **exact)
    with pytest.raises(ValueError, match="max_length=8"):
        positional(x, start=4)


def test_symbols_are_chosen_token_by_token() -> None:
    retriever = SymbolicAttention(12, 3, 5).double()
    x = normal(2, 7, 12)
    expected = torch.empty_like(x)
    for own in torch.arange(12).split(4):
        scores = retriever.q(x)[..., own] @ retriever.templates[:, own].T / 2
        expected[..., own] = scores.softmax(-1) @ retriever.library[:, own]
    torch.testing.assert_close(retriever(x), expected, **exact)
    torch.testing.assert_close(retriever(x[:1, 3:4]), retriever(x)[:1, 3:4], **exact)


@pytest.mark.parametrize("m", [0, 1, 3, 4])
@pytest.mark.parametrize("own", [True, False])
def test_decoding_equals_the_whole(m: int, own: bool) -> None:
    layer = build(num_relational=m, causal=True)
    x, symbols = normal(2, 7, 12), None if own else normal(2, 7, 12)
    mask = torch.tensor([[False, False] + [True] * 5, [True] * 7])
    cache, got, end = layer.new_cache(2, 7, dtype=torch.float64), [], 0
    for part in x.split([3, 1, 1, 2], 1):
        start, end = end, end + part.shape[1]
        given = None if symbols is None else symbols[:, start:end]
        got.append(layer(part, symbols=given, cache=cache, mask=mask[:, :end]))
    torch.testing.assert_close(torch.cat(got, 1), layer(x, symbols=symbols, mask=mask), **exact)


def test_rotary_turns_choices_and_not_relations() -> None:
    layer = build(16, 4)
    layer.rotary = Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64))
    x = normal(2, 5, 16)
    q, k, v = layer.project(x, x)
    turned = [torch.cat([layer.rotary(m[..., :4].contiguous()), m[..., 4:]], -1) for m in (q, k)]
    torch.testing.assert_close(layer(x), layer.merge(layer.attend(*turned, v, None)), **exact)
    sensory = attend(turned[0][:, :2, :, :4], turned[1][:, :2, :, :4], v[:, :2])
    torch.testing.assert_close(layer.attend(*turned, v, None)[:, :2], sensory, **exact)
    torch.testing.assert_close(layer.relations(*turned), layer.relations(q, k), **exact)


def test_nothing_to_look_at() -> None:
    layer = build()
    x = normal(2, 3, 12).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    bias = torch.cat([part.bias for part in layer.out.parts])
    torch.testing.assert_close(out[1], bias.expand(3, -1), **exact)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


def test_dropout_takes_relations_and_symbols_along() -> None:
    """One token looks at itself: its weight is dropped or doubled, with all that it brings."""
    layer = build(num_relational=4, dropout=0.5)
    x = normal(400, 1, 12)
    q, k, v = layer.project(x, x)
    whole = layer.eval().attend(q, k, v, None)
    kept = layer.train().attend(q, k, v, None) / whole
    torch.testing.assert_close(kept, kept[..., :1].expand_as(kept), rtol=0, atol=1e-9)
    assert set(kept.round(decimals=6).unique().tolist()) == {0.0, 2.0}


def test_two_kinds_of_heads_do_not_meet_in_the_output() -> None:
    linear = SplitLinear(12, 5).double()
    x = normal(1, 12)
    assert [p.weight.shape for p in linear.parts] == [(5, 5), (7, 7)]
    changed = torch.cat([x[:, :5], normal(1, 7)], 1)
    torch.testing.assert_close(linear(changed)[:, :5], linear(x)[:, :5], **exact)


def test_where_it_starts() -> None:
    layer = DualAttention(64, 8)
    assert layer.num_relational == 4
    assert layer.w_r.abs().max() <= 1 / (layer.head_dim * 4) ** 0.5
    torch.testing.assert_close(layer.symbols.library.std().item(), 1.0, rtol=0.1, atol=0)
    assert layer.q.bias is None


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dim=12"):
        DualAttention(12, 5)
    with pytest.raises(ValueError, match="num_relational=5"):
        DualAttention(12, 4, num_relational=5)
    with pytest.raises(ValueError, match="num_heads=0"):
        DualAttention(12, 0)
    with pytest.raises(ValueError, match="num_relations=4"):
        DualAttention(12, 4, num_relational=2, num_relations=4)
    with pytest.raises(ValueError, match="symmetric"):
        DualAttention(12, 4, symmetric=True, context_dim=8)
    with pytest.raises(ValueError, match="num_symbols=0"):
        DualAttention(12, 4, num_symbols=0)
    x = normal(2, 3, 12)
    with pytest.raises(ValueError, match="num_symbols=None"):
        build(num_symbols=None)(x)
    for wrong in (normal(2, 3, 3, 12), normal(2, 4, 12)):
        with pytest.raises(ValueError, match=r"symbols must be \(2, 3, 12\)"):
            build()(x, symbols=wrong)
    with pytest.raises(ValueError, match="causal"):
        build(causal=True)(x, x)
