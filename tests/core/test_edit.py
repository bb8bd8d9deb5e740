"""Every edit beside its definition, written out on the weights, on three kinds of site."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.core.edit import EditConflict

B, L, H, D = 3, 6, 2, 4
C = H * D


class Written(nn.Module):
    """Self-attention written out; what the edits are defined on. ``change`` is given a dict and may change what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = H
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(len(x), -1, 3, H, D).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge((q @ k.transpose(-1, -2) / math.sqrt(D)).softmax(-1) @ v)

    def merge(self, out: Tensor) -> Tensor:
        return self.proj(out.transpose(1, 2).flatten(2))


class Fused(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(nn.functional.scaled_dot_product_attention(*self.heads(x)))


class Batched(Written):
    """Heads folded into the batch, queries scaled before, the product by ``baddbmm``."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.flatten(0, 1) for y in self.heads(x))
        zero = torch.zeros(len(q), L, L, dtype=x.dtype)
        weights = torch.baddbmm(zero, q / math.sqrt(D), k.transpose(-1, -2)).softmax(-1)
        return self.merge(torch.bmm(weights, v).view(len(x), H, -1, D))


class Einsum(Written):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * D**-0.5, dim=-1)
        return self.merge(torch.einsum("bhij,bhjd->bhid", nn.functional.dropout(weights, 0.0, self.training), v))


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, H, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=self.need_weights)[0]


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "fused": Fused,
    "written": Written,
    "batched": Batched,
    "einsum": Einsum,
    "multihead": lambda: MultiHead(False),
    "multihead with weights": lambda: MultiHead(True),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Written, Tensor]:
    """A host, the same function written out, and an input."""
    torch.manual_seed(0)
    host, written = HOSTS[name](), Written()
    for parameter in written.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = written.state_dict()
    if isinstance(host, MultiHead):
        names = {"qkv.weight": "attn.in_proj_weight", "qkv.bias": "attn.in_proj_bias"}
        names |= {"proj.weight": "attn.out_proj.weight", "proj.bias": "attn.out_proj.bias"}
        state = {names[n]: w for n, w in state.items()}
    host.load_state_dict(state)
    return nn.Sequential(host).eval().to(dtype), written.to(dtype), torch.randn(B, L, C, dtype=dtype)


def defined(written: Written, x: Tensor, **changes: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Output and weights where q, k, v, scores, weights and out are changed by the functions given."""
    same = lambda y: y  # noqa: E731
    q, k, v = written.heads(x)
    q, k, v = changes.get("q", same)(q), changes.get("k", same)(k), changes.get("v", same)(v)
    scores = changes.get("scores", same)(q @ k.transpose(-1, -2) / math.sqrt(D))
    weights = scores.softmax(-1)
    weights = weights.masked_fill(weights.isnan(), 0.0)
    weights = changes.get("weights", same)(weights)
    return written.merge(changes.get("out", same)(weights @ v)), weights


PERMUTED = [2, 0, 1]
ADDED = torch.randn(H, L, L, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ALLOWED = torch.rand(L, L, generator=torch.Generator().manual_seed(4)) < 0.6
ALLOWED[4] = False  # A query that may look nowhere.
FACTORS = torch.tensor([2.0, 0.5, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
GATE = torch.tensor([0.25, 2.0])


def heavier(weights: Tensor) -> Tensor:
    changed = weights * FACTORS.to(weights)
    return changed / changed.sum(-1, keepdim=True)


# name: (edit, the changes that define it)
EDITS: dict[str, tuple[Callable[..., rg.Edit], dict[str, Callable[[Tensor], Tensor]]]] = {
    "q": (lambda **o: rg.Edit.q(lambda q, call: q.flip(2) * 2, **o), {"q": lambda q: q.flip(2) * 2}),
    "k": (lambda **o: rg.Edit.k(lambda k, call: k.roll(1, 2), **o), {"k": lambda k: k.roll(1, 2)}),
    "v": (lambda **o: rg.Edit.v(lambda v, call: v**2, **o), {"v": lambda v: v**2}),
    "share": (
        lambda **o: rg.Edit.share({0: 2, 1: 0, 2: 1}, **o),
        {"k": lambda k: k[PERMUTED], "v": lambda v: v[PERMUTED]},
    ),
    "scale_keys": (
        lambda **o: rg.Edit.scale_keys([0, 1, 3], FACTORS[[0, 1, 3]], **o),
        {"weights": lambda w: w * FACTORS.to(w)},
    ),
    "scale_keys, renormalised": (
        lambda **o: rg.Edit.scale_keys([0, 1, 3], FACTORS[[0, 1, 3]], renormalize=True, **o),
        {"weights": heavier},
    ),
    "mask": (
        lambda **o: rg.Edit.mask(lambda b, h, q, kv: (q + kv + h) % 3 > 0, **o),
        {"scores": lambda s: s.masked_fill(index(lambda b, h, q, kv: (q + kv + h) % 3 == 0), -math.inf)},
    ),
    "mask, a tensor with an empty row": (
        lambda **o: rg.Edit.mask(ALLOWED, **o),
        {"scores": lambda s: s.masked_fill(~ALLOWED, -math.inf)},
    ),
    "bias": (lambda **o: rg.Edit.bias(ADDED, **o), {"scores": lambda s: s + ADDED.to(s)}),
    "scores": (
        lambda **o: rg.Edit.scores(lambda score, b, h, q, kv: score.tanh() + (q - kv).abs() * (h + 1) * 0.1, **o),
        {"scores": lambda s: s.tanh() + index(lambda b, h, q, kv: (q - kv).abs() * (h + 1) * 0.1).to(s)},
    ),
    "weights": (lambda **o: rg.Edit.weights(lambda w, call: w**2, **o), {"weights": lambda w: w**2}),
    "heads": (lambda **o: rg.Edit.heads(GATE, **o), {"out": lambda out: out * GATE.to(out)[:, None, None]}),
    "out": (lambda **o: rg.Edit.out(lambda out, call: out.sin(), **o), {"out": lambda out: out.sin()}),
}


def index(f: Callable[..., Tensor]) -> Tensor:
    axes = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate((B, H, L, L))]
    return f(*axes)


def chosen(changes: dict, rows: Tensor) -> dict:
    """``changes`` where ``rows`` (b, h, 1, 1) is True."""
    return {n: lambda x, f=f: torch.where(rows, f(x), x) for n, f in changes.items()}


def run(model: nn.Module, x: Tensor, *edits: rg.Edit, **more) -> tuple[Tensor, Tensor]:
    with rg.edit(model, *edits, **more), rg.capture(model) as cap, torch.no_grad():
        out = model(x)
    return out, next(call for _, call in cap.items()).weights()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edit_is_what_it_is_defined_to_be(name: str, host: str, dtype: torch.dtype) -> None:
    model, written, x = build(host, dtype)
    make, changes = EDITS[name]
    plain = model(x)
    assert [s.verified for s in rg.sites(model, x)] == [True]
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    expected, expected_weights = defined(written, x, **changes)
    out, weights = run(model, x, make())
    scale = expected.abs().max().item()
    torch.testing.assert_close(out, expected, atol=2 * bound * scale, rtol=0)
    # The capture inside the edit sees the edited attention, and it verifies.
    torch.testing.assert_close(weights, expected_weights, atol=2 * bound, rtol=0)
    assert not torch.allclose(expected, plain, atol=1e-3)
    # Strength 0 is nothing, and when the edit is gone the host is what it was.
    assert torch.equal(run(model, x, make(strength=0))[0], plain)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", EDITS)
def test_one_head_only(name: str, host: str) -> None:
    model, written, x = build(host)
    make, changes = EDITS[name]
    rg.sites(model, x)
    head = torch.tensor([False, True]).view(1, H, 1, 1)
    expected, expected_weights = defined(written, x, **chosen(changes, head))
    out, weights = run(model, x, make(only=[1]))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("host", ["fused", "written", "multihead with weights"])
@pytest.mark.parametrize("name", EDITS)
def test_one_branch_only(name: str, host: str) -> None:
    model, written, x = build(host)
    make, changes = EDITS[name]
    x = x[:2]
    if name == "share":
        make, changes = (
            lambda **o: rg.Edit.share({0: 1, 1: 0}, **o),
            {"k": lambda k: k.flip(0), "v": lambda v: v.flip(0)},
        )
    rg.sites(model, x)
    for branch, first in (("uncond", True), ("cond", False)):
        rows = torch.tensor([first, not first]).view(2, 1, 1, 1)

        def within(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
            return f(torch.cat([y, y[:1]]))[:2] if name in ("mask", "scores") else f(y)

        expected, _ = defined(
            written, x, **{n: lambda y, f=f, rows=rows: torch.where(rows, within(f, y), y) for n, f in changes.items()}
        )
        out, _ = run(model, x, make(branch=branch))
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="3 rows, not two halves"), rg.edit(model, make(branch="cond")):
        model(torch.cat([x, x[:1]]))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [n for n in EDITS if not n.startswith(("mask", "share"))])
@pytest.mark.parametrize("strength", [0.3, -1.0])
def test_strength_is_the_straight_line_through_both(name: str, host: str, strength: float) -> None:
    model, written, x = build(host)
    make, changes = EDITS[name]
    rg.sites(model, x)
    if name == "scale_keys, renormalised":  # A line in what is added to the scores.
        changes = {"scores": lambda s: s + strength * FACTORS.log()}
        expected, _ = defined(written, x, **changes)
    else:
        expected, _ = defined(written, x, **{n: lambda y, f=f: y + strength * (f(y) - y) for n, f in changes.items()})
    torch.testing.assert_close(run(model, x, make(strength=strength))[0], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("host", HOSTS)
def test_keys_and_values_from_elsewhere(host: str) -> None:
    model, written, x = build(host)
    found = rg.sites(model, x)
    bank_k, bank_v = torch.randn(2, B, H, 4, D, dtype=torch.float64)
    edit = rg.Edit.kv(lambda k, v, call: (torch.cat([k, bank_k], 2), torch.cat([v, bank_v], 2)))
    if host not in ("fused", "multihead"):
        with pytest.raises(ValueError, match="by hand: edit k and v separately"), rg.edit(model, edit):
            model(x)
        assert torch.equal(model(x), model(x))
        return
    q, k, v = written.heads(x)
    weights = (q @ torch.cat([k, bank_k], 2).transpose(-1, -2) / math.sqrt(D)).softmax(-1)
    out, seen = run(model, x, edit)
    torch.testing.assert_close(out, written.merge(weights @ torch.cat([v, bank_v], 2)), atol=1e-12, rtol=0)
    torch.testing.assert_close(seen, weights, atol=1e-12, rtol=0)
    assert found[0].keys == L
    with pytest.raises(ValueError, match=r"the mask \(6, 6\) does not fit scores of \(3, 2, 6, 10\)"):
        run(model, x, edit, rg.Edit.mask(ALLOWED))
    if host == "multihead":
        masked = {"attn_mask": torch.zeros(L, L, dtype=torch.bool)}
        with pytest.raises(ValueError, match=r"keys went from 6 to 10, but the call has a mask"), rg.edit(model, edit):
            model[0].attn(x, x, x, need_weights=False, **masked)


@pytest.mark.parametrize("host", HOSTS)
def test_edits_come_in_the_order_of_the_quantities(host: str) -> None:
    model, written, x = build(host)
    rg.sites(model, x)
    names = ["out", "weights", "bias", "v", "k", "q", "heads", "scores"]
    expected, expected_weights = defined(
        written,
        x,
        q=EDITS["q"][1]["q"],
        k=EDITS["k"][1]["k"],
        v=EDITS["v"][1]["v"],
        scores=lambda s: EDITS["scores"][1]["scores"](s + ADDED),
        weights=EDITS["weights"][1]["weights"],
        out=lambda out: (out * GATE.double()[:, None, None]).sin(),
    )
    edits = [EDITS[n][0](order=2 if n == "out" else 1) for n in names]
    out, weights = run(model, x, *edits)
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-11, rtol=0)


@pytest.mark.parametrize("host", ["fused", "written"])
def test_two_factors_multiply_and_read_as_weights(host: str) -> None:
    model, written, x = build(host)
    rg.sites(model, x)
    expected, expected_weights = defined(written, x, weights=lambda w: w * FACTORS * 3.0)
    tripled = rg.Edit.scale_keys(slice(None), 3.0)
    with rg.edit(model, EDITS["scale_keys"][0](), tripled), rg.capture(model, grad=True) as cap:
        out = model(x)
        out.square().sum().backward()
    call = cap["0" if host != "multihead" else "0.attn"]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(call.weights(), expected_weights, atol=1e-12, rtol=0)
    torch.testing.assert_close(call.received(), expected_weights.sum(2), atol=1e-12, rtol=0)
    torch.testing.assert_close(call.mass(torch.eye(L)), expected_weights, atol=1e-12, rtol=0)
    torch.testing.assert_close(call.v, written.heads(x)[2], atol=1e-12, rtol=0)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", EDITS)
def test_gradients_of_weights_and_parameters_through_an_edit(name: str, host: str) -> None:
    model, written, x = build(host)
    make, changes = EDITS[name]
    rg.sites(model, x)
    target = torch.randn(B, L, C, dtype=torch.float64)
    with rg.edit(model, make()), rg.capture(model, grad=True) as cap, rg.capture(model, grad=True):
        (model(x) * target).sum().backward()
    call = next(call for _, call in cap.items())

    kept: list[Tensor] = []

    def keep(weights: Tensor) -> Tensor:
        kept.append(changes["weights"](weights) if "weights" in changes else weights * 1)
        kept[0].retain_grad()
        return kept[0]

    (defined(written, x, **{**changes, "weights": keep})[0] * target).sum().backward()
    torch.testing.assert_close(call.weights_grad(), kept[0].grad, atol=1e-11, rtol=0)
    ours = [p.grad for p in model.parameters()]
    for mine, theirs in zip(ours, (p.grad for p in written.parameters()), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs.nan_to_num(), atol=1e-10, rtol=0)


def test_a_loss_on_the_weights_reaches_the_model() -> None:
    for host in HOSTS:
        model, written, x = build(host)
        rg.sites(model, x)
        other = torch.randn(B, H, L, L, dtype=torch.float64)
        with rg.capture(model) as cap:
            model(x)
        (next(call for _, call in cap.items()).weights() * other).sum().backward()
        (defined(written, x)[1] * other).sum().backward()
        for mine, theirs in zip(model.parameters(), written.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=0)


def test_steps_are_counted_from_the_edit_on() -> None:
    model, _, x = build("fused")
    rg.sites(model, x)
    plain = model(x)
    for steps, where in ((slice(1, 3), [1, 2]), (2, [2]), (range(0, 5, 3), [0, 3]), (slice(3, None), [3, 4])):
        with rg.edit(model, rg.Edit.v(lambda v, call: -v), steps=steps), torch.no_grad():
            changed = [not torch.equal(model(x), plain) for _ in range(5)]
        assert [i for i, c in enumerate(changed) if c] == where


def test_conflicts_are_said_and_solved_by_an_order() -> None:
    model, written, x = build("fused")
    rg.sites(model, x)
    double, shift = (lambda v, call: 2 * v), (lambda v, call: v + 1)
    with pytest.raises(EditConflict, match=r"touch v at the same sites and steps \(v and v\).*order="):
        rg.edit(model, rg.Edit.v(double), rg.Edit.v(shift))
    with pytest.raises(EditConflict, match="order="), rg.edit(model, rg.Edit.v(double)):
        rg.edit(model, rg.Edit.share({0: 1}))
    with pytest.raises(EditConflict):
        rg.edit(model, rg.Edit.v(double, order=1), rg.Edit.v(shift, order=1))
    for orders, change in (((1, 2), lambda v: 2 * v + 1), ((2, 1), lambda v: 2 * (v + 1))):
        first, second = orders
        out, _ = run(model, x, rg.Edit.v(double, order=first), rg.Edit.v(shift, order=second))
        torch.testing.assert_close(out, defined(written, x, v=change)[0], atol=1e-12, rtol=0)
        with rg.edit(model, rg.Edit.v(double, order=first)), rg.edit(model, rg.Edit.v(shift, order=second)):
            torch.testing.assert_close(model(x), out, atol=1e-12, rtol=0)
    # Masks and biases add up in any order; other steps and other branches do not meet.
    run(model, x, rg.Edit.mask(ALLOWED), rg.Edit.mask(ALLOWED.T), rg.Edit.bias(ADDED), rg.Edit.bias(ADDED))
    with rg.edit(model, rg.Edit.v(double), steps=slice(0, 2)), rg.edit(model, rg.Edit.v(shift), steps=slice(2, 4)):
        pass
    with rg.edit(model, rg.Edit.v(double, branch="cond"), rg.Edit.v(shift, branch="uncond")):
        pass
    # A handle that is refused leaves nothing.
    assert "_regard_taps" not in model[0].__dict__
    assert not model[0]._forward_hooks
