"""What a watch leaves behind (nothing), threads, checkpointing, modules inside modules, modules that run twice."""

import itertools
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import regard as rg

H, D, L = 2, 4, 5
C = H * D


class Attend(nn.Module):
    """Self-attention, fused or by hand."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.fused = H, fused
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        out = sdpa(q, k, v) if self.fused else (q @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    def __init__(self, depth: int = 2, fused: bool = True, mode: str = "plain") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attend(fused) for _ in range(depth))
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            recomputed = self.mode != "plain" and torch.is_grad_enabled()
            x = x + (checkpoint(block, x, use_reentrant=self.mode == "reentrant") if recomputed else block(x))
        return x


def build(mode: str = "plain", fused: bool = True, depth: int = 2) -> tuple[Blocks, Tensor]:
    torch.manual_seed(0)
    model = Blocks(depth, fused, mode).double()
    return model, torch.randn(3, L, C, dtype=torch.float64, requires_grad=True)


def marks(model: nn.Module) -> list[object]:
    """Everything a watch could leave on a model."""
    return [
        (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks), type(module))
        for name, module in model.named_modules()
    ]


def stack() -> int:
    return torch._C._len_torch_function_stack()


def test_handles_may_be_undone_in_any_order() -> None:
    model, x = build()
    plain, before = model(x), marks(model)
    rg.sites(model, x)
    assert marks(model) == before
    edits = [
        rg.Edit.v(lambda v, call: 2 * v),
        rg.Edit.heads([0.0, 1.0]),
        rg.Edit.scale_keys(1, 0.5, renormalize=True),
    ]

    def opened() -> list:
        return [rg.edit(model, e, where="*" if i else "blocks.0") for i, e in enumerate(edits)] + [rg.capture(model)]

    alone = {}
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
        with torch.no_grad():
            handles = [rg.edit(model, edits[i], where="*" if i else "blocks.0") for i in chosen]
            alone[chosen] = model(x)
            for handle in handles:
                handle.undo()
    assert torch.equal(alone[()], plain)
    assert len({float(out.sum()) for out in alone.values()}) == 8
    for order in itertools.permutations(range(4)):
        handles, left = opened(), {0, 1, 2, 3}
        for i in order:
            handles[i].undo()
            handles[i].undo()  # A second time does nothing.
            left.discard(i)
            with torch.no_grad():
                assert torch.equal(model(x), alone[tuple(sorted(left - {3}))])
        assert marks(model) == before


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("probed", [True, False])
def test_nothing_is_left_after_an_exception(fused: bool, probed: bool) -> None:
    model, x = build(fused=fused)
    plain, before = model(x), marks(model)
    if probed:
        rg.sites(model, x)

    def fail(*args: object) -> Tensor:
        raise RuntimeError("on purpose")

    for edit in (rg.Edit.v(fail), rg.Edit.weights(fail), rg.Edit.out(fail), rg.Edit.mask(fail), rg.Edit.bias(fail)):
        with pytest.raises(RuntimeError, match="on purpose"), rg.edit(model, edit), rg.capture(model):
            model(x)
        assert marks(model) == before
        assert stack() == 0
    # Inside the host: its own hook before ours, its forward, and a caught failure while the watch goes on.
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        broken = getattr(model.blocks[1].proj, register)(fail)
        with pytest.raises(RuntimeError, match="on purpose"), rg.capture(model):
            model(x)
        broken.remove()
        early = getattr(model.blocks[1], register)(fail, prepend=True)
        with rg.capture(model) as cap, torch.no_grad():
            with pytest.raises(RuntimeError, match="on purpose"):
                model(x)
            assert stack() == 0
            early.remove()
            assert torch.equal(model(x), plain)
        assert len(cap.calls("blocks.0")) == 2
        assert marks(model) == before
    assert stack() == 0
    assert torch.equal(model(x), plain)


def test_a_hook_that_fails_before_ours_takes_no_other_mode_with_it() -> None:
    model, x = build()

    class Mine(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def fail(*args: object) -> None:
        raise RuntimeError("on purpose")

    handle = model.blocks[0].register_forward_pre_hook(fail)
    rg.sites(model.blocks[1], x)
    with Mine(), rg.capture(model, "blocks.0"):
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)
        assert stack() == 1
    handle.remove()


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["nothing", "v", "weights", "heads", "scale_keys", "mask"])
def test_gradients_under_activation_checkpointing(name: str, mode: str, fused: bool, probed: bool) -> None:
    edits = {
        "nothing": rg.Edit.out(lambda out, call: out),
        "v": rg.Edit.v(lambda v, call: v.sin()),
        "weights": rg.Edit.weights(lambda w, call: w**2),
        "heads": rg.Edit.heads([0.5, 2.0]),
        "scale_keys": rg.Edit.scale_keys([0, 3], 2.0),
        "mask": rg.Edit.mask(lambda b, h, q, kv: kv != 2),
    }
    results = []
    for how in ("plain", mode):
        model, x = build(how, fused)
        if probed:
            with torch.no_grad():
                rg.sites(model, x)
        with rg.edit(model, edits[name], where="blocks.1"), rg.capture(model, grad=True) as cap:
            out = model(x)
            out.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        maps = [(call.weights().detach(), call.weights_grad()) for _, call in cap.items()]
        assert [len(cap.calls(n)) for n in cap] == [1, 1]
        results.append([out.detach(), *gradients, *itertools.chain.from_iterable(maps)])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-12, rtol=0)
    if name != "nothing":
        model, x = build("plain", fused)
        assert not torch.allclose(model(x), results[0][0])


@pytest.mark.parametrize("mode", ["plain", "reentrant", "not reentrant"])
def test_a_module_that_runs_twice_keeps_its_gradients_apart(mode: str) -> None:
    class Twice(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            def both(x: Tensor) -> Tensor:
                return self.blocks[0](self.blocks[0](x).tanh())

            return both(x) if self.mode == "plain" else checkpoint(both, x, use_reentrant=self.mode == "reentrant")

    torch.manual_seed(0)
    model = Twice(1, True, mode).double()
    x = torch.randn(3, L, C, dtype=torch.float64, requires_grad=True)
    assert [s.calls for s in rg.sites(model, x)] == [2]
    with rg.capture(model, grad=True) as cap:
        model(x).square().sum().backward()
    first, second = cap.calls("blocks.0")
    with pytest.raises(KeyError, match="ran 2 times"):
        cap["blocks.0"]
    kept: list[Tensor] = []

    def keep(w: Tensor, call: object) -> Tensor:
        w = w * 1
        w.retain_grad()
        kept.append(w)
        return w

    model.mode = "plain"
    with rg.edit(model, rg.Edit.weights(keep)):
        model(x).square().sum().backward()
    for call, weights in zip((first, second), kept, strict=True):
        torch.testing.assert_close(call.weights_grad(), weights.grad, atol=1e-12, rtol=0)
    assert not torch.allclose(kept[0].grad, kept[1].grad)


@pytest.mark.parametrize("fused", [True, False])
def test_two_threads_on_one_model_do_not_mix(fused: bool) -> None:
    model, x = build(fused=fused)
    x = x.detach()
    rg.sites(model, x)
    edit = rg.Edit.v(lambda v, call: (meet(), -2 * v)[1])
    other = rg.Edit.heads([0.0, 3.0])
    barrier = threading.Barrier(3, timeout=30)

    def meet() -> None:
        barrier.wait()

    with torch.no_grad():
        plain = model(x)
        with rg.edit(model, rg.Edit.v(lambda v, call: -2 * v)):
            edited = model(x)
        with rg.edit(model, other):
            gated = model(x)
    results: dict[str, list[Tensor]] = {"edited": [], "gated": [], "plain": []}
    failures: list[BaseException] = []

    def work(name: str, edits: list[rg.Edit]) -> None:
        try:
            torch.set_num_threads(1)
            for _ in range(5):
                handles = [rg.edit(model, *edits), rg.capture(model)] if edits else []
                meet()  # All three watch, or not, at once, and meet again inside each site.
                with torch.no_grad():
                    results[name].append(model(x))
                if edits:
                    assert list(handles[1]) == ["blocks.0", "blocks.1"]
                    assert all(len(handles[1].calls(n)) == 1 for n in handles[1])
                meet()
                for handle in handles:
                    handle.undo()
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    class Meeting(nn.Module):
        """In the threads that do not edit v, the hosts' own code waits for the one that does."""

        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread().name != "edited":
                meet()
            return x

    for block in model.blocks:
        block.qkv = nn.Sequential(block.qkv, Meeting())
    threads = [
        threading.Thread(target=work, args=(name, edits), name=name)
        for name, edits in (("edited", [edit]), ("gated", [other]), ("plain", []))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for name, expected in (("edited", edited), ("gated", gated), ("plain", plain)):
        assert len(results[name]) == 5
        assert all(torch.equal(out, expected) for out in results[name])
    assert all("_regard_taps" not in m.__dict__ and not m._forward_hooks for m in model.modules())


class Nested(nn.Module):
    """Attention by hand whose values come from an attention inside it, with a product of its own between q k and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = H
        self.inner, self.bias = Attend(fused=False), Bias()
        self.qk = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        v = self.inner(x).unflatten(-1, (H, D)).transpose(1, 2)
        q, k = self.qk(x).unflatten(-1, (2, H, D)).permute(2, 0, 3, 1, 4)
        weights = (self.bias(q) + q @ k.transpose(-1, -2)).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Bias(nn.Module):
    """A position bias out of a matrix product as large as the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, D, L))

    def forward(self, q: Tensor) -> Tensor:
        return q @ self.table.expand(len(q), H, D, L)


