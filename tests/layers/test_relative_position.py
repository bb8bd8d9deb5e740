"""Relative positions in scores against loops over pairs, and what each of the five forms can and cannot tell."""

import pytest
import torch
from torch import Tensor

from regard import create
from regard.bench.cost import flops, parameters, peak_memory
from regard.layers.sequence import relative_position
from regard.layers.sequence.relative_position import (
    RelativeAttention,
    RelativeM1,
    RelativeM2,
    RelativeM3,
    RelativeM4,
    RelativeShaw,
    from_transformers,
    naive,
)
from regard.nn import Attention

FORMS = [RelativeM1, RelativeM2, RelativeM3, RelativeM4, RelativeShaw]
every = pytest.mark.parametrize("form", FORMS)
PARTS = ("weight", "bias")


def build(form: type[RelativeAttention], dtype: torch.dtype = torch.float64, **options) -> RelativeAttention:
    """A layer whose table is far from where it starts."""
    layer = form(**{"dim": 12, "num_heads": 3, "max_distance": 4, **options}).to(dtype)
    torch.nn.init.normal_(layer.table)
    return layer


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scores_of(layer: Attention, x: Tensor) -> Tensor:
    return layer.scores(*layer.project(x, x)[:2])


@every
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_kv_heads": 1, "head_dim": 5}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_loops(form: type, options: dict, batch: int) -> None:
    layer = build(form, **options)
    x = normal(batch, 7, 12).requires_grad_()
    mask = torch.rand(batch, 7, 7) > 0.3
    mask[0, 2] = False
    for given in (None, mask):
        out, expected = layer(x, mask=given), naive(layer, x, mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "table", "expected"),
    [
        # Tokens 0 and 1 with q = (1, 2), (3, 4) and k = (5, 6), (7, 8); rows of the table are distances -1, 0, 1.
        (RelativeM1, [[2.0], [10.0]], [[2 * 17, 10 * 23], [10 * 39, 2 * 53]]),
        (RelativeM2, [[10.0], [2.0], [100.0]], [[2 * 17, 100 * 23], [10 * 39, 2 * 53]]),
        (RelativeM3, [[1.0, 10.0], [1.0, 0.0], [0.0, 1.0]], [[5, 16], [15 + 240, 21]]),
        (RelativeM4, [[1.0, 10.0], [0.0, 0.0], [1.0, 0.0]], [[17, 23 + 1 + 7], [39 + 43 + 65, 53]]),
        (RelativeShaw, [[1.0, 10.0], [0.0, 0.0], [1.0, 0.0]], [[17, 23 + 1], [39 + 43, 53]]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_scores_by_hand(form: type, table: list, expected: list) -> None:
    layer = build(form, dim=2, num_heads=1, max_distance=2)
    layer.table.data = torch.tensor(table, dtype=torch.float64)
    q, k = (torch.tensor(y, dtype=torch.float64)[None, None] for y in ([[1, 2], [3, 4]], [[5, 6], [7, 8]]))
    at = torch.arange(2)
    scores = layer.scores(layer.place(q, at), layer.place(k, at))
    by_hand = torch.tensor(expected, dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(scores[0, 0], by_hand, rtol=0, atol=1e-12)


@every
def test_products_with_the_table_equal_an_embedding_for_every_pair(form: type) -> None:
    layer = build(form)
    x = normal(2, 9, 12)
    q, k = (y[..., :4] for y in layer.project(x, x)[:2])
    apart = (torch.arange(9) - torch.arange(9)[:, None]).clamp(-3, 3)
    a, plain = layer.table[apart.abs() if form is RelativeM1 else apart + 3], torch.einsum("bhid,bhjd->bhij", q, k)
    expected = {
        RelativeM1: lambda: plain * a.permute(2, 0, 1),
        RelativeM2: lambda: plain * a.permute(2, 0, 1),
        RelativeM3: lambda: torch.einsum("bhid,bhjd,ijd->bhij", q, k, a),
        RelativeM4: lambda: plain + torch.einsum("bhid,ijd->bhij", q, a) + torch.einsum("bhjd,ijd->bhij", k, a),
        RelativeShaw: lambda: plain + torch.einsum("bhid,ijd->bhij", q, a),
    }[form]()
    torch.testing.assert_close(scores_of(layer, x), expected / 2, rtol=0, atol=1e-10)


def test_channelwise_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(RelativeM3, num_kv_heads=1)
    x, found = normal(2, 7, 12), []
    for products in (1 << 22, 2 * 3 * 7 * 4 * 3, 1):
        monkeypatch.setattr(relative_position, "PRODUCTS", products)
        out = layer(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))))
    for part in found[1:]:
        for ours, whole in zip(part, found[0]):
            torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@every
