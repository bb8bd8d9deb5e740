"""What a check is and when it runs, and the checks for everything that can be built."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from regard.catalog.registry import Kind, Method, Tags
from regard.checks.samples import arguments_of
from regard.hosts.tiny import Hosted


class Skip(Exception):
    """Raised by a check that can say nothing about this method, with the reason."""


def hosted(build: Callable[..., Hosted], **options: Any) -> Hosted:
    """A tiny model of another library and its inputs; Skip where that is not installed."""
    try:
        return build(**options)
    except ModuleNotFoundError as error:
        raise Skip(f"{error.name} is not installed") from None


@dataclass(frozen=True)
class Check:
    """A function that raises AssertionError, and the conditions under which it applies."""

    run: Callable[[Method], None]
    kinds: tuple[Kind, ...]
    tags: dict[str, Any]
    argument: str | None
    naive: bool
    house: bool

    @property
    def name(self) -> str:
        return self.run.__name__.removeprefix("check_")

    def objection(self, method: Method) -> str | None:
        """Why the check does not apply to ``method``; None when it does."""
        if self.kinds and method.kind not in self.kinds:
            return f"is for {', '.join(self.kinds)}"
        for tag, wanted in self.tags.items():
            value = getattr(method.tags, tag)
            if value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                return f"tags.{tag} is {value!r}"
        if self.argument is not None and self.argument not in arguments_of(method.target):
            return f"has no argument {self.argument!r}"
        if self.naive and method.naive is None:
            return "has no naive reference"
        return None


CHECKS: dict[str, Check] = {}
_TAGS = {f.name for f in fields(Tags)}


def contract(
    *kinds: Kind, argument: str | None = None, naive: bool = False, house: bool = False, **tags: Any
) -> Callable[[Callable[[Method], None]], Callable[[Method], None]]:
    """Add the decorated ``check_xxx(method)`` to the list.

    Args:
        kinds: kinds of method it is for; none means all.
        argument: an argument that the method's constructor must have.
        naive: the record must have a naive reference.
        house: only for methods of this package.
        tags: values (or a tuple of values) that the record's tags must have.
    """
    if not tags.keys() <= _TAGS:
        raise ValueError(f"tags={sorted(tags.keys() - _TAGS)} are unknown; expected some of {sorted(_TAGS)}")

    def add(function: Callable[[Method], None]) -> Callable[[Method], None]:
        check = Check(function, kinds, tags, argument, naive, house)
        if check.name in CHECKS:
            raise ValueError(f"check {check.name!r} is defined twice")
        CHECKS[check.name] = check
        return function

    return add


def _made(method: Method, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return method.create(**method.example)


def _same_state(got: nn.Module, expected: nn.Module, what: str) -> None:
    a, b = got.state_dict(), expected.state_dict()
    assert a.keys() == b.keys(), f"{what}: keys differ: {sorted(a.keys() ^ b.keys())}"
    for name in b:
        assert torch.equal(a[name], b[name]), f"{what}: {name} differs"


@contract()
def check_constructs(method: Method) -> None:
    """The example builds an instance, and a second, separate one."""
    first, second = method.create(**method.example), method.create(**method.example)
    assert first is not None, "create returned None"
    if isinstance(first, nn.Module):
        shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
        assert not shared, f"two instances share {len(shared)} parameters"
    elif method.kind in ("layer", "model"):
        raise AssertionError(f"create returned {type(first).__name__}, expected a torch.nn.Module")


@contract("layer", "model", "objective")
def check_state_dict_round_trip(method: Method) -> None:
    """Saved to bytes, read as plain weights and loaded strictly into a differently seeded twin."""
    first, twin, file = _made(method), _made(method, seed=1), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    _same_state(twin, first, "state dict after loading")


@contract("layer", "model", "objective")
def check_copies(method: Method) -> None:
    """``copy.deepcopy`` and ``pickle`` give independent equals."""
    first = _made(method)
    for how, copied in (("deepcopy", copy.deepcopy(first)), ("pickle", pickle.loads(pickle.dumps(first)))):
        _same_state(copied, first, how)
        shared = {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in copied.parameters() if p.numel()}
        assert not shared, f"{how} shares the memory of {len(shared)} parameters"


@contract("layer", "model", "objective")
def check_meta_construction(method: Method) -> None:
    """Under ``torch.device("meta")`` no parameter or buffer takes memory."""
    with torch.device("meta"):
        module = method.create(**method.example)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert tensor.device.type == "meta", f"{name} was made on {tensor.device}, expected the device in force (meta)"
