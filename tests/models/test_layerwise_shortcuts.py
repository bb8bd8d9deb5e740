"""Shortcuts against loops over depths and tokens, decoding, causality, limits and cost."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.bench.cost import flops, parameters
from regard.models.language._decoder import DecoderLM
from regard.models.language.layerwise_shortcuts import (
    LayerwiseShortcutCrossLM,
    LayerwiseShortcutLM,
    Shortcut,
    by_depth,
    context_usage,
    depth_entropy,
    depth_usage,
)

KINDS = [LayerwiseShortcutLM, LayerwiseShortcutCrossLM]


def made(kind: type[DecoderLM] = LayerwiseShortcutLM, depth: int = 4, dim: int = 12, **arguments) -> DecoderLM:
    model = kind(11, dim, 3, depth=depth, context=16, dropout=0.0, **arguments).double().eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def tokens(b: int = 2, n: int = 9) -> Tensor:
    return torch.randint(11, (b, n))


def loops(shortcut: Shortcut, x: Tensor, states: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Query by query, with every (depth, token) it may see gathered by hand."""
    a, out = shortcut.attn, torch.zeros_like(x)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            seen = [
                m(states[tap][b, j]) + e
                for m, tap, e in zip(shortcut.maps, shortcut.taps, shortcut.depth, strict=True)
                for j in range(i + 1)
                if mask is None or mask[b, j]
            ]
            heads, q = [], a.q(shortcut.norm(x[b, i]))
            for h in range(a.num_heads):
                part = slice(h * a.head_dim, (h + 1) * a.head_dim)
                if not seen:
                    heads.append(torch.zeros_like(q[part]))
                    continue
                scores = torch.stack([a.k(u)[part] @ q[part] / math.sqrt(a.head_dim) for u in seen])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * a.v(u)[part] for w, u in zip(weights, seen, strict=True)))
            out[b, i] = a.out(torch.cat(heads))
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("taps", [(0, 2, 3), (3,)])
def test_equals_loops(masked: bool, taps: tuple[int, ...]) -> None:
    shortcut = made(taps=taps, tap_dim=7).last.shortcut
    states = [torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mask = torch.tensor([[True] * 5, [False, False, True, False, True]]) if masked else None
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 5, 12, dtype=torch.float64)
    leaves = [x, *(states[tap] for tap in taps), *shortcut.parameters()]
    got, want = shortcut(x, states, 0, mask, None), loops(shortcut, x, states, mask)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    for a, b in zip(*(torch.autograd.grad((y * pull).sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_model_is_its_parts() -> None:
    model, ids = made(), tokens()
    states = [model.tokens(ids) + model.positions.weight[:9]]
    for block in model.blocks:
        x = states[-1] + block.attn(block.norm1(states[-1]))
        states.append(x + block.mlp(block.norm2(x)))
    last = model.last
    x = states[-1] + last.attn(last.norm1(states[-1]))
    x = x + loops(last.shortcut, x, states, None)
    x = x + last.mlp(last.norm2(x))
    torch.testing.assert_close(model(ids), model.norm(x) @ model.tokens.weight.T, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_is_the_full_forward(kind: type[DecoderLM], padded: bool) -> None:
    model, ids = made(kind), tokens()
    mask = torch.tensor([[True] * 9, [False] * 3 + [True] * 6]) if padded else None
    full, cache, parts = model(ids, mask=mask), model.new_cache(2, 9, dtype=torch.float64), []
    for start, end in ((0, 4), (4, 5), (5, 7), (7, 8), (8, 9)):
        parts.append(model(ids[:, start:end], mask=None if mask is None else mask[:, :end], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=1e-10)
    assert cache.length == 9
    assert cache.blocks[-1][-1].length == 27


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind: type[DecoderLM]) -> None:
    model, ids = made(kind), tokens(1, 6)
    padded = torch.cat([tokens(1, 3), ids], 1)
    mask = torch.arange(9)[None] >= 3
    torch.testing.assert_close(model(padded, mask=mask)[:, 3:], model(ids), atol=1e-10, rtol=1e-10)
    assert model(padded, mask=mask).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_depth_leaks_the_future(kind: type[DecoderLM]) -> None:
    """Each tapped state by itself, and the model as a whole."""
    shortcut = made(kind, taps=(0, 1, 3)).last.shortcut
    states = [torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    out = shortcut(torch.randn(1, 5, 12, dtype=torch.float64), states, 0, None, None)
    for i in range(5):
        grads = torch.autograd.grad(out[0, i].sum(), [states[tap] for tap in (0, 1, 3)], retain_graph=True)
        for g in grads:
            assert not g[0, i + 1 :].any()
            assert (g[0, : i + 1].abs().sum(-1) > 0).all()
    model, ids = made(kind), tokens(1)
    changed = ids.clone()
    changed[0, 5:] = (ids[0, 5:] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :5], model(ids)[:, :5], atol=1e-12, rtol=1e-12)
    assert (model(changed)[:, 5:] - model(ids)[:, 5:]).abs().amin(-1).min() > 0


def test_a_silent_shortcut_is_the_decoder() -> None:
    model, plain, ids = made(), made(DecoderLM), tokens()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "shortcut" not in name})
    assert not torch.allclose(model(ids), plain(ids))
    for p in model.last.shortcut.attn.out.parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(model(ids), plain(ids), atol=0, rtol=0)


def test_one_tap_of_the_last_state_is_self_attention() -> None:
    model, plain, ids = made(LayerwiseShortcutCrossLM, taps=(3,)), made(DecoderLM), tokens()
    shortcut, last = model.last.shortcut, plain.last
    shortcut.maps[0] = shortcut.norm
    nn.init.zeros_(shortcut.depth)
    shared = {name: value for name, value in model.state_dict().items() if not name.startswith("last.shortcut")}
    plain.load_state_dict(shared, strict=False)
    last.norm1.load_state_dict(shortcut.norm.state_dict())
    last.attn.load_state_dict(shortcut.attn.state_dict())
    torch.testing.assert_close(model(ids), plain(ids), atol=1e-12, rtol=1e-12)


def test_the_order_of_taps_does_not_matter() -> None:
    one, other, ids = made(taps=(1, 2, 3)), made(taps=(3, 1, 2)), tokens()
    other.load_state_dict(one.state_dict())
    turned, order = other.last.shortcut, [2, 0, 1]
    for new, old in enumerate(order):
        turned.maps[new].load_state_dict(one.last.shortcut.maps[old].state_dict())
    turned.depth.data = one.last.shortcut.depth.data[order]
    torch.testing.assert_close(other(ids), one(ids), atol=1e-12, rtol=1e-12)
    turned.depth.data = turned.depth.data[[1, 0, 2]]
    assert not torch.allclose(other(ids), one(ids)), "depths are not told apart"


def test_shallow_states_are_not_drowned() -> None:
    """Each depth is normed: a state a thousand times larger gets no more weight, so nothing of it changes."""
    shortcut = made().last.shortcut
    states = [torch.randn(1, 5, 12, dtype=torch.float64) for _ in range(4)]
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    grown = [*states[:3], 1000 * states[3]]
    torch.testing.assert_close(
        shortcut(x, grown, 0, None, None), shortcut(x, states, 0, None, None), atol=1e-3, rtol=1e-3
    )


def test_usage() -> None:
    model, ids = made(), tokens()
    mask = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    with regard.capture(model, "last.shortcut.attn") as seen:
        model(ids, mask=mask)
    weights = by_depth(seen["last.shortcut.attn"].weights(), taps=3)
    assert weights.shape == (2, 3, 9, 3, 9)
    assert not weights[1, :, :, :, :4].any()
    depth = torch.zeros(3, 3, dtype=weights.dtype)
    distance = torch.zeros(3, 9, dtype=weights.dtype)
    for h in range(3):
        for i in range(9):
            for j in range(i + 1):
                depth[h] += weights[:, h, i, :, j].sum(0)
                distance[h, i - j] += weights[:, h, i, :, j].sum()
    torch.testing.assert_close(depth_usage(weights), depth / depth.sum(-1, keepdim=True))
    torch.testing.assert_close(context_usage(weights), distance / distance.sum(-1, keepdim=True))
    torch.testing.assert_close(context_usage(weights[:, :, -1:]).sum(-1), torch.ones(3, dtype=weights.dtype))
    even = torch.full((1, 1, 1, 4, 2), 1 / 8)
    assert depth_entropy(even).item() == pytest.approx(math.log(4))
    assert depth_entropy(torch.eye(4)[None, None, :, :, None]).abs().max() == 0


def test_at_the_start_depths_are_used_alike() -> None:
    torch.manual_seed(0)
    model = LayerwiseShortcutLM(11, 64, 4, depth=5, context=16).eval()
    with regard.capture(model, "last.shortcut.attn") as seen:
        model(tokens(4, 16))
    usage = depth_usage(by_depth(seen["last.shortcut.attn"].weights(), taps=4))
    assert (usage - 1 / 4).abs().max() < 0.05


@pytest.mark.parametrize(("taps", "tap_dim"), [((1, 2, 3), 12), ((0, 3), 20)])
def test_cost(taps: tuple[int, ...], tap_dim: int) -> None:
    """What the shortcut adds to the decoder, in parameters, FLOPs and cached numbers."""
    model, plain, c, e, t = made(taps=taps, tap_dim=tap_dim), made(DecoderLM), 12, tap_dim, len(taps)
    maps = t * (2 * c + (c + 1) * e + (e + 1) * e)
    attention = 2 * (c + 1) * c + 2 * (e + 1) * c
    assert parameters(model) - parameters(plain) == maps + t * e + attention + 2 * c
    ids, n = tokens(1, 9), 9
    added = flops(model, ids).total - flops(plain, ids).total
    assert added == n * (2 * t * (c * e + e * e) + 2 * t * 2 * e * c + 2 * 2 * c * c + 2 * 2 * t * n * c)
    sizes = [sum(held.nbytes for block in m.new_cache(1, 9).blocks for held in block) for m in (model, plain)]
    assert sizes[0] - sizes[1] == 4 * 9 * 2 * t * c


@pytest.mark.parametrize("kind", KINDS)
def test_small_and_mixed(kind: type[DecoderLM]) -> None:
    model = made(kind, taps=(0, 3))
    assert model(tokens(1, 1)).shape == (1, 1, 11)
    assert made(kind, depth=1, taps=(0,))(tokens(1, 4)).isfinite().all()
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens(2, 5))
    assert mixed.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_trains_every_depth(kind: type[DecoderLM]) -> None:
    model, ids = made(kind).train(), tokens()
    nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for m in model.last.shortcut.maps:
        assert all(p.grad.abs().max() > 0 for p in m.parameters())


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: made(taps=()), r"taps=\(\)"),
        (lambda: made(depth=1), r"taps=\(\)"),
        (lambda: made(taps=(1, 4)), r"taps=\(1, 4\)"),
        (lambda: made(taps=(-1, 1)), r"taps=\(-1, 1\)"),
        (lambda: made(taps=(1, 1)), r"taps=\(1, 1\)"),
        (lambda: made(LayerwiseShortcutCrossLM, taps=(1, 2)), "must have 3"),
        (lambda: made(tap_dim=0), "tap_dim=0"),
        (lambda: made(depth=0), "depth=0"),
        (lambda: made()(tokens(1, 17)), "beyond context=16"),
        (lambda: made()(tokens(), mask=torch.ones(2, 8, dtype=torch.bool)), r"mask must be \(2, 9\)"),
        (lambda: made(dim=10), "dim=10 must be a multiple"),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()


def test_context_overflow_while_decoding() -> None:
    model = made()
    cache = model.new_cache(1, 20, dtype=torch.float64)
    model(tokens(1, 15), cache=cache)
    model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="end at 17"):
        model(tokens(1, 1), cache=cache)