def test_an_attention_inside_another_is_a_site_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Nested()).double()
    x = torch.randn(2, L, C, dtype=torch.float64)
    plain = model(x)
    with rg.capture(model) as unprobed:
        model(x)
    assert {n: len(unprobed.calls(n)) for n in unprobed} == {"0.inner": 1, "0": 1}
    found = rg.sites(model, x)
    assert [(s.name, s.verified, s.calls) for s in found] == [("0.inner", True, 1), ("0", True, 1)]
    with rg.capture(model) as cap:
        assert torch.equal(model(x), plain)
    assert {n: len(cap.calls(n)) for n in cap} == {"0.inner": 1, "0": 1}
    for name in cap:
        torch.testing.assert_close(cap[name].weights(), unprobed[name].weights(), atol=0, rtol=0)
    # An edit of the outer queries reaches the outer product q k, not the inner one and not the bias.
    layer = model[0]
    q, k = layer.qk(x).unflatten(-1, (2, H, D)).permute(2, 0, 3, 1, 4)
    v = layer.inner(x).unflatten(-1, (H, D)).transpose(1, 2)
    expected = (layer.bias(q) - q @ k.transpose(-1, -2)).softmax(-1) @ v
    with rg.edit(model, rg.Edit.q(lambda q, call: -q), where="0"):
        torch.testing.assert_close(model(x), expected.transpose(1, 2).flatten(2), atol=1e-12, rtol=0)


