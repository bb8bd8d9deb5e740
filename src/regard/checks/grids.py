"""What layers on images must hold: shapes that are told, never guessed, and inputs that are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import contract
from regard.checks.samples import build, finite, random, run, sample, takes, whole, width


@contract("layer", input=("grid", "image"))
def check_sides_are_not_guessed(method: Method) -> None:
    """Grids (2, 6), (3, 4), (1, 7), (5, 3) run, times ``tags.multiple``; no side is a root of the token count."""
    layer, m = build(method), method.tags.multiple
    for h, w in ((2, 6), (6, 2), (3, 4), (1, 7), (5, 3)):
        x, options = sample(method, layer, (h * m, w * m), batch=1)
        out = run(layer, x, **options)
        finite(out, f"grid {(h * m, w * m)}")
        if method.tags.swap:
            assert out.shape == x.shape, f"grid {(h * m, w * m)}: shape {tuple(out.shape)}, expected {tuple(x.shape)}"


@contract("layer", input="grid")
def check_grid_is_read(method: Method) -> None:
    """The same tokens on a long and on a square grid of equal size give different results."""
    layer, side = build(method), whole(method, 4)
    x, options = sample(method, layer, (side, 4 * side), batch=1)
    long = run(layer, x, **options)
    square = run(layer, x, **{**options, "grid": (2 * side, 2 * side)})
    assert not torch.allclose(long, square), f"grids {(side, 4 * side)} and {(2 * side, 2 * side)} give one result"


def wrong_inputs(method: Method, layer: nn.Module) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Calls that make no sense, by what is wrong with them."""
    x, options = sample(method, layer)
    found = {"x without a batch axis": (x[0], options), "x with an axis too many": (x[None], options)}
    if method.tags.input == "grid":
        h, w = options["grid"]
        found[f"grid={(h, w + method.tags.multiple)} for {h * w} tokens"] = (
            x,
            {**options, "grid": (h, w + method.tags.multiple)},
        )
        found["grid=None"] = (x, {**options, "grid": None})
    return found


@contract("layer")
def check_wrong_input_is_refused(method: Method) -> None:
    """A wrong rank of x, a wrong or missing grid raise an exception."""
    layer = build(method)
    for what, (x, options) in wrong_inputs(method, layer).items():
        try:
            run(layer, x, **options)
        except Exception:
            continue
        raise AssertionError(f"{what} was taken without a word")


@contract("layer", input=("tokens", "grid"))
def check_nothing_is_ignored(method: Method) -> None:
    """A mask, context or cache that ``forward`` has an argument for is used or refused, whatever the tags say."""
    layer = build(method)
    x, options = sample(method, layer)
    mask = torch.ones(x.shape[0], x.shape[1], dtype=torch.bool)
    mask[:, -1] = False
    context = random((x.shape[0], x.shape[1], method.example.get("context_dim", width(method))), seed=3)
    plain = run(layer, x, **options)
    for name, value in {"mask": mask, "context": context, "cache": object()}.items():
        if name in options or not takes(layer, name):
            continue
        try:
            out = run(layer, x, **{**options, name: value})
        except Exception:
            continue
        # The object given as a cache has nothing to read or write: who does not stumble did not look at it.
        ignored = name == "cache" or torch.equal(out, plain)
        assert not ignored, f"{name} was given and ignored"
