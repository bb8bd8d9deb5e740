"""What layers on token sequences must hold: the past, masks, grouped heads, caches, contexts, scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract
from regard.checks.samples import build, finite, gradients, random, run, same, sample, whole, width
from regard.nn.attention import Attention


def _key_mask(batch: int, n: int) -> Tensor:
    """(b, n), different in each row, with a hole in the middle and something left."""
    mask = random((batch, n), seed=5) > -0.2
    mask[:, n // 2] = False
    mask[:, 0] = True
    return mask


@contract("layer", causal=True, input="tokens")
def check_no_look_into_the_future(method: Method) -> None:
    """No output depends on a later token, by gradient and by value (a hard selection leaks without a gradient)."""
    layer = build(method, causal=True)
    n = whole(method, 17)
    x, options = sample(method, layer, n)
    x.requires_grad_()
    out = run(layer, x, **options)
    reached = 0
    for t in sorted({0, 1, 2, n // 2, n - 2}):
        pull = (out[:, t] * random(tuple(out[:, t].shape), seed=t)).sum()
        (grad,) = torch.autograd.grad(pull, x, retain_graph=True)
        reached += int(grad[:, : t + 1].any())
        assert not grad[:, t + 1 :].any(), f"output {t} has a gradient from a token after it"
        changed = torch.cat([x[:, : t + 1], random((2, n - t - 1, x.shape[2]), seed=8) * 3], 1).detach()
        same(
            run(layer, changed, **options)[:, : t + 1],
            out[:, : t + 1],
            f"outputs up to {t}, later tokens changed",
            1e-10,
        )
    assert reached, "no output depends on any token"


@contract("layer", mask=True, input=("tokens", "grid"))
def check_masked_keys_have_no_influence(method: Method) -> None:
    """What stands at masked tokens changes no other output and gets no gradient; a mask that allows all is no mask."""
    layer = build(method, causal=False)
    x, options = sample(method, layer, whole(method, 17) if method.tags.input == "tokens" else None)
    mask = _key_mask(*x.shape[:2])
    if "context" in options:
        raise Skip("the mask is about the context, see masked_context_has_no_influence")
    x.requires_grad_()
    out = run(layer, x, mask=mask, **options)
    # What does not come out token by token must not depend on masked tokens anywhere.
    seen = mask if method.tags.swap else torch.ones(out.shape[:2], dtype=torch.bool)
    changed = torch.where(mask[..., None], x, random(tuple(x.shape), seed=8) * 5)
    same(run(layer, changed, mask=mask, **options)[seen], out[seen], "visible tokens, masked ones changed", 1e-10)
    (grad,) = torch.autograd.grad((out[seen] * random(tuple(out[seen].shape), seed=6)).sum(), x)
    assert not grad[~mask].any(), f"masked tokens get a gradient of up to {grad[~mask].abs().max():.3g}"
    plain = run(layer, x, **options)
    same(run(layer, x, mask=torch.ones_like(mask), **options), plain, "mask that allows everything", 1e-10)
    assert not torch.allclose(plain[seen], out[seen]), "the mask changes nothing"


@contract("layer", mask=True, input="tokens")
def check_padding_changes_nothing(method: Method) -> None:
    """A sequence padded at its end, with the padding masked, gives what the bare sequence gives."""
    layer = build(method)
    x, options = sample(method, layer, whole(method, 7))
    if "context" in options:
        raise Skip("the mask is about the context, see masked_context_has_no_influence")
    n, longer = x.shape[1], whole(method, x.shape[1] + 4)
    padded = torch.cat([x, random((2, longer - n, x.shape[2]), seed=8) * 5], 1)
    mask = (torch.arange(longer) < n).expand(2, -1)
    same(run(layer, padded, mask=mask, **options)[:, :n], run(layer, x, **options), "padded sequence", 1e-10)


@contract("layer", mask=True, input=("tokens", "grid"))
def check_fully_masked_rows(method: Method) -> None:
    """Rows that may look nowhere are finite in output and gradients, read no other token, leave other rows alone."""
    for causal in sorted({False, method.tags.causal}):
        layer = build(method, causal=causal)
        x, options = sample(method, layer)
        if "context" in options:
            raise Skip("the mask is about the context, see masked_context_has_no_influence")
        mask = torch.ones(*x.shape[:2], dtype=torch.bool)
        full = run(layer, x, mask=mask, **options)
        mask[0] = False
        found = gradients(layer, x, options | {"mask": mask})
        for name, value in found.items():
            finite(value, f"row without visible keys, {name}")
        same(found["output"][1], full[1], "the other row", 1e-10)
        changed = torch.cat([x[:, :1], random(tuple(x[:, 1:].shape), seed=8) * 5], 1)
        changed[1] = x[1]
        got = run(layer, changed, mask=mask, **options)
        same(got[0, 0], found["output"][0, 0], "token 0, which may look nowhere, after the others changed", 1e-10)
        if isinstance(layer, Attention) and type(layer).forward is Attention.forward:
            out, heads = found["output"][:1], layer.project(x, x)
            nothing = heads[0].new_zeros(*heads[0].shape[:3], heads[2].shape[-1])[:1]
            same(out, layer.merge(nothing), "output where nothing is seen, against merge(0)", 1e-12)
            assert not found["gradient of x"][0].any(), "x gets a gradient from a row that sees nothing"


@contract("layer", mask=True)
def check_mask_forms(method: Method) -> None:
    """(b, s), (b, n, s) and (b, 1, n, s) mean the same; a mask that is not boolean is refused."""
    layer = build(method, causal=False)
    x, options = sample(method, layer)
    if not isinstance(layer, Attention) or "context" in options:
        raise Skip("only an Attention subclass promises all forms of a mask")
    mask = _key_mask(*x.shape[:2])
    expected = run(layer, x, mask=mask, **options)
    wide = mask[:, None].expand(-1, x.shape[1], -1)
    same(run(layer, x, mask=wide, **options), expected, "mask (b, n, s)", 1e-10)
    same(run(layer, x, mask=wide[:, None], **options), expected, "mask (b, 1, n, s)", 1e-10)
    try:
        run(layer, x, mask=mask.double(), **options)
    except Exception:
        return
    raise AssertionError("a float mask was taken without a word")


@contract("layer", cross=True)
def check_context_is_read(method: Method) -> None:
    """A context of another length sets the output, row by row; the number of outputs stays that of x."""
    layer = build(method, causal=False)
    x, options = sample(method, layer)
    context = random((2, whole(method, 11), method.example.get("context_dim", width(method))), seed=3)
    options["context"] = context.clone().requires_grad_()
    out = run(layer, x, **options)
    finite(out, "output with a context")
    if method.tags.swap:
        assert out.shape == x.shape, f"shape {tuple(out.shape)}, expected that of x, {tuple(x.shape)}"
    (out * random(tuple(out.shape), seed=6)).sum().backward()
    grad = options["context"].grad
    reached = grad is not None and bool(grad.any())
    assert reached, "context gets no gradient"
    options["context"] = torch.cat([context[:1] + 1.0 + random(tuple(context[:1].shape), seed=4), context[1:]])
    changed = run(layer, x, **options)
    assert not torch.allclose(changed[0], out[0]), "another context gives the same output"
    same(changed[1], out[1], "row 1 after the context of row 0 changed", 1e-10)


@contract("layer", cross=True, mask=True)
def check_masked_context_has_no_influence(method: Method) -> None:
    """With a context, ``mask`` (b, s) is about the context's tokens."""
    layer = build(method, causal=False)
    x, options = sample(method, layer)
    context = random((2, whole(method, 11), method.example.get("context_dim", width(method))), seed=3)
    mask = _key_mask(*context.shape[:2])
    out = run(layer, x, **{**options, "context": context, "mask": mask})
    changed = torch.where(mask[..., None], context, 5.0)
    got = run(layer, x, **{**options, "context": changed, "mask": mask})
    same(got, out, "output after masked context changed", 1e-10)


