"""What every model must hold, from its small example; the full size is only built on the meta device.

``forward`` takes ``image`` (b, image_channels, H, W), sides multiples of ``tags.multiple``; or ``x`` (b, n, input_dim), with a
``grid`` where it has such an argument. For any other model the record's ``inputs(batch, seed)`` gives the arguments.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract
from regard.checks.samples import build, finite, random, same, takes, tensors_in, whole
from regard.checks.traces import keeps_nothing

Sides = tuple[int, int]
IMAGE, GRID = (64, 96), (6, 4)
ODD_IMAGES, ODD_GRIDS = ((33, 70), (70, 33), (32, 97)), ((2, 6), (6, 2), (3, 5), (1, 7))


def inputs(
    method: Method,
    model: nn.Module,
    sides: Sides | None = None,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of one forward."""
    if method.inputs is not None:
        given = method.inputs(batch, seed)
        return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}
    if takes(model, "image"):
        h, w = (whole(method, side) for side in sides or IMAGE)
        return {"image": random((batch, method.example.get("image_channels", 3), h, w), dtype, seed)}
    if not takes(model, "x") or "input_dim" not in method.example:
        raise ValueError("forward takes neither image nor x of input_dim channels: the record needs inputs=")
    grid = sides or GRID
    x = {"x": random((batch, prod(grid), method.example["input_dim"]), dtype, seed)}
    return {**x, "grid": grid} if takes(model, "grid") else x


