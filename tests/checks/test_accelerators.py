"""The contract of accelerators, on healthy stand-ins and on broken ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard as rg
from regard.checks.contract import CHECKS
from regard.hosts.tiny import IMAGE_ID

pytest.importorskip("transformers")


class TopKeys:
    """Every query of the decoder keeps the keys with the largest scores, a share of those that it may see."""

    def __init__(self, keep: float = 0.5) -> None:
        self.keep = keep

    def edits(self, site: Any, step: Any) -> Any:
        if self.keep < 1 and "language_model" in site.name:
            yield rg.Edit.bias(self.chosen)

    def chosen(self, call: Any) -> Tensor:
        scores = self.scores(call)
        rank = scores.argsort(-1, descending=True).argsort(-1)
        return torch.zeros_like(scores).masked_fill(rank >= self.count(scores), float("-inf"))

    def scores(self, call: Any) -> Tensor:
        return call.scores()

    def count(self, scores: Tensor) -> Tensor:
        visible = (scores > torch.finfo(torch.float32).min / 2).sum(-1, keepdim=True)
        return (self.keep * visible).ceil().clamp(min=1)


class Hiding:
    """The handle of :class:`HidesImage`."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.keep, self.hidden = keep, torch.zeros(0)
        self.hook = model.register_forward_pre_hook(self.see, with_kwargs=True)
        self.watch = rg.edit(model, rg.Edit.mask(self.allow), where="model.language_model.layers.*.self_attn")

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            image = kwargs["input_ids"] == IMAGE_ID
            self.hidden = image & (image.cumsum(1) > round(self.keep * int(image[0].sum())))

    def allow(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        end = self.hidden.shape[1]
        return (kv >= end) | ~self.hidden[b, kv.clamp(max=end - 1)]

    def undo(self) -> None:
        self.hook.remove()
        self.watch.undo()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> Any:
        self.undo()


class Nothing(Hiding):
    """The handle of everything kept."""

    def __init__(self, model: nn.Module, keep: float) -> None: ...

    def undo(self) -> None: ...


class HidesImage:
    """The last image tokens of each prompt are hidden from every layer of the decoder."""

    handle: type[Hiding] = Hiding

    def __init__(self, keep: float = 0.5) -> None:
        self.keep = keep

    def attach(self, model: nn.Module) -> Hiding:
        return Nothing(model, 1.0) if self.keep == 1 else self.handle(model, self.keep)


class NeverWhole(HidesImage):
    def attach(self, model: nn.Module) -> Hiding:
        return Hiding(model, 0.95 * self.keep)


class EagerWhenWhole(TopKeys):
    """Asks for nothing, but has the matrix made."""

    def edits(self, site: Any, step: Any) -> Any:
        if self.keep == 1:
            yield rg.Edit.weights(lambda weights, call: weights)


class KeepsTheOthers(HidesImage):
    def attach(self, model: nn.Module) -> Hiding:
        return Hiding(model, 1 - self.keep)


class RepeatsKeys(TopKeys):
    """Ranks by the keys of the wrong heads."""

    def scores(self, call: Any) -> Tensor:
        groups = call.q.shape[1] // call.k.shape[1]
        wrong = call.q @ call.k.repeat(1, groups, 1, 1).mT
        return wrong.masked_fill(call.scores() == float("-inf"), float("-inf"))


class CountsPadding(TopKeys):
    """A share of all keys that there are."""

    def count(self, scores: Tensor) -> Tensor:
        return torch.full_like(scores[..., :1], self.keep * scores.shape[-1]).ceil()


class FirstRowForAll(Hiding):
    """Hides in every prompt what the first one has there."""

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().see(module, args, kwargs)
        self.hidden = self.hidden[:1].expand(len(kwargs["input_ids"]), -1)


class Remembers(Hiding):
    """Chooses once and for all prompts."""

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.hidden.numel():
            super().see(module, args, kwargs)


class Idle(HidesImage):
    def attach(self, model: nn.Module) -> Hiding:
        return Nothing(model, 1.0)


class LeavesHook(Hiding):
    def undo(self) -> None:
        self.watch.undo()


class LeavesAttribute(Hiding):
    def undo(self) -> None:
        self.watch.model.pruned = True
        super().undo()


class UndoneOnce(Hiding):
    def undo(self) -> None:
        del self.hidden
        super().undo()


class Swallows(Hiding):
    def __exit__(self, *error: Any) -> Any:
        self.undo()
        return True


class LeavesOnFailure(Hiding):
    def __exit__(self, *error: Any) -> Any:
        if error[0] is None:
            self.undo()


class Alternates(Hiding):
    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        AlternatesImage.forwards += 1
        super().see(module, args, kwargs)
        if AlternatesImage.forwards % 2:
            self.hidden = torch.zeros_like(self.hidden)


class AlternatesImage(HidesImage):
    handle, forwards = Alternates, 0


class UndoesOthers(Hiding):
    """Takes away what stands on attention, whosever it is."""

    def undo(self) -> None:
        super().undo()
        for layer in self.watch.model.model.language_model.layers:
            vars(layer.self_attn).pop("_regard_taps", None)
            layer.self_attn._forward_pre_hooks.clear()
            layer.self_attn._forward_hooks.clear()


def _with(handle: type[Hiding]) -> Any:
    return type(handle.__name__, (HidesImage,), {"handle": handle})


BROKEN: list[tuple[Any, str, str]] = [
    (NeverWhole, "full_budget_is_the_identity", "logits with {'keep': 1.0}"),
    (EagerWhenWhole, "full_budget_is_the_identity", "logits with {'keep': 1.0}"),
    (KeepsTheOthers, "keeps_what_it_says", "0.25: (21, 21)"),
    (RepeatsKeys, "works_with_grouped_heads", "2 key heads against their copies"),
    (CountsPadding, "works_with_left_padding", "the padded prompt"),
    (_with(FirstRowForAll), "works_with_left_padding", "the unpadded prompt"),
    (_with(Remembers), "runs_in_generate", "second prompt"),
    (Idle, "accelerator_is_undone", "changes nothing"),
    (_with(LeavesHook), "accelerator_is_undone", "after undo, changed: [': hooks"),
    (_with(LeavesAttribute), "accelerator_is_undone", "after undo, changed: [': attributes"),
    (_with(UndoneOnce), "accelerator_is_undone", "AttributeError"),
    (_with(Swallows), "accelerator_is_undone", "swallowed"),
    (_with(LeavesOnFailure), "accelerator_is_undone", "after a model that failed"),
    (AlternatesImage, "composes_with_a_capture", "with a capture inside"),
    (_with(UndoesOthers), "composes_with_a_capture", "took away the capture"),
]


@pytest.mark.parametrize("target", [TopKeys, HidesImage])
def test_healthy_ones_pass(target: Any) -> None:
    report = rg.check(target, kind="accelerator")
    report.raise_for_failures()
    own = {name for name, c in CHECKS.items() if c.kinds == ("accelerator",)}
    assert own <= {r.check for r in report if r.outcome == "passed"}


@pytest.mark.parametrize(("target", "check", "says"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_broken_ones_are_rejected(target: Any, check: str, says: str) -> None:
    (result,) = rg.check(target, kind="accelerator", only=check)
    assert result.outcome == "failed", result
    assert says in result.reason


def test_every_check_rejects_something() -> None:
    own = {name for name, c in CHECKS.items() if c.kinds == ("accelerator",)}
    assert {check for _, check, _ in BROKEN} == own


def test_an_accelerator_without_keep_must_say_how_it_is_turned_off() -> None:
    class Rounds(TopKeys):
        def __init__(self, tokens: float = 0.5) -> None:
            super().__init__(tokens)

    (result,) = rg.check(Rounds, kind="accelerator", only="full_budget_is_the_identity")
    assert "no argument 'keep'" in result.reason
    tags = rg.Tags(off={"tokens": 1.0})
    assert rg.check(Rounds, kind="accelerator", tags=tags, only="full_budget_is_the_identity").ok


def test_a_library_that_is_missing_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (result,) = rg.check(TopKeys, kind="accelerator", only="runs_in_generate")
    assert (result.outcome, result.reason) == ("skipped", "transformers is not installed")
