"""What layers must hold inside a model: sites that are read truthfully, and a place in somebody else's network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract, hosted
from regard.checks.samples import build, descends, random, run, same, sample, stir, usual, width
from regard.checks.traces import traces, unchanged
from regard.core.call import Call
from regard.core.capture import Capture, capture
from regard.core.edit import Edit, edit
from regard.core.site import sites
from regard.core.swap import swap
from regard.hosts.tiny import tiny_vit
from regard.nn.attention import Attention


class _Block(nn.Module):
    """A model that is one attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attn = layer

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.attn(x, **options)


@contract("layer")
def check_sites_verified(method: Method) -> None:
    """``regard.sites`` finds a softmax layer and verifies it truthfully, refuses with a reason, or finds no site.

    Reading changes nothing, to the bit. Where a site is verified, weights times values can stand for its output, and what
    the layer returns depends on it. An Attention that keeps the base's ``attend`` and ``mix`` must be verified.
    """
    layer = build(method)
    host = _Block(layer).eval()
    x, options = sample(method, layer)
    plain, before = run(host, x, **options), traces(host)
    found = sites(host, x, **options)
    with capture(host) as cap:
        watched = run(host, x, **options)
    same(watched, plain, "output while it is read", 0.0)
    same(run(host, x, **options), plain, "output after it was read", 0.0)
    unchanged(before, traces(host), "reading")
    for site in found.refused:
        assert site.reason, f"{site.name} was refused without a reason"
    verified = [site.name for site in found.verified]
    if isinstance(layer, Attention):
        base = all(getattr(type(layer), n) is getattr(Attention, n) for n in ("attend", "mix"))
        assert "attn" in verified or not base, f"an Attention was not verified as a site; found: {list(found)}"
        if "attn" in verified:
            _whole(layer, cap, x, plain)
    for name in verified:
        with edit(host, Edit.out(_again), where=name):
            same(run(host, x, **options), plain, f"{name}: weights times values for its output", 1e-8)
        with edit(host, Edit.out(lambda out, call: torch.zeros_like(out)), where=name):
            ignored = torch.allclose(run(host, x, **options), plain)
        assert not ignored, f"{name} was verified, but what the layer returns does not depend on it"


def _whole(layer: Attention, cap: Capture, x: Tensor, plain: Tensor) -> None:
    """The one call is all of the layer's attention, not a part of it that is merged with others later."""
    calls = cap.calls("attn")
    shapes = [tuple(call.q.shape[:3]) for call in calls]
    wanted = (x.shape[0], layer.num_heads, x.shape[1])
    assert shapes == [wanted], f"verified by calls with queries {shapes}, expected one with {wanted} (b, heads, n)"
    if type(layer).forward is Attention.forward:
        same(layer.merge(_again(calls[0].out, calls[0])), plain, "weights times values, merged", 1e-8)


def _again(out: Tensor, call: Call) -> Tensor:
    return (call.weights() @ call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)).to(out.dtype)


@contract("layer", input=("tokens", "grid"), swap=True)
def check_swap_trains(method: Method) -> None:
    """Swapped into timm's ViT on a grid that is not square it trains, and is taken out again to the bit."""
    layer = build(method)
    if "context" in sample(method, layer)[1]:
        raise Skip("needs a context, which the place of self-attention does not have")
    size = usual(method)
    grid = (3, 5) if isinstance(size, int) else size
    model, inputs = hosted(tiny_vit, dim=width(method), num_heads=method.example.get("num_heads", 4), grid=grid)
    model, x = model.double(), inputs["x"].double()
    own, plain = model.get_submodule("blocks.0.attn"), model(x)
    rest = {name: value for name, value in method.example.items() if name not in ("dim", "num_heads")}
    handle = swap(model, "blocks.0.attn", method.target, **rest)
    assert not torch.equal(run(model, x), plain), "swapped in, it computes what stood there before"
    handle.undo()
    handle.undo()
    assert model.get_submodule("blocks.0.attn") is own, "undo put back another module"
    same(model(x), plain, "output after undo", 0.0)

    with swap(model, "blocks.0.attn", method.target, **rest) as handle:
        layer = stir(handle.layers["blocks.0.attn"])
        model.train()
        dead = {name for name, _ in model.named_parameters()}
        for seed in (1, 2, 3):
            model.zero_grad(set_to_none=True)
            _loss(model, random(tuple(x.shape), seed=seed)).backward()
            dead -= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert not dead, f"no gradient reaches {sorted(dead)}"
        model.zero_grad(set_to_none=True)
        descends(lambda: _loss(model, x), list(layer.parameters()))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(run(model, x), torch.arange(len(x)))