def outputs(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    """Every tensor that ``forward`` returns, under a fixed seed."""
    torch.manual_seed(0)
    out = model(**given)
    # A model of transformers or diffusers returns a class of its own, which is a mapping.
    found = list(tensors_in(dict(out) if hasattr(out, "keys") else out))
    assert found, f"forward returned {type(out).__name__} without a tensor, expected a tensor or a container of them"
    return found


def all_equal(got: list[Tensor], expected: list[Tensor], what: str, tolerance: float) -> None:
    assert len(got) == len(expected), f"{what}: {len(got)} tensors, expected {len(expected)}"
    for i, (a, b) in enumerate(zip(got, expected)):
        same(a, b, what if len(got) == 1 else f"{what}, tensor {i}", tolerance)


def _pull(found: list[Tensor], seed: int = 6) -> Tensor:
    """A random weighting of every floating-point output."""
    terms = [(t * random(tuple(t.shape), t.dtype, seed + i)).sum() for i, t in enumerate(found) if t.requires_grad]
    assert terms, "no output has a gradient"
    return torch.stack(terms).sum()


@contract("model")
def check_model_runs(method: Method) -> None:
    """Finite outputs for a batch of one and of two, in the dtype of the model; float32 gives what float64 gives."""
    model = build(method)
    for batch in (1, 2):
        found = outputs(model, inputs(method, model, batch=batch))
        assert found[0].shape[:1] == (batch,), f"first output {tuple(found[0].shape)} for a batch of {batch}"
    single = build(method, torch.float32)
    for exact, rounded in zip(found, outputs(single, inputs(method, single, dtype=torch.float32))):
        finite(exact, "output")
        if not exact.is_floating_point():
            continue
        assert exact.dtype == torch.float64, f"float64 in, {exact.dtype} out"
        assert rounded.dtype == torch.float32, f"float32 in, {rounded.dtype} out"
        # The median forgives a token that rounding sends elsewhere in a hard selection.
        gap = (rounded.double() - exact).abs().median() / exact.abs().median().clamp_min(1e-6)
        assert gap <= 1e-3, f"float32: median relative error {gap:.2g}, allowed 1e-3"


@contract("model")
def check_model_sizes_are_not_guessed(method: Method) -> None:
    """Images and grids that are odd and not square run, as far as ``tags.multiple`` lets them; both sides are read."""
    model = build(method)
    if method.inputs is not None:
        raise Skip("its inputs have one size")
    given = inputs(method, model)
    if "image" not in given and "grid" not in given:
        raise Skip("has neither images nor a grid")
    for sides in ODD_IMAGES if "image" in given else ODD_GRIDS:
        for out in outputs(model, inputs(method, model, sides)):
            finite(out, f"sides {sides}")
    if "grid" in given:
        h, w = GRID
        turned = outputs(model, {**given, "grid": (w, h)})
        assert not torch.allclose(turned[0], outputs(model, given)[0]), f"grids {(h, w)} and {(w, h)} give one result"


@contract("model", random=False)
def check_model_eval_is_deterministic(method: Method) -> None:
    """In ``eval`` a second call, after one with other inputs, agrees bit for bit, also when built with dropout."""
    model = build(method, dropout=0.5)
    given = inputs(method, model)
    first = list(tensors_in(model(**given)))
    model(**inputs(method, model, seed=9))
    all_equal(list(tensors_in(model(**given))), first, "second call", 0.0)


@contract("model", rows=True)
def check_model_rows_are_independent(method: Method) -> None:
    """Row 0 alone gives what it gives in a batch, and so it does beside another row."""
    model = build(method)
    given = inputs(method, model)
    other = inputs(method, model, seed=8)
    size = next(len(v) for v in given.values() if isinstance(v, Tensor))
    batched = {n for n, v in given.items() if isinstance(v, Tensor) and v.ndim and len(v) == size}
    beside = {n: torch.cat([v[:1], other[n][1:]]) if n in batched else v for n, v in given.items()}
    alone = {n: v[:1] if n in batched else v for n, v in given.items()}
    first = [t[:1] for t in outputs(model, given)]
    all_equal([t[:1] for t in outputs(model, beside)], first, "row 0 after row 1 was changed", 1e-9)
    if not method.tags.random:
        all_equal(outputs(model, alone), first, "row 0 alone", 1e-9)


@contract("model")
def check_model_parameters_have_gradients(method: Method) -> None:
    """Every parameter gets a gradient, finite and not only zeros, from three random inputs."""
    model = build(method)
    dead = {name for name, p in model.named_parameters() if p.requires_grad}
    for seed in (1, 2, 3):
        model.zero_grad(set_to_none=True)
        _pull(outputs(model, inputs(method, model, seed=seed)), seed).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                finite(p.grad, f"gradient of {name}")
                dead -= {name} if p.grad.any() else set()
    assert not dead, f"no gradient reaches {sorted(dead)}"


@contract("model")
def check_model_restored(method: Method) -> None:
    """A twin that loaded the state dict, a deep copy and an unpickled copy compute the same, bit for bit."""
    model, twin = build(method), build(method, seed=1)
    twin.load_state_dict(model.state_dict())
    given = inputs(method, model)
    expected = outputs(model, given)
    copies = {"state dict": twin, "deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    for how, other in copies.items():
        all_equal(outputs(other, given), expected, f"after {how}", 0.0)


@contract("model")
def check_model_leaves_nothing_behind(method: Method) -> None:
    """A call in ``eval`` leaves inputs, parameters and buffers alone, keeps nothing of its data or graph and no hook."""
    model = build(method)

    def call(seed: int) -> None:
        given = inputs(method, model, seed=seed)
        before = {n: v.clone() for n, v in given.items() if isinstance(v, Tensor)}
        outputs(model, given)
        for name, value in before.items():
            assert torch.equal(given[name], value), f"{name} was written to by forward"

    keeps_nothing(model, call)


@contract("model")
def check_model_full_size(method: Method) -> None:
    """With its defaults, and what has none from the example, it is built on the meta device without taking memory."""
    parameters = inspect.signature(method.target).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    with torch.device("meta"):
        model = method.create(**{name: value for name, value in method.example.items() if name in needed})
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == "meta", f"{name} was made on {tensor.device}, expected the device in force (meta)"
    full = sum(p.numel() for p in model.parameters())
    small = sum(p.numel() for p in method.create(**method.example).parameters())
    assert full >= small, f"the full size has {full} parameters, the example {small}"
