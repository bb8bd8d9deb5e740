"""A call's quantities beside brute force, what they cost in memory, and what is refused."""

import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regard as rg
from regard.core import call as calls
from regard.core.call import Call, OpaqueSite, WeightsTooLarge
from regard.core.tokens import Tokens

MASKS = (
    "none",
    "boolean",
    "boolean per head",
    "added",
    "added -inf",
    "causal",
    "causal and boolean",
    "softcap",
    "written",
)


def brute(call: Call) -> Tensor:
    """Weights by loops over every batch row, head, query and key; a query without keys has none."""
    (b, h, l, _), (_, g, s, _) = call.q.shape, call.k.shape
    weights = torch.zeros(b, h, l, s, dtype=torch.float64)
    full = None if call.mask is None else call.mask.expand(b, h, l, s)
    for i, j, n in itertools.product(range(b), range(h), range(l)):
        terms = {}
        for m in range(s):
            score = call.scale * float(call.q[i, j, n] @ call.k[i, j // (h // g), m])
            if call.softcap is not None:
                score = call.softcap * float(torch.tanh(torch.tensor(score / call.softcap, dtype=torch.float64)))
            if call.host_scores is not None:
                score = float(call.host_scores[i, j, n, m])
            if call.causal and m > n:
                continue
            if full is not None and full.dtype == torch.bool and not full[i, j, n, m]:
                continue
            if full is not None and full.dtype != torch.bool:
                score += float(full[i, j, n, m])
            if score > -float("inf"):
                terms[m] = score
        if terms:
            values = torch.tensor(list(terms.values()), dtype=torch.float64)
            weights[i, j, n, list(terms)] = (values - values.max()).exp() / (values - values.max()).exp().sum()
    return weights


def make(b: int, g: int, groups: int, l: int, s: int, d: int, mask: str, seed: int = 0) -> Call:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    h = g * groups
    more: dict = {}
    if "boolean" in mask:
        more["mask"] = normal(b, h if "head" in mask else 1, l, s) > -0.2
    if "added" in mask:
        more["mask"] = normal(1, h, l, s)
        if "-inf" in mask:
            more["mask"] = more["mask"].masked_fill(more["mask"] > 0.3, -float("inf"))
    if "causal" in mask:
        more["causal"] = True
    if mask == "softcap":
        more["softcap"] = 1.5
    if mask == "written":
        more["host_scores"] = normal(b, h, l, s)
    call = Call(normal(b, h, l, d), normal(b, g, s, d), normal(b, g, s, d + 1), scale=0.7, **more)
    call.mixed = brute(call) @ call.v.repeat_interleave(groups, 1)
    return call


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3),
    g=st.integers(1, 3),
    groups=st.integers(1, 2),
    l=st.integers(1, 6),
    s=st.integers(1, 6),
    d=st.integers(1, 4),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_quantities_agree_with_brute_force(b, g, groups, l, s, d, mask, seed, data) -> None:
    call = make(b, g, groups, l, s, d, mask, seed)
    expected = brute(call)
    rows = data.draw(st.lists(st.integers(-l, l - 1), min_size=1, max_size=4))
    heads = data.draw(st.lists(st.integers(0, g * groups - 1), min_size=1, max_size=3))
    roles = torch.randn(s, 3, dtype=torch.float64)
    call.out_grad = torch.randn(call.mixed.shape, dtype=torch.float64)
    gradient = call.out_grad @ call.v.repeat_interleave(groups, 1).transpose(-1, -2)

    def same(got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)

    same(call.weights(), expected)
    same(call.weights(rows=rows), expected[:, :, rows])
    same(call.weights(heads=heads), expected[:, heads])
    same(call.weights(rows=rows, heads=heads), expected[:, heads][:, :, rows])
    same(call.weights(rows=0, heads=-1), expected[:, -1:, :1])
    same(call.weights(rows=slice(1, None, 2)), expected[:, :, 1::2])
    same(call.received(), expected.sum(2))
    same(call.mass(roles), expected @ roles)
    same(call.weights_grad(), gradient)
    same(call.weights_grad(rows=rows, heads=heads), gradient[:, heads][:, :, rows])
    scores = call.scores(heads=heads)
    assert torch.equal(scores == -float("inf"), expected[:, heads] == 0)
    assert torch.equal(scores, call.scores()[:, heads])


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_every_quantity(mask: str) -> None:
    call = make(2, 2, 2, 4, 5, 3, mask)
    source = call.host_scores if mask == "written" else call.q
    source.requires_grad_()
    target = torch.randn(5, 2, dtype=torch.float64)
    other = torch.randn(2, 4, 5, dtype=torch.float64)
    weights = call.weights()
    for got, wanted in ((call.mass(target), weights @ target), (call.received(), weights.sum(2))):
        pull = torch.randn(got.shape, dtype=torch.float64)
        (ours,) = torch.autograd.grad((got * pull).sum(), source, retain_graph=True)
        (theirs,) = torch.autograd.grad((wanted * pull).sum(), source, retain_graph=True)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        assert ours.isfinite().all()
    with torch.no_grad():
        step = 1e-6 * torch.randn_like(source)
        values = []
        for sign in (1, -1):
            source += sign * step
            values.append(float((call._weights(None) * other[:, :, None]).sum()))
            source -= sign * step
    (ours,) = torch.autograd.grad((call.weights() * other[:, :, None]).sum(), source)
    assert abs(float((ours * step).sum()) - (values[0] - values[1]) / 2) < 1e-12


def test_names_of_rows_masses_of_roles_and_maps() -> None:
    call = make(2, 2, 1, 8, 8, 3, "none")
    call.tokens_q = call.tokens_k = Tokens.parse("cls + register[1] + image[2,3]")
    full = brute(call)
    torch.testing.assert_close(call.weights(rows="cls"), full[:, :, :1])
    torch.testing.assert_close(call.weights(rows="image[1:3] + cls"), full[:, :, [3, 4, 0]])
    torch.testing.assert_close(call.map("image", rows="cls", heads=1), full[:, 1:, :1, 2:].unflatten(-1, (2, 3)))
    mass = call.role_mass()
    assert list(mass) == ["cls", "register", "image"]
    torch.testing.assert_close(mass["image"], full[..., 2:].sum(-1))
    torch.testing.assert_close(sum(mass.values()), torch.ones(2, 2, 8, dtype=torch.float64))


class Allocations(TorchDispatchMode):
    """The largest new tensor, and the most that was alive at once, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.untyped_storage()._cdata in old | self.storages:
                continue
            storage = x.untyped_storage()
            size, key = storage.nbytes(), storage._cdata
            self.largest = max(self.largest, size)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self.storages.add(key)
            weakref.finalize(storage, self._free, size, key)
        return out

    def _free(self, size: int, key: int) -> None:
        self.alive -= size
        self.storages.discard(key)


@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "softcap", "gradient"])
def test_summaries_at_4096_tokens_never_hold_the_matrix(kind: str) -> None:
    n, h = 4096, 2
    q, k, v = torch.randn(3, 1, h, n, 8)
    if kind == "gradient":
        q.requires_grad_()
    more = {"causal": {"causal": True}, "softcap": {"softcap": 5.0}}.get(kind, {})
    if kind == "padding":
        more = {"mask": torch.rand(1, 1, 1, n) < 0.9}
    call = Call(q, k, v, **more)
    roles = torch.zeros(n, 3)
    roles[torch.arange(n), torch.arange(n) % 3] = 1
    matrix = h * n * n * 4
    for ask in (call.received, lambda: call.mass(roles)):
        with Allocations() as seen:
            got = ask()
            if kind == "gradient":
                (got * torch.randn_like(got)).sum().backward()
        assert 0 < seen.largest < 0.02 * matrix
        assert seen.peak < 0.05 * matrix, seen.peak / matrix
        assert got.shape[1] == h
    torch.testing.assert_close(call.mass(roles).sum(-1), torch.ones(1, h, n), atol=1e-4, rtol=0)


def test_the_meter_of_memory_sees_the_matrix() -> None:
    q = torch.randn(1, 2, 512, 8)
    with Allocations() as seen:
        Call(q, q, q).weights()
    assert seen.largest == 2 * 512 * 512 * 4
    assert seen.peak >= 2 * seen.largest


def test_too_large_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(1, 4, 1, 64, 64, 3, "none")
    call.site = "blocks.3.attn"
    monkeypatch.setattr(calls, "LIMIT_BYTES", 64 * 64 * 8)
    for ask in (call.weights, call.scores, lambda: call.weights(heads=[0, 1])):
        with Allocations() as seen, pytest.raises(WeightsTooLarge, match=r"blocks\.3\.attn would take .* MiB .* rows="):
            ask()
        assert seen.largest < 64 * 64
    # One head is within the limit, and no other head's scores are made for it.
    with Allocations() as seen:
        call.weights(heads=2)
    assert seen.largest <= 64 * 64 * 8
    call.weights(rows=[3])
    call.received()


def test_what_is_out_of_range_is_said() -> None:
    call = make(1, 2, 1, 5, 6, 3, "none")
    for ask, message in (
        (lambda: call.weights(rows=5), r"row 5 is outside 0\.\.4"),
        (lambda: call.weights(rows=[0, -6]), r"rows \[0, -6\] are outside 0\.\.4"),
        (lambda: call.weights(heads=2), r"row 2 is outside 0\.\.1|head"),
        (lambda: call.weights(rows="cls"), r"rows='cls'.*no names.*regard\.tokens"),
        (lambda: call.weights(rows=torch.ones(4, dtype=torch.bool)), r"must have 5 entries"),
        (lambda: call.mass(torch.ones(5, 1)), r"roles must have 6 rows.*\(5, 1\)"),
        (lambda: call.role_mass(), r"no names.*regard\.tokens"),
        (lambda: call.map(), r"no names.*regard\.tokens"),
        (lambda: call.weights_grad(), r"capture with grad=True and call backward"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    call.tokens_q = Tokens.parse("cls + image[2,2]")
    with pytest.raises(ValueError, match=r"role='imge' is not in cls \+ image\[2,2\]; did you mean 'image'"):
        call.weights(rows="imge")
    with pytest.raises(ValueError, match=r"image\[7:9\]' are none: image has 4 tokens"):
        call.weights(rows="image[7:9]")


def test_a_call_that_does_not_recompute_is_opaque_in_everything() -> None:
    call = make(1, 2, 1, 5, 6, 3, "none")
    call.site = "attn"
    call.mixed = call.mixed + 0.01
    call.out_grad = torch.zeros_like(call.mixed)
    for ask in (call.weights, call.scores, call.received, lambda: call.mass(torch.ones(6, 1)), call.weights_grad):
        with pytest.raises(OpaqueSite, match="attn is opaque: weights times values differ"):
            ask()
    call.mixed = torch.full_like(call.mixed, float("nan"))
    with pytest.raises(OpaqueSite):
        call.weights()


class Cached(nn.Module):
    """Writes its keys into a buffer that the next call overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.zeros(1, 2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.keys.copy_(x)
        return nn.functional.scaled_dot_product_attention(x, self.keys, self.keys)


def test_tensors_overwritten_after_the_call_are_noticed() -> None:
    model = Cached()
    with rg.capture(model) as cap:
        for _ in range(2):
            model(torch.randn(1, 2, 4, 3))
    first, last = cap.calls("")
    last.weights()
    with pytest.raises(OpaqueSite, match="overwritten in place"):
        first.weights()


def test_inference_mode_and_autocast() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    _, expected = model(x, x, x, average_attn_weights=False)
    with torch.inference_mode(), rg.capture(model) as cap:
        model(x, x, x, need_weights=False)
        weights = cap[""].weights()
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    # Asked for inside an autocast region, the weights are still made in single precision.
    x = torch.randn(1, 2, 16, 8).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), rg.capture(Plain()) as cap:
        cap.model(x)
        weights = cap[""].weights()
    exact = (x.double() @ x.double().transpose(-1, -2) / 8**0.5).softmax(-1)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact, atol=1e-6, rtol=0)
