"""What a layer must hold under torch's own machinery: devices, memory, checkpointing, compilation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils.checkpoint import checkpoint

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract
from regard.checks.samples import all_same, build, gradients, run, sample
from regard.nn.attention import Attention

_MEMORY: Any = torch.utils.deterministic


def _move(layer: nn.Module, device: str) -> None:
    """What ``Module.to`` does, for tensors without data."""
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = b.to(device)


@contract("layer")
def check_device_followed(method: Method) -> None:
    """Everything is made where x is: run on a stand-in for a GPU, which no machine needs to have."""
    try:
        with FakeTensorMode(allow_fallback_kernels=False):
            layer = method.create(**method.example).eval()
            _move(layer, "cuda")
            x, options = sample(method, layer, dtype=torch.float32)
            options = {name: v.to("cuda") if isinstance(v, Tensor) else v for name, v in options.items()}
            if method.tags.mask and "context" not in options and method.tags.input != "image":
                options["mask"] = torch.ones(x.shape[:2], dtype=torch.bool, device="cuda")
            out = layer(x.to("cuda"), **options)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise Skip(f"{error.func} needs the numbers themselves") from None
    assert out.device.type == "cuda", f"x on cuda, output on {out.device}"


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN, until the end of the block."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _MEMORY.fill_uninitialized_memory,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            _MEMORY.fill_uninitialized_memory = True
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            _MEMORY.fill_uninitialized_memory = before[2]


@contract("layer")
def check_uninitialised_memory_is_not_read(method: Method) -> None:
    """With ``torch.empty`` full of NaN, output and gradients are the same."""
    layer = build(method)
    x, options = sample(method, layer)
    expected = gradients(layer, x, options)
    with nan_filled_memory():
        got = gradients(build(method), x, options)
    all_same(got, expected, "NaN-filled memory", 1e-12)


@contract("layer")
def check_checkpointed(method: Method) -> None:
    """Under both kinds of activation checkpointing output and gradients are the same."""
    layer = build(method)
    x, options = sample(method, layer)
    expected = gradients(layer, x, options)

    def checkpointed(layer: nn.Module, x: Tensor, *, reentrant: bool, **options: Any) -> Tensor:
        return checkpoint(lambda x: run(layer, x, **options), x, use_reentrant=reentrant)

    for reentrant in (False, True):
        got = gradients(layer, x, options, partial(checkpointed, reentrant=reentrant))
        all_same(got, expected, f"checkpoint(use_reentrant={reentrant})", 1e-12)


@contract("layer")
def check_compiled(method: Method) -> None:
    """``torch.compile(backend="aot_eager", fullgraph=True)`` agrees in output and gradients."""
    if hasattr(Attention.forward, "__wrapped__"):
        raise Skip("shapes are being checked at run time, which does not fit into one graph")
    layer = build(method)
    x, options = sample(method, layer)
    expected = gradients(layer, x, options)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    all_same(gradients(layer, x, options, lambda _, x, **o: run(compiled, x, **o)), expected, "compiled", 1e-9)  # type: ignore[arg-type]
