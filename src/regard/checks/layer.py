"""What every layer must hold: values, gradients, independence of rows, state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import contract
from regard.checks.samples import (
    Size,
    all_same,
    arguments,
    arguments_of,
    build,
    finite,
    gradients,
    random,
    run,
    same,
    sample,
    sizes,
    usual,
    whole,
    width,
)
from regard.checks.traces import keeps_nothing


@contract("layer", naive=True)
def check_equals_naive(method: Method) -> None:
    """Values and all gradients are those of the naive reference: at every awkward size, and at a usual one masked, causal
    and with grouped heads."""
    known = arguments_of(method.target)
    _compare(method, build(method), sizes(method), {})
    if method.tags.causal and "causal" in known:
        _compare(method, build(method, causal=True), [usual(method)], {})
    if method.tags.grouped and "num_kv_heads" in known:
        _compare(method, build(method, num_heads=4, num_kv_heads=2), [usual(method)], {})
    if method.tags.mask and method.naive is not None and "mask" in arguments_of(method.naive):
        layer = build(method)
        x, options = sample(method, layer)
        mask = random(tuple(options.get("context", x).shape[:2]), seed=5) > -0.5
        mask[:, 0] = True
        _compare(method, layer, [usual(method)], {"mask": mask})


def _compare(method: Method, layer: nn.Module, wanted: list[Size], extra: dict[str, Any]) -> None:
    for size in wanted:
        # Naive references are slow: one row is enough where it is long.
        x, options = sample(method, layer, size, batch=1 if size == wanted[-1] and len(wanted) > 1 else 2)
        fast = gradients(layer, x, options | extra)
        slow = gradients(layer, x, options | extra, lambda *a, **k: _seeded(method.naive, *a, **k))
        all_same(fast, slow, f"size {size} {sorted(extra) or ''}", 1e-8)


def _seeded(naive: Any, *args: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return naive(*args, **options)


@contract("layer")
def check_output_shape(method: Method) -> None:
    """Lengths 1, 2, 17, 63, or grids of such sides; a layer that can be swapped in keeps the shape of x."""
    layer = build(method, torch.float32)
    for size in sizes(method):
        for batch in (1, 2):
            x, options = sample(method, layer, size, batch=batch, dtype=torch.float32)
            out = run(layer, x, **options)
            finite(out, f"size {size}, batch {batch}")
            if method.tags.swap:
                assert out.shape == x.shape, f"size {size}: shape {tuple(out.shape)}, expected {tuple(x.shape)}"
            assert out.shape[0] == batch, f"size {size}: first axis {out.shape[0]}, expected the batch of {batch}"


@contract("layer")
def check_restored(method: Method) -> None:
    """A twin that loaded the state dict, a deep copy and an unpickled copy compute the same, bit for bit."""
    layer, twin = build(method), build(method, seed=1)
    twin.load_state_dict(layer.state_dict())
    x, options = sample(method, layer)
    expected = run(layer, x, **options)
    copies = {"state dict": twin, "deepcopy": copy.deepcopy(layer), "pickle": pickle.loads(pickle.dumps(layer))}
    for how, other in copies.items():
        same(run(other, x, **options), expected, f"after {how}", 0.0)


@contract("layer", random=False)
def check_eval_is_deterministic(method: Method) -> None:
    """In ``eval`` two calls agree bit for bit, also when the layer was built with dropout."""
    layer = build(method, dropout=0.5)
    x, options = sample(method, layer)
    first = layer(x, **options)
    layer(sample(method, layer, seed=9)[0], **options)
    same(layer(x, **options), first, "second call", 0.0)


@contract("layer", argument="dropout", random=False)
def check_dropout_only_in_training(method: Method) -> None:
    """Dropout changes nothing in ``eval`` and something in ``train``."""
    dropped, plain = build(method, dropout=0.5), build(method, dropout=0.0)
    plain.load_state_dict(dropped.state_dict())
    x, options = sample(method, dropped)
    same(run(dropped, x, **options), run(plain, x, **options), "dropout=0.5 in eval against dropout=0", 1e-12)
    dropped.train()
    assert not torch.equal(dropped(x, **options), dropped(x, **options)), "dropout=0.5 does nothing in training"


@contract("layer")
def check_dtype_followed(method: Method) -> None:
    """float64, float32 and bfloat16 in give the same dtype out, and nearly the same numbers."""
    layer = build(method)
    x, options = sample(method, layer)
    exact = run(layer, x, **options)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        x, options = sample(method, layer, dtype=dtype)
        out = run(build(method, dtype), x, **options)
        assert out.dtype == dtype, f"{dtype} in, {out.dtype} out"
        finite(out, str(dtype))
        # The median forgives a token that rounding sends elsewhere in a hard selection.
        gap = (out.double() - exact).abs().median() / exact.abs().median().clamp_min(1e-6)
        assert gap <= allowed, f"{dtype}: median relative error {gap:.2g}, allowed {allowed}"


@contract("layer")
def check_inputs_not_changed(method: Method) -> None:
    """x, context and mask are the same after forward and backward, in ``train`` and ``eval``."""
    for training in (False, True):
        layer = build(method).train(training)
        x, options = sample(method, layer)
        if method.tags.mask:
            options["mask"] = torch.ones(x.shape[0], x.shape[1], dtype=torch.bool)
            options["mask"][0, -1] = False
        given = {"x": x} | {name: v for name, v in options.items() if isinstance(v, Tensor)}
        before = {name: (v.clone(), v._version) for name, v in given.items()}
        run(layer, x, **options).sum().backward()
        for name, v in given.items():
            old, version = before[name]
            kept = torch.equal(v, old) and v._version == version
            assert kept, f"{name} was written to by forward"


@contract("layer")
def check_gradcheck(method: Method) -> None:
    """In float64 the gradients of x and of every parameter are those of central differences along random directions."""
    layer, step = build(method), 1e-6
    size = whole(method, 3) if method.tags.input == "tokens" else (whole(method, 2), whole(method, 3))
    x, options = sample(method, layer, size, batch=1)
    found = gradients(layer, x, options)
    pull = random(tuple(found["output"].shape), seed=7)
    leaves = {"x": x} | {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    for name, leaf in leaves.items():
        start = leaf.clone()
        for seed in (1, 2):
            direction, values = random(tuple(leaf.shape), seed=seed), []
            for sign in (1, -1):
                leaf.copy_(start + sign * step * direction)
                values.append((run(layer, x, **options) * pull).sum())
            leaf.copy_(start)
            slope = (values[0] - values[1]) / (2 * step)
            exact = (found[f"gradient of {name}"] * direction).sum()
            gap = (slope - exact).abs().item()
            assert gap <= 1e-5 * max(1.0, exact.abs().item()), (
                f"gradient of {name}: {exact:.8g} along a random direction, finite differences say {slope:.8g}"
            )


@contract("layer")
def check_parameters_have_gradients(method: Method) -> None:
    """Every parameter gets a gradient, and not only zeros, from three random inputs.

    A key bias in front of a softmax has none in theory; rounding lets it pass.
    """
    layer = build(method)
    dead = {name for name, p in layer.named_parameters() if p.requires_grad}
    missing = set(dead)
    for seed in (1, 2, 3):
        x, options = sample(method, layer, sizes(method)[-1], seed=seed)
        layer.zero_grad(set_to_none=True)
        out = run(layer, x, **options)
        (out * random(tuple(out.shape), out.dtype, seed)).sum().backward()
        missing -= {name for name, p in layer.named_parameters() if p.grad is not None}
        dead -= {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert not missing, f"no gradient (None) for {sorted(missing)}"
    assert not dead, f"gradient is zero everywhere for {sorted(dead)}"


@contract("layer", rows=True)
def check_rows_are_independent(method: Method) -> None:
    """Changing row 0 leaves the other rows alone, and each row alone gives what it gives in a batch."""
    layer = build(method)
    x, options = sample(method, layer, batch=3)
    out = run(layer, x, **options)
    changed = torch.cat([random(tuple(x[:1].shape), seed=8) * 3, x[1:]])
    same(run(layer, changed, **options)[1:], out[1:], "rows 1 and 2 after row 0 was changed", 1e-10)
    if not method.tags.random:
        for i in range(3):
            alone = {name: v[i : i + 1] if isinstance(v, Tensor) else v for name, v in options.items()}
            same(run(layer, x[i : i + 1], **alone), out[i : i + 1], f"row {i} alone", 1e-10)


@contract("layer", equivariant=True, input="tokens")
def check_permutation_equivariant(method: Method) -> None:
    """Permuting the tokens permutes the outputs."""
    layer = build(method, causal=False)
    x, options = sample(method, layer, whole(method, 17))
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
    same(run(layer, x[:, order], **options), run(layer, x, **options)[:, order], "permuted tokens", 1e-10)


@contract("layer")
def check_nothing_left_behind(method: Method) -> None:
    """A call in ``eval`` leaves parameters and buffers alone, keeps nothing of its data or graph and no hook."""
    layer = build(method)

    def call(seed: int) -> None:
        x, options = sample(method, layer, seed=seed)
        run(layer, x.requires_grad_(), **options)

    keeps_nothing(layer, call)


@contract("layer", argument="num_heads")
def check_odd_head_count(method: Method) -> None:
    """A head count that does not divide ``dim`` is refused at construction, or else no channel is dropped silently."""
    heads = next(k for k in range(2, width(method) + 2) if width(method) % k)
    given = arguments(method, num_heads=heads) | ({"num_kv_heads": 1} if "num_kv_heads" in method.example else {})
    given.pop("head_dim", None)
    try:
        layer = method.create(**given)
    except ValueError:
        return
    layer = layer.double().eval()
    x, options = sample(method, layer)
    x.requires_grad_()
    out = run(layer, x, **options)
    (out * random(tuple(out.shape), seed=4)).sum().backward()
    for name, p in layer.named_parameters():
        rows = p.grad.flatten(1).abs().amax(1) if p.ndim > 1 and p.grad is not None else torch.ones(1)
        idle = int((rows == 0).sum())
        assert not idle, f"num_heads={heads}, dim={width(method)} was taken, but {idle} rows of {name} are never used"