def test_a_kind_is_respected_in_a_model_never_probed() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(C, H, 8, dropout=0.0, batch_first=True).double()
    x, memory = torch.randn(2, L, C, dtype=torch.float64), torch.randn(2, 3, C, dtype=torch.float64)
    edit = rg.Edit.v(lambda v, call: -v)
    outputs = []
    for _ in range(2):  # before and after the probe
        with rg.edit(model, edit, where="cross"), rg.capture(model, "cross") as cap:
            outputs.append(model(x, memory))
        assert list(cap) == ["multihead_attn"]
        rg.sites(model, x, memory)
    assert torch.equal(*outputs)
    with rg.edit(model, edit, where="multihead_attn"):
        assert torch.equal(model(x, memory), outputs[0])
    assert not torch.equal(model(x, memory), outputs[0])


def test_a_shared_module_is_one_site() -> None:
    torch.manual_seed(0)
    block = Attend()
    model = nn.Sequential(block, nn.ReLU(), block)
    x = torch.randn(1, L, C)
    assert [(s.name, s.calls) for s in rg.sites(model, x)] == [("0", 2)]
    with rg.capture(model, "0") as cap:
        model(x)
    assert len(cap.calls("0")) == 2


def test_memory_of_the_forward_is_let_go() -> None:
    import weakref

    model, x = build(fused=False)
    x = x.detach()
    rg.sites(model, x)
    seen: list[weakref.ref] = []

    def keep(scores: Tensor, *grid: Tensor) -> Tensor:
        seen.append(weakref.ref(scores))
        return scores * 1

    handle = rg.edit(model, rg.Edit.scores(keep))
    with torch.no_grad():
        model(x)
    assert len(seen) == 2
    assert all(ref() is None for ref in seen)
    handle.undo()