@contract("layer", grouped=True, argument="num_kv_heads")
def check_grouped_heads_are_repeated_heads(method: Method) -> None:
    """Two key heads serve four query heads as four key heads do that are copies in the order 0, 0, 1, 1."""
    grouped = build(method, num_heads=4, num_kv_heads=2)
    full = build(method, num_heads=4, num_kv_heads=4)
    state = full.state_dict()
    for name, value in grouped.state_dict().items():
        if value.shape != state[name].shape:
            axes = [a for a in range(value.ndim) if value.shape[a] != state[name].shape[a]]
            if len(axes) != 1 or 2 * value.shape[axes[0]] != state[name].shape[axes[0]] or value.shape[axes[0]] % 2:
                raise Skip(f"{name} does not hold the key heads one after the other")
            value = value.unflatten(axes[0], (2, -1)).repeat_interleave(2, axes[0]).flatten(axes[0], axes[0] + 1)
        state[name] = value
    full.load_state_dict(state)
    x, options = sample(method, grouped)
    same(run(grouped, x, **options), run(full, x, **options), "2 key heads against their copies", 1e-10)


@contract("layer", cache=True, input="tokens")
def check_cached_equals_uncached(method: Method) -> None:
    """Fed token by token or in uneven chunks, with a cache, the layer says what it says at once."""
    layer = build(method, causal=True)
    x, options = sample(method, layer, 13)
    expected = run(layer, x, **options)
    for chunks in ([1] * 13, [5, 1, 4, 3], [1, 12], [13]):
        cache = layer.new_cache(x.shape[0], 16, dtype=x.dtype)
        got = torch.cat([run(layer, part, cache=cache, **options) for part in x.split(chunks, 1)], 1)
        same(got, expected, f"cached in chunks of {chunks}", 1e-10)


