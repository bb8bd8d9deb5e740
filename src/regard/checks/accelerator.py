"""What every accelerator must hold, on a tiny vision-language model with grouped heads.

It has ``attach(model)`` or ``edits(site, step)``, and an argument ``keep``: the share of the image tokens, or of all
tokens, that stay; 1 changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import contract, hosted
from regard.checks.samples import arguments, finite, off, same
from regard.checks.traces import survives_failure, traces, unchanged
from regard.core.apply import apply
from regard.core.capture import capture
from regard.core.slices import tolerance
from regard.hosts.tiny import IMAGE_ID, as_double, tiny_vlm

DECODER = "model.language_model.layers.*.self_attn"
NEW = 4


def _at_work(method: Method, model: nn.Module, **wishes: Any) -> Any:
    torch.manual_seed(0)
    return apply(model, method.create(**arguments(method, **wishes)))


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _written(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (b, NEW, vocabulary) of the tokens that ``generate`` writes."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True}
    return torch.stack(model.generate(**inputs, **options, return_dict_in_generate=True).logits, 1)


def _prompt(inputs: dict[str, Tensor], row: int, padding: int = 0) -> dict[str, Tensor]:
    """One row of a batch, with ``padding`` masked tokens before it."""
    ids, mask = (nn.functional.pad(inputs[n][row : row + 1], (padding, 0)) for n in ("input_ids", "attention_mask"))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"][row : row + 1]}


@contract("accelerator")
def check_full_budget_is_the_identity(method: Method) -> None:
    """With everything kept, a forward and ``generate`` are what they are without it, bit for bit."""
    model, inputs = hosted(tiny_vlm)
    plain, written = _logits(model, inputs), _written(model, inputs)
    with _at_work(method, model, **off(method)):
        same(_logits(model, inputs), plain, f"logits with {off(method)}", 0.0)
        same(_written(model, inputs), written, f"logits in generate with {off(method)}", 0.0)


@contract("accelerator", argument="keep")
def check_keeps_what_it_says(method: Method) -> None:
    """The last query of some decoder layer sees a share ``keep`` of the image tokens and all text, or of all tokens."""
    model, inputs = as_double(hosted(tiny_vlm))
    total, image = inputs["input_ids"].shape[1], int((inputs["input_ids"][0] == IMAGE_ID).sum())
    seen = {}
    for keep in (0.25, 0.5, 0.75):
        with _at_work(method, model, keep=keep), capture(model, DECODER) as cap, torch.no_grad():
            model(**inputs)
        counts = [(call.weights(rows=-1) > 0).sum(-1) for _, call in cap.items()]
        fewest = min(counts, key=lambda count: count.double().mean().item())
        seen[keep] = (int(fewest.min()), int(fewest.max()))
    readings = (
        {keep: total - image + keep * image for keep in seen},
        {keep: keep * total for keep in seen},
    )
    fits = [all(abs(n - said[keep]) <= 1 for keep in seen for n in seen[keep]) for said in readings]
    assert any(fits), (
        f"keep -> tokens seen (fewest, most) is {seen}; of {total} tokens, {image} of an image, expected {readings[0]} "
        f"(a share of the image) or {readings[1]} (a share of all)"
    )


@contract("accelerator")
def check_works_with_grouped_heads(method: Method) -> None:
    """Two key heads for four query heads give what four key heads give that are their copies."""
    grouped, inputs = as_double(hosted(tiny_vlm, num_kv_heads=2))
    full, _ = as_double(hosted(tiny_vlm, num_kv_heads=4))
    state = grouped.state_dict()
    for name, wanted in full.state_dict().items():
        if state[name].shape != wanted.shape:
            state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    with _at_work(method, grouped), _at_work(method, full):
        same(_logits(grouped, inputs), _logits(full, inputs), "2 key heads against their copies", 1e-6)


@contract("accelerator")
def check_works_with_left_padding(method: Method) -> None:
    """In a batch of unequal prompts, the shorter padded on the left, each writes what it writes alone."""
    model, inputs = as_double(hosted(tiny_vlm))
    short = {
        **_prompt(inputs, 0),
        "input_ids": inputs["input_ids"][:1, :-3],
        "attention_mask": inputs["attention_mask"][:1, 3:],
    }
    padded, long = _prompt(short, 0, padding=3), _prompt(inputs, 1)
    with _at_work(method, model):
        together = _written(model, {name: torch.cat([padded[name], long[name]]) for name in long})
        for row, (name, prompt) in enumerate({"padded": short, "unpadded": long}.items()):
            same(together[row], _written(model, prompt)[0], f"the {name} prompt in a batch against alone", 1e-5)


@contract("accelerator")
def check_runs_in_generate(method: Method) -> None:
    """Prompt after prompt, ``generate`` writes finite logits that do not depend on the prompts before."""
    model, inputs = as_double(hosted(tiny_vlm))
    second = _prompt(inputs, 1)
    with _at_work(method, model):
        fresh = _written(model, second)
    finite(fresh, "logits in generate")
    with _at_work(method, model):
        _written(model, _prompt(inputs, 0))
        same(_written(model, second), fresh, "logits of a second prompt against those of a first", 0.0)


@contract("accelerator")
def check_accelerator_is_undone(method: Method) -> None:
    """It does something, and nothing of it is left: after ``undo``, twice; after the block; after a model that failed."""
    model, inputs = hosted(tiny_vlm)
    plain, before = _logits(model, inputs), traces(model)
    handle = _at_work(method, model)
    got = _logits(model, inputs)
    assert got.shape != plain.shape or not torch.equal(got, plain), f"{method.example} changes nothing"
    handle.undo()
    handle.undo()
    unchanged(before, traces(model), "undo")
    same(_logits(model, inputs), plain, "logits after undo", 0.0)
    with _at_work(method, model):
        _written(model, inputs)
    unchanged(before, traces(model), "a block with generate in it")
    same(_logits(model, inputs), plain, "logits after the block", 0.0)

    def visit() -> None:
        with _at_work(method, model):
            _logits(model, inputs)

    survives_failure(model, "model.language_model.layers.3.mlp", visit)


@contract("accelerator")
def check_composes_with_a_capture(method: Method) -> None:
    """Read before or after it was put to work, the model writes the same, and what is read is what ran."""
    model, inputs = as_double(hosted(tiny_vlm))
    plain = _logits(model, inputs)
    with _at_work(method, model):
        alone = _logits(model, inputs)
    with _at_work(method, model), capture(model, DECODER) as cap:
        same(_logits(model, inputs), alone, "logits with a capture inside", 0.0)
    for name, call in cap.items():
        assert call.error() <= tolerance(call.q.dtype), (
            f"{name}: weights times values miss its output by {call.error():.1e}"
        )
    with capture(model, DECODER) as cap:
        handle = _at_work(method, model)
        same(_logits(model, inputs), alone, "logits with a capture around", 0.0)
        handle.undo()
        count = len(cap.sequence())
        same(_logits(model, inputs), plain, "logits after undo, with the capture still around", 0.0)
        assert len(cap.sequence()) > count, "its undo took away the capture around it"
