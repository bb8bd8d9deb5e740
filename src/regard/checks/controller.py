"""What every controller must hold, on a tiny UNet and on a tiny transformer of joint attention.

They run as a guided pipeline runs them: four steps over two prompts of 77 tokens, the unconditional half of the four rows
first. The example in the record must fit that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract, hosted
from regard.checks.samples import arguments, finite, off, random, same
from regard.checks.traces import survives_failure, traces, unchanged
from regard.core.apply import SiteView, apply
from regard.core.capture import capture
from regard.core.edit import Edit
from regard.core.site import sites
from regard.core.step import Step
from regard.hosts.tiny import Hosted, as_double, tiny_joint, tiny_unet

STEPS = 4


def _made(method: Method, **wishes: Any) -> Any:
    torch.manual_seed(0)
    return method.create(**arguments(method, **wishes))


def _sampled(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the model gives in each step, from the same latents, so that a step depends on no step before it."""
    with torch.no_grad():
        return [model(**inputs, return_dict=False)[0] for _ in range(STEPS)]


def _unet() -> Hosted:
    model, inputs = as_double(hosted(tiny_unet))
    sites(model, run=lambda: model(**inputs))
    return model, inputs


class _Noted:
    """The controller, with a note of where and when it edits."""

    def __init__(self, controller: Any) -> None:
        if not hasattr(controller, "edits"):
            raise Skip("is attached as a whole and does not say which sites and steps it edits")
        self.controller = controller
        self.edited: list[tuple[int, str]] = []
        if hasattr(controller, "seen"):
            self.seen = controller.seen

    def edits(self, site: SiteView, step: Step) -> Iterable[Edit]:
        found = [e for e in self.controller.edits(site, step) if e.applies(step.branch)]
        if found:
            self.edited.append((step.index, site.name))
        return found


def _outs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What the model and what every site gives, step by step; sites in the order in which they run."""
    outputs, found = [], []
    for _ in range(STEPS):
        with capture(model) as cap, torch.no_grad():
            outputs.append(model(**inputs, return_dict=False)[0])
        found.append({call.site: call.out for call in cap.sequence()})
    return outputs, found


@contract("controller")
def check_strength_zero_is_the_identity(method: Method) -> None:
    """Turned off, it changes no step, bit for bit."""
    model, inputs = hosted(tiny_unet)
    plain = _sampled(model, inputs)
    with apply(model, _made(method, **off(method))):
        for step, (got, expected) in enumerate(zip(_sampled(model, inputs), plain)):
            same(got, expected, f"step {step} with {off(method)}", 0.0)


@contract("controller")
def check_other_steps_and_sites_are_left_alone(method: Method) -> None:
    """A step without edits is bitwise what it was, and so is every site that runs before the first edited one."""
    model, inputs = _unet()
    outputs, plain = _outs(model, inputs)
    noted = _Noted(_made(method))
    with apply(model, noted):
        got_outputs, got = _outs(model, inputs)
    assert noted.edited, f"{method.example} edits nothing in {STEPS} steps"
    order = list(plain[0])
    for step in range(STEPS):
        edited = [order.index(site) for at, site in noted.edited if at == step]
        if not edited:
            same(got_outputs[step], outputs[step], f"output of step {step}, in which nothing is edited", 0.0)
        for site in order[: min(edited, default=len(order))]:
            same(got[step][site], plain[step][site], f"step {step}, {site}, before any edit", 0.0)


@contract("controller")
def check_controller_is_undone(method: Method) -> None:
    """It does something, and nothing of it is left: after ``undo``, twice; after the block; after a model that failed."""
    model, inputs = hosted(tiny_unet)
    plain, before = _sampled(model, inputs), traces(model)
    handle = apply(model, _made(method))
    got = _sampled(model, inputs)
    for out in got:
        finite(out, "output of the UNet")
    assert any(not torch.equal(a, b) for a, b in zip(got, plain)), f"{method.example} changes nothing in {STEPS} steps"
    handle.undo()
    handle.undo()
    unchanged(before, traces(model), "undo")
    for out in _sampled(model, inputs):
        same(out, plain[0], "output after undo", 0.0)

    def visit() -> None:
        with apply(model, _made(method)):
            _sampled(model, inputs)

    visit()
    unchanged(before, traces(model), "a block")
    same(_sampled(model, inputs)[0], plain[0], "output after the block", 0.0)
    survives_failure(model, "mid_block.attentions.0.transformer_blocks.0.ff", visit)


@contract("controller")
def check_gradients_under_checkpointing(method: Method) -> None:
    """In the first step that it changes, gradients of latents and text are the same under activation checkpointing."""
    model, inputs = _unet()
    plain = _sampled(model, inputs)
    with apply(model, _made(method)):
        changed = [i for i, out in enumerate(_sampled(model, inputs)) if not torch.equal(out, plain[i])]
    assert changed, f"{method.example} changes nothing in {STEPS} steps"
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("sample", "encoder_hidden_states")}
        with apply(model, _made(method)):
            for _ in range(changed[0]):
                with torch.no_grad():
                    model(**inputs)
            out = model(**{**inputs, **leaves}, return_dict=False)[0]
            (out * random(tuple(out.shape), seed=7)).sum().backward()
        found.append({"output": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()})
    for name, value in found[0].items():
        assert value is not None, f"no gradient reaches {name}"
        same(found[1][name], value, f"{name} under checkpointing", 1e-9)


@contract("controller")
def check_joint_attention(method: Method) -> None:
    """On a host of joint attention it works, or is refused with a ValueError and leaves nothing behind."""
    model, inputs = as_double(hosted(tiny_joint))
    sites(model, run=lambda: model(**inputs))
    plain, before = _sampled(model, inputs), traces(model)
    try:
        with apply(model, _made(method)):
            got = _sampled(model, inputs)
    except ValueError as error:
        if not str(error):
            raise AssertionError("refused without a reason") from error
    else:
        for out in got:
            finite(out, "output of the joint host")
        assert any(not torch.equal(a, b) for a, b in zip(got, plain)), "neither refused nor does anything"
    unchanged(before, traces(model), "joint attention")
    same(_sampled(model, inputs)[0], plain[0], "output afterwards", 0.0)