def _plain(layer: nn.Module, *stages: str) -> Attention:
    """The layer if it is fused attention with the base's own ``stages``; else Skip."""
    own = [name for name in stages if getattr(type(layer), name, None) is not getattr(Attention, name)]
    if not isinstance(layer, Attention) or not layer.fused or own:
        raise Skip("not plain fused attention; its naive reference is the judge")
    return layer


@contract("layer")
def check_softmax_reference(method: Method) -> None:
    """Plain fused attention is softmax(q k / sqrt(head_dim)) v, query by query, of what ``project`` returns."""
    for wishes in ({}, {"causal": True}, {"num_heads": 4, "num_kv_heads": 2}):
        wishes = wishes if method.tags.causal or "causal" not in wishes else {}
        layer = _plain(build(method, **wishes), "forward", "attend", "seam")
        x, options = sample(method, layer)
        q, k, v = layer.project(x, options.get("context", x))
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        share = q.shape[1] // k.shape[1]
        for b, h, i in torch.cartesian_prod(*(torch.arange(s) for s in q.shape[:3])).tolist():
            seen = i + 1 if layer.causal else k.shape[2]
            keys, values = k[b, h // share, :seen], v[b, h // share, :seen]
            out[b, h, i] = torch.softmax(keys @ q[b, h, i] / q.shape[-1] ** 0.5, 0) @ values
        same(run(layer, x, **options), layer.merge(out), f"against softmax(q k / sqrt({q.shape[-1]})) v", 1e-10)


@contract("layer")
def check_heads_do_not_leak(method: Method) -> None:
    """The keys and values of the last head reach its own query heads and no other."""
    layer = _plain(build(method, num_heads=4, num_kv_heads=2), "forward")
    x, options = sample(method, layer)
    q, k, v = layer.project(x, options.get("context", x))
    out = layer.attend(q, k, v, None)
    k, v = k.clone(), v.clone()
    k[:, -1], v[:, -1] = k[:, -1] * 2, v[:, -1] + 1
    changed: Any = layer.attend(q, k, v, None) - out
    share = q.shape[1] // k.shape[1]
    leaked = changed[:, :-share].abs().max() if q.shape[1] > share else torch.zeros(())
    assert leaked == 0, f"heads that do not read key head {k.shape[1] - 1} changed by {leaked:.3g}"
    assert changed[:, -share:].any(), f"heads {-share} and later do not read key head {k.shape[1] - 1}"
