"""Replacing: one of this library's layers in the place of a host's own, weights carried over where they fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from regard.catalog import registry
from regard.core.host import host_of
from regard.core.known import knowledge, names

Projection = tuple[Tensor, Tensor | None]


@dataclass
class Projections:
    """The linear maps of an attention module: rows of q, k, v are grouped by head; ``out`` None: the host projects later."""

    dim: int
    num_heads: int
    num_kv_heads: int
    q: Projection
    k: Projection
    v: Projection
    out: Projection | None
    causal: bool = False


@dataclass
class Plan:
    """How a host's module is replaced: its projections, the grid of its tokens, and its calling convention."""

    projections: Projections
    wrap: Callable[[nn.Module], nn.Module]
    grid: tuple[int, ...] | None = None
    prefix: int = 0


@dataclass
class Swap:
    """Layers in the place of a host's; ``undo`` puts the very modules back. ``carried[name]`` lists the weights taken over."""

    model: nn.Module
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    carried: dict[str, list[str]] = field(default_factory=dict)

    def put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)
        facts = knowledge(self.model)
        facts.sites, facts.refused = {}, {}

    def undo(self) -> None:
        """Put back what stood there; a second call does nothing."""
        while self.replaced:
            name, module = self.replaced.popitem()
            self.put(name, module)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def carry(layer: nn.Module, plan: Projections) -> list[str]:
    """Copy the projections into ``layer`` where it has a linear map of that name and shape; returns their names."""
    done = []
    stacked = _stack(plan.q, plan.k, plan.v)
    for name, source in (
        ("q", plan.q),
        ("k", plan.k),
        ("v", plan.v),
        ("qkv", stacked),
        ("out", plan.out),
        ("proj", plan.out),
    ):
        linear = getattr(layer, name, None)
        if name in ("k", "v") and getattr(layer, "num_kv_heads", plan.num_kv_heads) != plan.num_kv_heads:
            continue
        if source is None or not isinstance(linear, nn.Linear) or linear.weight.shape != source[0].shape:
            continue
        if source[1] is not None and linear.bias is None:
            continue
        with torch.no_grad():
            linear.weight.copy_(source[0])
            if linear.bias is not None:
                linear.bias.zero_() if source[1] is None else linear.bias.copy_(source[1])
        done.append(name)
    if plan.out is None and isinstance(getattr(layer, "out", None), nn.Linear):
        layer.out = nn.Identity()
        done.append("out (the host's own)")
    return done


def _stack(*parts: Projection) -> Projection:
    biases = [b for _, b in parts if b is not None]
    return torch.cat([w for w, _ in parts]), torch.cat(biases) if len(biases) == len(parts) else None


def swap(model: nn.Module, where: str | Sequence[str], layer: str | Callable[..., nn.Module], **arguments: Any) -> Swap:
    """Put ``layer`` in the place of every site that ``where`` names; a handle and a context manager.

    Args:
        layer: registry name, or a class or function that takes ``dim`` and ``num_heads``.
        arguments: passed on to the layer.

    Raises:
        ValueError: no such site or layer (with the nearest names), a site whose weights cannot be read, a layer that needs a
            grid where the tokens have none. Nothing is replaced then.
    """
    if isinstance(layer, str):
        record = registry.get(layer)
        if record.kind != "layer":
            raise ValueError(f"layer={layer!r} is a {record.kind}, not a layer")
        build: Callable[..., nn.Module] = record.target
        needs_grid = record.tags.input != "tokens"
    else:
        build, needs_grid = layer, False
    sites = [n for n in names(model, where) if n]
    if not knowledge(model).sites:
        sites = [n for n in sites if host_of(model.get_submodule(n)).plan(model, n) is not None]
        if not sites:
            raise ValueError(
                f"where={where!r}: none of these modules is attention whose projections can be read; call regard.sites"
            )
    handle = Swap(model)
    ready: list[tuple[str, nn.Module]] = []
    for name in sites:
        module = model.get_submodule(name)
        plan = host_of(module).plan(model, name)
        if plan is None:
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be replaced: its projections to q, k and v, or what it is called "
                "with, cannot be read; edit it instead, or replace the module that holds it"
            )
        if needs_grid and (plan.grid is None or plan.prefix):
            what = f"{plan.prefix} class or register tokens" if plan.prefix else "no grid"
            raise ValueError(f"{layer!r} works on a grid of tokens, but {name} has {what}")
        made = _build(build, plan.projections, arguments)
        handle.carried[name] = carry(made, plan.projections)
        handle.layers[name] = made
        source = plan.projections.q[0]
        made.to(device=source.device, dtype=source.dtype).train(module.training)
        ready.append((name, plan.wrap(made)))
    for name, module in ready:
        handle.replaced[name] = model.get_submodule(name)
        handle.put(name, module)
    return handle


def _build(build: Callable[..., nn.Module], plan: Projections, arguments: dict[str, Any]) -> nn.Module:
    accepted = inspect.signature(build).parameters
    facts: dict[str, Any] = {"num_heads": plan.num_heads}
    if plan.num_kv_heads != plan.num_heads:
        facts["num_kv_heads"] = plan.num_kv_heads
    if plan.causal:
        facts["causal"] = True
    if plan.q[0].shape[0] != plan.dim:
        facts["head_dim"] = plan.q[0].shape[0] // plan.num_heads
    known = {n: v for n, v in facts.items() if n in accepted and n not in arguments}
    made = build(plan.dim, **known, **arguments)
    if plan.causal and not getattr(made, "causal", False):
        raise ValueError(f"{build.__name__} cannot be causal, or was told not to be, but the place it is put in is")
    return made
