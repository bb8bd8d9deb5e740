"""Edits and captures in code compiled as one graph beside the eager ones; run by ``test_compiled.py`` in a process of its own.

The checks of shapes that the test suite switches on are runtime decorators, which compiled code cannot look through.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import regard as rg
from regard.nn import Attention

B, L, H, D = 2, 5, 2, 4
C = H * D
MASK = torch.rand(L, L, generator=torch.Generator().manual_seed(1)) < 0.6
MASK[:, 0] = True

EDITS = {
    "q": rg.Edit.q(lambda q, call: q.sin() + 1),
    "k": rg.Edit.k(lambda k, call: 2 * k),
    "v": rg.Edit.v(lambda v, call: v.sin()),
    "kv": rg.Edit.kv(lambda k, v, call: (k.roll(1, 2), 2 * v)),
    "share": rg.Edit.share({0: 1}),
    "scale_keys": rg.Edit.scale_keys([1, 2], 3.0),
    "scale_keys, renormalised": rg.Edit.scale_keys([1, 2], 3.0, renormalize=True),
    "scale_keys by name": rg.Edit.scale_keys("text[1:3]", 3.0),
    "mask": rg.Edit.mask(MASK),
    "mask, a function": rg.Edit.mask(lambda b, h, q, kv: (q + kv + h) % 3 > 0),
    "bias": rg.Edit.bias(torch.linspace(-1, 1, L)),
    "scores": rg.Edit.scores(lambda score, b, h, q, kv: score.tanh() - (q - kv).abs()),
    "weights": rg.Edit.weights(lambda w, call: w**2),
    "heads": rg.Edit.heads([0.5, 2.0]),
    "out": rg.Edit.out(lambda out, call: out.cos()),
    "one head, half strength": rg.Edit.v(lambda v, call: -v, only=[1], strength=0.5),
}


# How an edit acts does not depend on the host: one host gets all of them, the others one of each way to
# act on a call, one of these at two sites.
WAYS = ("kv", "scale_keys, renormalised", "mask, a function", "weights", "one head, half strength")


class Attend(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = H, fused
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        out = sdpa(q, k, v) if self.fused else (q @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


HOSTS = {
    "fused": lambda: Attend(True),
    "written": lambda: Attend(False),
    "multihead": MultiHead,
    "own": lambda: Attention(C, H),
}


def build(host: str, layers: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(layers) for part in (HOSTS[host](), nn.ReLU()))).double()
    x = torch.randn(B, L, C, dtype=torch.float64)
    rg.sites(model, x)
    rg.tokens(model, q=f"cls + text[{L - 1}]")
    return model, x


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0, msg=lambda text: f"{what}: {text}")


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss.square().sum(), list(model.parameters())))


def check(host: str) -> None:
    whole = host == "fused"
    layers = 2 if host == "own" else 1
    # What becomes of the graph does not depend on the host either: for one, derivatives are compiled with it.
    backend = "aot_eager" if whole else "eager"
    model, x = build(host, layers)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain = compiled(x)  # Compiled before anybody watches: an edit that comes later is seen all the same.
    assert torch.equal(plain, compiled(x))
    close(plain, model(x), host)
    for name in EDITS if whole else WAYS:
        what, edit = f"{host}, {name}", EDITS[name]
        if name == "kv" and host == "written":
            continue
        with rg.edit(model, edit):
            eager = model(x)
            eager_grads = gradients(eager, model)
        with rg.edit(model, edit):
            seen = compiled(x)
            for ours, theirs in zip(gradients(seen, model), eager_grads, strict=True):
                close(ours, theirs, what)
            assert torch.equal(compiled(x), seen), what
        close(seen, eager, what)
        assert not torch.allclose(seen, plain, atol=1e-6), what
        assert torch.equal(compiled(x), plain), what
    # A capture inside compiled code, alone and around an edit.
    around = ((), (EDITS["v"], EDITS["mask"]), (EDITS["weights"],), (EDITS["scale_keys"],))
    for edits in around if whole else around[:2]:
        handles = [rg.edit(model, *edits)] if edits else []
        with rg.capture(model) as eager_cap:
            model(x)
        with rg.capture(model) as cap:
            compiled(x)
        assert list(cap) == list(eager_cap)
        for name, call in cap.items():
            close(call.weights(), eager_cap[name].weights(), f"{host}, captured {name}")
            close(call.received(), eager_cap[name].received(), f"{host}, received {name}")
            assert torch.equal(call.step.index * torch.ones(1), torch.zeros(1))
        for handle in handles:
            handle.undo()
        assert torch.equal(compiled(x), plain)
    # A watch that was there first.
    torch.compiler.reset()
    model, x = build(host, layers)
    with rg.edit(model, EDITS["v"]):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        edited = compiled(x)
        close(edited, model(x), host)
    close(compiled(x), model(x), host)
    assert not torch.allclose(compiled(x), edited, atol=1e-6)
    # Steps are counted by the eager model only; that is said.
    try:
        with rg.edit(model, EDITS["v"], steps=slice(0, 1)):
            compiled(x)
    except Exception as error:
        if "a compiled graph does not" not in str(error):
            raise
    else:
        raise AssertionError(f"{host}: steps= in compiled code was not refused")
    torch.compiler.reset()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for host in sys.argv[1:] or HOSTS:
        check(host)
        print(f"{host}: as eager")
