"""The contract of controllers, on healthy stand-ins and on broken ones."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import regard as rg
from regard.checks.contract import CHECKS

pytest.importorskip("diffusers")


class Boosts:
    """Two words get more weight, in the first two steps."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def edits(self, site: Any, step: Any) -> Any:
        if step.index < 2 and site.kind in ("cross", "joint"):
            yield rg.Edit.scale_keys("text[1:3]", self.factor(), renormalize=True, strength=self.strength)

    def factor(self) -> float:
        return 3.0


class Refuses(Boosts):
    def edits(self, site: Any, step: Any) -> Any:
        if site.kind == "joint":
            raise ValueError(f"{site.name}: this controller is for cross-attention")
        yield from super().edits(site, step)


class RefusesSilently(Boosts):
    def edits(self, site: Any, step: Any) -> Any:
        if site.kind == "joint":
            raise ValueError
        yield from super().edits(site, step)


class OnlyCross(Boosts):
    def edits(self, site: Any, step: Any) -> Any:
        if site.kind == "cross":
            yield from super().edits(site, step)


class EagerAtZero(Boosts):
    """At strength 0 the weights stay, but are no longer those of the fused kernel in the last digit."""

    def edits(self, site: Any, step: Any) -> Any:
        yield rg.Edit.weights(lambda weights, call: weights)


class NeverOff:
    def __init__(self, force: float = 1.0) -> None: ...

    def edits(self, site: Any, step: Any) -> Any:
        yield from Boosts().edits(site, step)


class WritesInAnotherStep(Boosts):
    def edits(self, site: Any, step: Any) -> Any:
        if step.index == 3:
            site.call.v.mul_(1.1)
        yield from super().edits(site, step)


class WritesAtAnotherSite(Boosts):
    def edits(self, site: Any, step: Any) -> Any:
        if site.kind == "self" and step.index == 0:
            site.call.v.mul_(1.1)
        yield from super().edits(site, step)


class Never(Boosts):
    def edits(self, site: Any, step: Any) -> Any:
        return []


class CountsCalls(Boosts):
    """Another factor in every call, those of a recomputation included."""

    calls = 0

    def factor(self) -> float:
        self.calls += 1
        return 1.0 + self.calls


class Handle:
    """A controller's own handle, on a hook of its own."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hook = model.mid_block.register_forward_hook(lambda module, args, out: 1.1 * out)

    def undo(self) -> None:
        self.hook.remove()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> Any:
        self.undo()


class Leaves(Handle):
    def undo(self) -> None: ...


class Keeps(Handle):
    def undo(self) -> None:
        super().undo()
        self.model.mid_block.factor = 1.1


class UndoneOnce(Handle):
    def undo(self) -> None:
        self.hook.remove()
        del self.hook


class Swallows(Handle):
    def __exit__(self, *error: Any) -> Any:
        self.undo()
        return True


class LeavesOnFailure(Handle):
    def __exit__(self, *error: Any) -> Any:
        if error[0] is None:
            self.undo()


def _with(handle: type[Handle]) -> Any:
    class Attached:
        def __init__(self, strength: float = 1.0) -> None: ...

        def attach(self, model: nn.Module) -> Handle:
            return handle(model)

    Attached.__name__ = handle.__name__
    return Attached


BROKEN: list[tuple[Any, str, str]] = [
    (EagerAtZero, "strength_zero_is_the_identity", "step 0 with {'strength': 0.0}"),
    (NeverOff, "strength_zero_is_the_identity", "tags.off must say"),
    (WritesInAnotherStep, "other_steps_and_sites_are_left_alone", "output of step 3"),
    (WritesAtAnotherSite, "other_steps_and_sites_are_left_alone", "before any edit"),
    (Never, "other_steps_and_sites_are_left_alone", "edits nothing"),
    (Never, "controller_is_undone", "changes nothing"),
    (_with(Leaves), "controller_is_undone", "after undo, changed: ['mid_block: hooks"),
    (_with(Keeps), "controller_is_undone", "after undo, changed: ['mid_block: attributes"),
    (_with(UndoneOnce), "controller_is_undone", "AttributeError"),
    (_with(Swallows), "controller_is_undone", "swallowed"),
    (_with(LeavesOnFailure), "controller_is_undone", "after a model that failed"),
    (CountsCalls, "gradients_under_checkpointing", "under checkpointing"),
    (OnlyCross, "joint_attention", "neither refused nor does anything"),
    (RefusesSilently, "joint_attention", "refused without a reason"),
]


def test_healthy_one_passes() -> None:
    report = rg.check(Boosts, kind="controller")
    report.raise_for_failures()
    own = {name for name, c in CHECKS.items() if c.kinds == ("controller",)}
    assert own <= {r.check for r in report if r.outcome == "passed"}


def test_refusing_joint_attention_is_fine() -> None:
    assert rg.check(Refuses, kind="controller", only="joint_attention").ok


def test_what_is_attached_as_a_whole_says_nothing_of_sites() -> None:
    (result,) = rg.check(_with(Handle), kind="controller", only="other_steps_and_sites_are_left_alone")
    assert result.outcome == "skipped"
    assert rg.check(_with(Handle), kind="controller", only="controller_is_undone").ok


@pytest.mark.parametrize(("target", "check", "says"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_broken_ones_are_rejected(target: Any, check: str, says: str) -> None:
    (result,) = rg.check(target, kind="controller", only=check)
    assert result.outcome == "failed", result
    assert says in result.reason


def test_every_check_rejects_something() -> None:
    own = {name for name, c in CHECKS.items() if c.kinds == ("controller",)}
    assert {check for _, check, _ in BROKEN} == own