def test_only_differences_of_positions_matter(form: type) -> None:
    layer = build(form)
    x = normal(2, 7, 12)
    for offset in (0, 90, 255, 70_000, -300):
        moved = layer(x, positions=torch.arange(offset, offset + 7).expand(2, -1))
        torch.testing.assert_close(moved, layer(x), rtol=0, atol=1e-12)
    scattered = layer(x, positions=torch.tensor([[0, 2, 3, 4, 6, 7, 9]] * 2))
    assert (scattered - layer(x)).abs().max() > 1e-3


def test_absolute_embeddings_are_not_shift_invariant() -> None:
    layer, x, embedding = Attention(12, 3).double(), normal(1, 7, 12), normal(20, 12)
    assert (layer(x + embedding[:7]) - layer(x + embedding[9:16])).abs().max() > 1e-3


@every
def test_where_tables_start_and_what_leaves_plain_attention(form: type) -> None:
    torch.manual_seed(1)
    layer, plain = form(12, 3, max_distance=400).double(), Attention(12, 3).double()
    if form in (RelativeM4, RelativeShaw):
        torch.testing.assert_close(layer.table.std().item(), 0.02, rtol=0.1, atol=0)
        layer.table.data.zero_()
    else:
        assert (layer.table == 1).all()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "table"})
    x = normal(2, 7, 12)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)


@every
def test_only_m1_is_blind_to_direction(form: type) -> None:
    layer = build(form)
    x = normal(1, 7, 12)
    gap = (layer(x.flip(1)).flip(1) - layer(x)).abs().max()
    assert gap < 1e-12 if form is RelativeM1 else gap > 1e-3


@every
def test_distances_are_clipped(form: type) -> None:
    """All pairs at least m - 1 apart share an entry, the ends of a table: sequences may be of any length."""
    layer, wide = build(form, max_distance=3), build(form, max_distance=20)
    middle = torch.arange(20 if form is RelativeM1 else 39) - (0 if form is RelativeM1 else 19)
    wide.load_state_dict(
        layer.state_dict() | {"table": layer.table[middle.clamp(-2, 2) + (0 if form is RelativeM1 else 2)]}
    )
    x = normal(2, 15, 12)
    torch.testing.assert_close(layer(x), wide(x), rtol=0, atol=1e-12)
    wide.table.data[-6] += 1.0  # distance 14, the longest here
    assert (layer(x) - wide(x)).abs().max() > 1e-4


def test_the_key_term_of_m4_reads_the_key_of_the_pair() -> None:
    """With queries at zero a row of scores is k_j . a_ij; were the pair transposed it would be k_i . a_ji."""
    layer = build(RelativeM4, num_heads=1, head_dim=4)
    for p in layer.q.parameters():
        p.data.zero_()
    x = normal(1, 5, 12)
    k = layer.k(x)[0]
    for i in range(5):
        for j in range(5):
            a = layer.table[max(-3, min(3, j - i)) + 3]
            assert scores_of(layer, x)[0, 0, i, j].item() == pytest.approx((k[j] @ a / 2).item(), abs=1e-12)


def test_m4_holds_what_absolute_embeddings_say_but_for_positions_alone() -> None:
    """Of four terms of (x_i + p_i)(x_j + p_j) a table of p_j - p_i = a_ij gives the mixed ones, when p is linear in place."""
    layer, step = build(RelativeM4, num_heads=1, head_dim=4, max_distance=9), normal(4)
    layer.table.data = torch.arange(-8, 9)[:, None] * step
    x = normal(1, 9, 12)
    q, k, p = layer.q(x)[0], layer.k(x)[0], torch.arange(9.0, dtype=torch.float64)[:, None] * step
    a = p[None] - p[:, None]
    mixed = torch.einsum("id,ijd->ij", q, a) + torch.einsum("jd,ijd->ij", k, a)
    torch.testing.assert_close(scores_of(layer, x)[0, 0], (q @ k.T + mixed) / 2, rtol=0, atol=1e-10)


