"""Explaining a prediction: run the model, hand the explainer what it needs, get a map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regard.catalog import registry
from regard.core.capture import Capture
from regard.core.features import Features
from regard.core.maps import Map


class Explainer(Protocol):
    """``needs`` holds ``"weights"``, ``"weights_grad"`` or ``"features"``; ``explain`` gets what was asked for.

    With ``"features"`` the explainer has ``layers(model)``, the modules whose outputs and gradients it wants.
    """

    needs: frozenset[str]

    def explain(self, evidence: Any) -> Tensor: ...


def score_of(output: Any, target: int | Tensor | None) -> Tensor:
    """The number to explain, summed over the batch: the logit of ``target``, default each item's largest."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0]
    if logits.ndim == 3:
        logits = logits[:, -1]
    if logits.ndim != 2:
        raise ValueError(f"the model must give (b, classes) logits; got {tuple(logits.shape)}")
    if target is None:
        target = logits.argmax(-1)
    index = torch.as_tensor(target, device=logits.device).expand(len(logits))
    if bool(((index < 0) | (index >= logits.shape[1])).any()):
        raise ValueError(f"target={target} is outside 0..{logits.shape[1] - 1}")
    return logits.gather(1, index[:, None]).sum()


def explain(
    model: nn.Module,
    inputs: Any,
    method: Any,
    *,
    target: int | Tensor | None = None,
    where: str = "self",
    **arguments: Any,
) -> Map:
    """A map of what in ``inputs`` the prediction rests on.

    Args:
        inputs: a tensor, or a mapping of keyword arguments of the model.
        method: registry name of an explainer, or an explainer.
        target: class to explain, one for all or one an item; default each item's prediction.
        where: sites that are read.
        arguments: passed to the explainer when it is given by name.

    Raises:
        ValueError: no such explainer, a target outside the classes, a model in which nothing was captured.
    """
    if isinstance(method, str):
        record = registry.get(method)
        if record.kind != "explainer":
            raise ValueError(f"method={method!r} is a {record.kind}, not an explainer")
        method = record.create(**arguments)
    needs = method.needs
    unknown = needs - {"weights", "weights_grad", "features"}
    if unknown:
        raise ValueError(f"{type(method).__name__} needs {sorted(unknown)}, which nothing gives")
    grad = bool(needs & {"weights_grad", "features"})
    keywords = inputs if isinstance(inputs, Mapping) else None
    evidence: Any = Features(model, method.layers(model)) if "features" in needs else Capture(model, where, grad=grad)
    with evidence, torch.set_grad_enabled(grad), _gradients_of(model, grad):
        output = model(**keywords) if keywords is not None else model(inputs)
        if grad:
            score_of(output, target).backward()
    relevance = method.explain(evidence)
    image = next(
        (t for t in (keywords.values() if keywords else [inputs]) if isinstance(t, Tensor) and t.ndim == 4), None
    )
    return on_grid(relevance, evidence, image)


def on_grid(relevance: Tensor, evidence: Any, image: Tensor | None) -> Map:
    """Relevance of tokens (b, n) laid on the image grid of the captured sites; a map that has its grid stays."""
    if relevance.ndim == 2 and isinstance(evidence, Capture):
        for _, call in evidence.items():
            tokens = call.tokens_k
            if (
                tokens is not None
                and tokens.size == relevance.shape[1]
                and any(s.role == "image" for s in tokens.segments)
            ):
                grid = tokens.grid("image")
                if len(grid) == 2:
                    return Map(relevance[:, tokens.span("image")].unflatten(1, grid), image)
    return Map(relevance, image)


class _gradients_of:  # noqa: N801
    """Keeps the model's own gradients out of it: whatever was in ``.grad`` is there again afterwards."""

    def __init__(self, model: nn.Module, active: bool) -> None:
        self.parameters = list(model.parameters()) if active else []

    def __enter__(self) -> None:
        self.kept = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None

    def __exit__(self, *_: Any) -> None:
        for p, grad in zip(self.parameters, self.kept, strict=True):
            p.grad = grad
