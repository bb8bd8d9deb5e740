"""nn.MultiheadAttention in every way it can be called, and the layers of nn.Transformer built of it."""

import math

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.core.call import OpaqueSite

H, D, B, L, S = 4, 3, 2, 5, 7
C = H * D


def attention(dtype: torch.dtype = torch.float64, **more) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(C, H, batch_first=True, **more)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.eval().to(dtype)


def blocked(rows: int, columns: int) -> Tensor:
    """True where a query may not look (torch's own sense); every row keeps a key."""
    mask = torch.rand(rows, columns) < 0.4
    mask[:, 0] = False
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -math.inf)


def masks(name: str, dtype: torch.dtype) -> dict:
    padding, pairs = blocked(B, S), blocked(L, S)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "added": {"attn_mask": torch.randn(L, S, dtype=dtype)},
        "both": {"key_padding_mask": padding, "attn_mask": pairs},
        "both added": {"key_padding_mask": additive(padding, dtype), "attn_mask": torch.randn(L, S, dtype=dtype)},
        "per head": {"attn_mask": blocked(B * H * L, S).view(B * H, L, S)},
    }[name]


MASKS = ("none", "padding", "pairs", "added", "both", "both added", "per head")


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_the_layers_own(dtype: torch.dtype, mask: str, batch_first: bool, need_weights: bool) -> None:
    layer = attention(dtype)
    layer.batch_first = batch_first
    x, memory = torch.randn(B, L, C, dtype=dtype), torch.randn(B, S, C, dtype=dtype)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    given = masks(mask, dtype)
    plain, expected = layer(x, memory, memory, average_attn_weights=False, **given)
    plain = plain if need_weights else layer(x, memory, memory, need_weights=False, **given)[0]
    with rg.capture(layer) as cap:
        out, theirs = layer(x, memory, memory, need_weights=need_weights, average_attn_weights=False, **given)
    assert torch.equal(out, plain)
    assert (theirs is not None) == need_weights
    call = cap[""]
    assert (call.kind, tuple(call.q.shape), tuple(call.k.shape)) == ("cross", (B, H, L, D), (B, H, S, D))
    torch.testing.assert_close(call.weights(), expected, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=0)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({"add_zero_attn": True}, S + 1),
        ({"add_bias_kv": True}, S + 1),
        ({"kdim": 6, "vdim": 10}, S),
        ({"bias": False}, S),
    ],
)
def test_extra_keys_and_other_widths(more: dict, keys: int, need_weights: bool) -> None:
    layer = attention(**more)
    x = torch.randn(B, L, C, dtype=torch.float64)
    k, v = (torch.randn(B, S, more.get(n, C), dtype=torch.float64) for n in ("kdim", "vdim"))
    padding = blocked(B, S)
    _, expected = layer(x, k, v, key_padding_mask=padding, average_attn_weights=False)
    found = rg.sites(layer, x, k, v, key_padding_mask=padding, need_weights=need_weights)
    assert [(s.kind, s.heads, s.head_dim, s.queries, s.keys, s.verified) for s in found] == [
        ("cross", H, D, L, keys, True)
    ]
    with rg.capture(layer) as cap:
        layer(x, k, v, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(cap[""].weights(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights: bool) -> None:
    layer = attention()
    x = torch.randn(L, C, dtype=torch.float64)
    _, expected = layer(x, x, x, average_attn_weights=False)
    with rg.capture(layer) as cap:
        layer(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(cap[""].weights(), expected[None], atol=1e-12, rtol=0)


def test_keys_of_the_layers_own_leave_self_attention_what_it_is() -> None:
    for more in ({"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}):
        x = torch.randn(B, L, C, dtype=torch.float64)
        assert [s.kind for s in rg.sites(attention(**more), x, x, x)] == ["self"]


def test_batch_first_off_with_as_many_tokens_as_heads_times_batch() -> None:
    layer = attention()
    layer.batch_first = False
    x = torch.randn(B * H, B, C, dtype=torch.float64)
    _, expected = layer(x, x, x, average_attn_weights=False)
    with rg.capture(layer) as cap:
        layer(x, x, x, need_weights=True)
    torch.testing.assert_close(cap[""].weights(), expected, atol=1e-12, rtol=0)


def test_a_query_without_keys() -> None:
    layer = attention()
    x = torch.randn(B, L, C, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    with rg.capture(layer, grad=True) as cap:
        out, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
        out[..., 0].sum().backward()
    call = cap[""]
    assert not call.weights()[1].any()
    torch.testing.assert_close(call.weights()[0].sum(-1), torch.ones(H, L, dtype=torch.float64))
    assert not call.received()[1].any()
    assert not call.mass(torch.eye(L))[1].any()
    assert call.weights_grad().isfinite().all()
    # The layer's own weights are NaN there, so nothing is said of that call as a whole.
    with rg.capture(layer) as cap, torch.no_grad():
        layer(x[1:], x[1:], x[1:], key_padding_mask=padding[1:], need_weights=True)
    with pytest.raises(OpaqueSite):
        cap[""].weights()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", ["none", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_weights(dtype: torch.dtype, mask: str, need_weights: bool) -> None:
    layer = attention(dtype)
    x, memory = torch.randn(B, L, C, dtype=dtype), torch.randn(B, S, C, dtype=dtype)
    given = masks(mask, dtype)
    target = torch.randn(B, L, C, dtype=dtype)
    with rg.capture(layer, grad=True) as cap:
        out, _ = layer(x, memory, memory, need_weights=need_weights, **given)
        (out * target).sum().backward()
    # The layer written out: softmax(q k^T / sqrt d + mask) v, heads side by side, projected.
    q, k, v = (
        (y @ w.T + b).view(B, -1, H, D).transpose(1, 2)
        for y, w, b in zip((x, memory, memory), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3))
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    if mask == "both":
        scores = scores.masked_fill(given["key_padding_mask"][:, None, None] | given["attn_mask"], -math.inf)
    weights = scores.softmax(-1)
    weights.retain_grad()
    eager = (weights @ v).transpose(1, 2).flatten(2) @ layer.out_proj.weight.T + layer.out_proj.bias
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out, eager, atol=10 * bound, rtol=0)
    (eager * target).sum().backward()
    torch.testing.assert_close(cap[""].weights(), weights, atol=bound, rtol=0)
    torch.testing.assert_close(cap[""].weights_grad(), weights.grad, atol=10 * bound, rtol=0)
    rows, heads = [4, 0], [2]
    chosen = cap[""].weights_grad(rows=rows, heads=heads)
    torch.testing.assert_close(chosen, weights.grad[:, heads][:, :, rows], atol=10 * bound, rtol=0)


def test_dropped_weights_have_no_gradient_that_can_be_known() -> None:
    layer = attention(dropout=0.5).train()
    x = torch.randn(B, L, C, dtype=torch.float64)
    for need_weights in (False, True):
        with rg.capture(layer, grad=True) as cap:
            layer(x, x, x, need_weights=need_weights)[0].sum().backward()
        assert cap[""].dropout == 0.5
        torch.testing.assert_close(cap[""].weights().sum(-1), torch.ones(B, H, L, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"dropped weights with probability 0\.5"):
            cap[""].weights_grad()


class BothWays(nn.Module):
    """Two sets look at each other through one product."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        similarity = torch.einsum("bhid,bhjd->bhij", x, y)
        there, back = similarity.softmax(-1), similarity.mT.contiguous().softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", there, y), torch.einsum("bhji,bhjd->bhid", back.mT, x)


def test_attention_in_both_directions_is_refused_for_what_it_is() -> None:
    x, y = torch.randn(2, B, H, L, D)
    (site,) = rg.sites(BothWays(), x, y)
    assert not site.verified
    assert "both directions at once" in site.reason


def test_of_two_directions_between_sets_of_different_size_that_of_the_rows_is_read() -> None:
    x, y = torch.randn(B, H, L, D), torch.randn(B, H, L + 2, D)
    model = BothWays()
    with rg.capture(model) as cap:
        model(x, y)
    (call,) = cap.calls("")
    torch.testing.assert_close(call.weights(), (x @ y.mT).softmax(-1))


def encoder_layer(**more) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(C, H, 16, dropout=0.0, batch_first=True, **more).eval()


def test_a_watch_turns_off_torchs_fast_path_and_nothing_else() -> None:
    layer = encoder_layer()
    x = torch.randn(B, L, C)
    with torch.no_grad():
        fast = layer(x)
        slow = encoder_layer(activation=lambda y: nn.functional.relu(y))  # An activation the fast path does not know.
        slow.load_state_dict(layer.state_dict())
        with rg.capture(layer) as cap:
            watched = layer(x)
        again = layer(x)
    assert torch.equal(watched, slow(x))  # What a watch changes: the layer runs as it does in training.
    torch.testing.assert_close(watched, fast, atol=1e-6, rtol=0)
    assert torch.equal(again, fast)
    _, expected = layer.self_attn(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(cap["self_attn"].weights(), expected, atol=1e-6, rtol=0)
    assert cap["self_attn"].kind == "self"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_with_padding(nested: bool) -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=nested).eval()
    x = torch.randn(B, L, C)
    padding = torch.tensor([[False] * L, [False] * 3 + [True] * (L - 3)])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
        found = rg.sites(model, x, src_key_padding_mask=padding)
        with rg.capture(model) as cap:
            watched = model(x, src_key_padding_mask=padding)
    assert [(s.name, s.kind, s.heads, s.verified) for s in found] == [
        (f"layers.{i}.self_attn", "self", H, True) for i in range(2)
    ]
    # Padded places are zero in torch's nested form and anything in the other; nobody reads them.
    torch.testing.assert_close(watched[~padding], plain[~padding], atol=1e-6, rtol=0)
    for _, call in cap.items():
        assert not call.weights()[1, ..., 3:].any()
        torch.testing.assert_close(call.weights().sum(-1), torch.ones(B, H, L))


def test_decoder_layers_have_a_self_and_a_cross_site() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(C, H, 2, 2, 16, dropout=0.0, batch_first=True).eval()
    x, y = torch.randn(B, S, C), torch.randn(B, L, C)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    with torch.no_grad():
        plain = model(x, y, tgt_mask=causal, tgt_is_causal=True)
        found = rg.sites(model, x, y, tgt_mask=causal, tgt_is_causal=True)
        with rg.capture(model, "cross") as cap:
            model(x, y, tgt_mask=causal, tgt_is_causal=True)
        after = model(x, y, tgt_mask=causal, tgt_is_causal=True)
    assert torch.equal(plain, after)
    assert {s.name: (s.kind, s.causal, s.queries, s.keys) for s in found.verified} == {
        **{f"encoder.layers.{i}.self_attn": ("self", False, S, S) for i in range(2)},
        **{f"decoder.layers.{i}.self_attn": ("self", True, L, L) for i in range(2)},
        **{f"decoder.layers.{i}.multihead_attn": ("cross", False, L, S) for i in range(2)},
    }
    assert list(cap) == [f"decoder.layers.{i}.multihead_attn" for i in range(2)]


def test_cross_attention_to_as_many_tokens_is_told_from_self_attention() -> None:
    layer = nn.TransformerDecoderLayer(C, H, 16, dropout=0.0, batch_first=True).eval()
    for n in (L, C):  # also when tokens and channels are as many
        found = rg.sites(layer, torch.randn(B, n, C), torch.randn(B, n, C))
        expected = "cross" if n != C else "self"  # a square stream looks like a mask
        assert [s.kind for s in found] == ["self", expected]


def test_positions_added_to_queries_and_keys_make_no_cross_attention() -> None:
    layer = attention()
    x, position = torch.randn(2, B, L, C, dtype=torch.float64)
    same = x + position
    for q, k in ((same, same), (x + position, x + position)):
        assert [s.kind for s in rg.sites(layer, q, k, x)] == ["self"]
    assert [s.kind for s in rg.sites(layer, x + position, torch.randn_like(x), x)] == ["cross"]


def test_plain_functions_with_fewer_or_more_axes() -> None:
    """The fused kernel on (b, l, d), (l, d) and (b, windows, h, l, d), with masks of that many axes."""

    class Plain(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.mask = torch.rand(*shape[:-1], shape[-2]) < 0.6
            self.mask[..., 0] = True

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

    for shape in ((B, L, D), (L, D), (B, 2, H, L, D), (B, 3, 2, H, L, D)):
        model = Plain(shape)
        x = torch.randn(*shape, dtype=torch.float64)
        expected = (x @ x.transpose(-1, -2) / math.sqrt(D)).masked_fill(~model.mask, -math.inf).softmax(-1)
        plain = model(x)
        torch.testing.assert_close(plain, expected @ x, atol=1e-12, rtol=0)
        with rg.capture(model) as cap:
            assert torch.equal(model(x), plain)
        weights = cap[""].weights()
        heads = H if len(shape) > 3 else 1
        assert weights.shape[1:] == (heads, L, L)
        torch.testing.assert_close(weights, expected.reshape(-1, heads, L, L), atol=1e-12, rtol=0)
        with rg.edit(model, rg.Edit.weights(lambda w, call: w.flip(-1))):
            edited = model(x)
        torch.testing.assert_close(edited, expected.flip(-1) @ x, atol=1e-12, rtol=0)
        with rg.edit(model, rg.Edit.scale_keys(1, 3.0, renormalize=True)):
            scaled = model(x)
        factors = torch.ones(L, dtype=torch.float64).index_fill(0, torch.tensor(1), 3.0)
        heavier = expected * factors
        torch.testing.assert_close(scaled, heavier / heavier.sum(-1, keepdim=True) @ x, atol=1e-12, rtol=0)