@every
def test_the_table_is_added_before_the_scale(form: type) -> None:
    layer = build(form)
    x, scores = normal(1, 5, 12), []
    for scale in (1.0, 0.25):
        layer.scale = scale
        scores.append(scores_of(layer, x))
    torch.testing.assert_close(scores[1], scores[0] / 4, rtol=0, atol=1e-12)


def test_zero_gains_erase_content() -> None:
    """What weight decay would lead to: without gains every key weighs the same."""
    layer = build(RelativeM2)
    layer.table.data.zero_()
    x = normal(1, 5, 12)
    v = layer.project(x, x)[2].mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(layer(x), layer.merge(v), rtol=0, atol=1e-12)


@every
def test_decoding_equals_the_whole(form: type) -> None:
    layer = build(form, causal=True, num_kv_heads=1)
    x = normal(2, 11, 12)
    for chunks in ([1] * 11, [4, 1, 1, 5]):
        cache = layer.new_cache(2, 11, dtype=torch.float64)
        got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-12)


@every
def test_keys_keep_their_place_when_others_are_forgotten(form: type) -> None:
    layer = build(form, causal=True)
    x, kept = normal(1, 8, 12), torch.tensor([0, 2, 5, 6])
    cache = layer.new_cache(1, 8, dtype=torch.float64)
    layer(x[:, :7], cache=cache)
    cache.keep(kept.expand(1, 3, -1))
    mask = torch.isin(torch.arange(8), torch.cat((kept, torch.tensor([7]))))[None]
    torch.testing.assert_close(layer(x[:, 7:], cache=cache), layer(x, mask=mask)[:, 7:], rtol=0, atol=1e-12)


@every
def test_padding_on_the_left(form: type) -> None:
    layer = build(form, causal=True)
    x = normal(1, 5, 12)
    padded, mask = torch.cat((normal(1, 3, 12), x), 1), torch.arange(8)[None] >= 3
    torch.testing.assert_close(layer(padded, mask=mask)[:, 3:], layer(x), rtol=0, atol=1e-12)
    positions, cache, steps = (torch.arange(8)[None] - 3).clamp(min=0), layer.new_cache(1, 8, dtype=torch.float64), []
    for part, at in zip(padded.split(2, 1), positions.split(2, 1)):
        end = cache.position + 2
        steps.append(layer(part, mask=mask[:, :end], positions=at, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], layer(x), rtol=0, atol=1e-12)


@every
def test_cross_attention_with_given_positions(form: type) -> None:
    """Queries taken out of a sequence look at all of it as they do within."""
    layer = build(form)
    x, rows = normal(2, 7, 12), torch.tensor([4, 1])
    at, everywhere = rows.expand(2, -1), torch.arange(7).expand(2, -1)
    out = layer(x[:, rows], x, positions=at, context_positions=everywhere)
    torch.testing.assert_close(out, layer(x)[:, rows], rtol=0, atol=1e-12)


@every
def test_nothing_to_look_at_and_one_token(form: type) -> None:
    layer = build(form)
    x = normal(2, 3, 12).requires_grad_()
    out = layer(x, mask=torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(out[1], layer.out.bias.expand(3, -1), rtol=0, atol=0)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
    one = x[:, :1].detach()
    torch.testing.assert_close(layer(one), layer.out(layer.v(one)), rtol=0, atol=1e-12)
    smallest = build(form, max_distance=1)
    assert smallest(x).isfinite().all()


@every
def test_half_precision_far_out(form: type) -> None:
    """Positions up to 65,535 are exact in bfloat16, in which 257 alone is not."""
    exact, half = build(form, causal=True), build(form, torch.bfloat16, causal=True)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x, far = torch.randn(1, 5, 12, dtype=torch.bfloat16), torch.arange(65_531, 65_536)[None]
    out = half(x, positions=far)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(x.double(), positions=far), rtol=0, atol=0.05)
    assert torch.equal(half(x), out)
    with pytest.raises(ValueError, match="position 65536 is not exact"):
        half(x, positions=far + 1)


def test_parameters_of_the_papers_model() -> None:
    """BERT-base: 12 layers of width 768 with 12 heads of 64, 512 positions."""
    plain = parameters(Attention(768, 12))
    added = {form: parameters(form(768, 12)) - plain for form in FORMS}
    assert added[RelativeM1] == 512 * 12
    assert added[RelativeM2] == 1023 * 12
    assert added[RelativeM3] == added[RelativeM4] == added[RelativeShaw] == 1023 * 64
    assert 12 * added[RelativeM4] == 785_664


def test_m4_costs_products_with_the_table_and_no_vector_per_pair() -> None:
    layer, plain = RelativeM4(64, 4, max_distance=32), Attention(64, 4)
    x = torch.randn(1, 256, 64)
    assert flops(layer, x).total - flops(plain, x).total == 2 * 2 * 256 * 63 * 64

    def pairs() -> Tensor:
        q, k = (y[..., :16] for y in layer.project(x, x)[:2])
        a = layer.table[(torch.arange(256) - torch.arange(256)[:, None]).clamp(-31, 31) + 31]
        return (q[:, :, :, None] * a + k[:, :, None] * a).sum(-1) + q @ k.mT

    with torch.no_grad():
        assert peak_memory(pairs) > 8 * peak_memory(lambda: layer(x))


def test_equals_wav2vec2_bert() -> None:
    """transformers' relative keys there clip, and count key minus query, as here."""
    modelling = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    config = modelling.Wav2Vec2BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=3,
        right_max_position_embeddings=3,
        attn_implementation="eager",
    )
    theirs, ours = modelling.Wav2Vec2BertSelfAttention(config).eval(), RelativeShaw(24, 3, max_distance=4)
    state = {f"{n}.{p}": getattr(getattr(theirs, f"linear_{n}"), p) for n in ("q", "k", "v", "out") for p in PARTS}
    ours.load_state_dict(state | {"table": theirs.distance_embedding.weight})
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [RelativeShaw, RelativeM4])
def test_tables_of_transformers_count_query_minus_key(form: type) -> None:
    weight = normal(13, 4)
    layer = build(form, max_distance=7)
    layer.table.data = from_transformers(weight)
    x = normal(1, 7, 12)
    q, k = (y[..., :4] for y in layer.project(x, x)[:2])
    theirs = weight[torch.arange(7)[:, None] - torch.arange(7) + 6]
    expected = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, theirs)
    if form is RelativeM4:
        expected = expected + torch.einsum("bhjd,ijd->bhij", k, theirs)
    torch.testing.assert_close(scores_of(layer, x), expected / 2, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="2 m - 1 rows; got 12"):
        from_transformers(weight[:12])


def test_names() -> None:
    assert type(create("relative-position", dim=32, num_heads=4)) is RelativeM4
    for form, name in ((RelativeM1, "m1"), (RelativeM2, "m2"), (RelativeM3, "m3"), (RelativeShaw, "shaw")):
        assert type(create(f"relative-position-{name}", dim=32, num_heads=4)) is form
        assert not form.takes_rotary


@every
def test_bad_input(form: type) -> None:
    with pytest.raises(ValueError, match="max_distance=0"):
        build(form, max_distance=0)
    with pytest.raises(ValueError, match="num_heads=3"):
        build(form, num_kv_heads=2)
    layer, x = build(form), normal(2, 3, 12)
    with pytest.raises(RuntimeError, match="table"):
        layer.load_state_dict(layer.state_dict() | {"table": layer.table[1:]})
    with pytest.raises(ValueError, match="context was given without context_positions"):
        layer(x, normal(2, 5, 12))
    with pytest.raises(ValueError, match="context was given without context_positions"):
        layer(x, normal(2, 5, 12), positions=torch.arange(3).expand(2, -1))
    with pytest.raises(ValueError, match="without a context"):
        layer(x, context_positions=torch.arange(3).expand(2, -1))
    with pytest.raises(ValueError, match=r"positions must be whole, \(2, 3\); got torch.int64, \(2, 4\)"):
        layer(x, positions=torch.arange(4).expand(2, -1))
    with pytest.raises(ValueError, match=r"positions must be whole, \(2, 3\); got torch.float32, \(2, 3\)"):
        layer(x, positions=torch.arange(3.0).expand(2, -1))
    with pytest.raises(ValueError, match="causal layer"):
        build(form, causal=True)(x, x, context_positions=torch.arange(3).expand(2, -1))
