"""Explaining a prediction: run the model, hand the explainer what it needs, get a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regard.catalog import registry
from regard.core.call import Call
from regard.core.capture import Capture
from regard.core.features import Features
from regard.core.known import knowledge
from regard.core.maps import Map
from regard.core.site import is_causal, sites
from regard.core.tokens import Rows

Target = int | Tensor | Callable[[Any], Tensor]


class Explainer(Protocol):
    """``needs`` holds ``"weights"``, ``"weights_grad"`` or ``"features"``; ``explain`` gets what was asked for.

    With ``"features"`` the explainer has ``layers(model)``, the modules whose outputs and gradients it wants. An
    attribute ``where`` names the sites that it reads, where those are not all of self-attention.
    """

    needs: frozenset[str]

    def explain(self, evidence: Any) -> Tensor: ...


def score_of(output: Any, target: Target | None) -> Tensor:
    """The number to explain, summed over the batch: the logit of ``target``, default each item's largest."""
    if callable(target):
        return target(output).sum()
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
    target: Target | None = None,
    where: str | Sequence[str] | None = None,
    **arguments: Any,
) -> Map:
    """A map of what in ``inputs`` the prediction rests on.

    Args:
        inputs: a tensor, or a mapping of keyword arguments of the model.
        method: registry name of an explainer, or an explainer.
        target: class to explain, one for all or one an item; default each item's prediction. Or, for an output that is not
            one row of logits an item, a function of it that gives the number: ``lambda out: out.logits[:, 3, 7]`` is class 7
            of query 3.
        where: sites that are read; default the explainer's choice, else all self-attention.
        arguments: passed to the explainer when it is given by name.

    Raises:
        ValueError: no such explainer, arguments for one that is not given by name, a target outside the classes, a model in
            which nothing was captured.
    """
    if isinstance(method, str):
        record = registry.get(method)
        if record.kind != "explainer":
            raise ValueError(f"method={method!r} is a {record.kind}, not an explainer")
        method = record.create(**arguments)
    elif arguments:
        raise ValueError(f"arguments {sorted(arguments)} go with a method given by name")
    needs = method.needs
    unknown = needs - {"weights", "weights_grad", "features"}
    if unknown:
        raise ValueError(f"{type(method).__name__} needs {sorted(unknown)}, which nothing gives")
    grad = bool(needs & {"weights_grad", "features"})
    keywords = inputs if isinstance(inputs, Mapping) else None
    if "features" in needs:
        evidence: Any = Features(model, method.layers(model))
    else:
        if not knowledge(model).sites:
            sites(model, **keywords) if keywords is not None else sites(model, inputs)
        read = getattr(method, "where", "self") if where is None else where
        evidence = Capture(model, read, grad=grad)
    with evidence, torch.set_grad_enabled(grad), _gradients_of(model, grad):
        output = model(**keywords) if keywords is not None else model(inputs)
        if grad:
            score_of(output, target).backward()
    with torch.no_grad():
        relevance = method.explain(evidence)
    image = next(
        (t for t in (keywords.values() if keywords else [inputs]) if isinstance(t, Tensor) and t.ndim == 4), None
    )
    return on_grid(relevance, evidence, image)


def readout(call: Call, token: Rows | None = None) -> Tensor:
    """(b, l): with which share each query row of ``call`` enters the answer.

    Args:
        token: the rows that are read, several with equal shares: names, numbers, or a boolean (b, l) for rows that differ
            between items. Default the class token; the last row of causal attention; every image row of a model that has
            image tokens and no class token. Padding has no share where several rows are read.

    Raises:
        ValueError: no such row; or no ``token``, and nothing says which one is read.
    """
    b, _, l, _ = call.q.shape
    chosen = torch.zeros(b, l, dtype=torch.bool, device=call.q.device)
    if isinstance(token, Tensor) and token.ndim == 2:
        if token.shape != chosen.shape or token.dtype != torch.bool or not bool(token.any(1).all()):
            raise ValueError(f"token must mark rows of every item with a boolean {tuple(chosen.shape)}; got {token}")
        chosen |= token.to(chosen.device)
    else:
        if token is None:
            token = _read_by_default(call)
        chosen[:, call.rows(token)] = True
    if l == call.k.shape[2]:
        padded = chosen & ~looked_at(call)
        chosen &= ~padded | padded.eq(chosen).all(1, keepdim=True)
    share = chosen.to(torch.promote_types(call.q.dtype, torch.float32))
    return share / share.sum(1, keepdim=True)


def _read_by_default(call: Call) -> Rows:
    roles = {s.role for s in call.tokens_q.segments} if call.tokens_q is not None else set()
    if "cls" in roles:
        return "cls"
    if is_causal(call):
        return -1
    if call.q.shape[2] == 1:
        return 0
    if "image" in roles:
        return "image"
    raise ValueError(
        f"token=None, but nothing says which token of {call.site} is read: give token=0 for a first token that stands for "
        "all, token=slice(None) for the mean over tokens, or describe them with regard.tokens(model, q=...)"
    )


def looked_at(call: Call) -> Tensor:
    """(b, s): keys that some query may look at; the others are padding."""
    b, _, l, _ = call.q.shape
    seen = torch.ones(b, 1, l, call.k.shape[2], dtype=torch.bool, device=call.q.device)
    allowed, added = call.allowed(), call.added()
    if allowed is not None:
        seen = seen & allowed
    if added is not None:
        seen = seen & (added > torch.finfo(added.dtype).min / 2)
    return seen.any(2).any(1)


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
    """Keeps the model's own gradients out of it: whatever was in ``.grad`` is there again afterwards.

    A model that is frozen as a whole has its gradients switched on meanwhile.
    """

    def __init__(self, model: nn.Module, active: bool) -> None:
        self.parameters = list(model.parameters()) if active else []

    def __enter__(self) -> None:
        self.kept = [p.grad for p in self.parameters]
        self.frozen = [p for p in self.parameters if p.is_floating_point()]
        if any(p.requires_grad for p in self.parameters):
            self.frozen = []
        for p in self.parameters:
            p.grad = None
        for p in self.frozen:
            p.requires_grad_(True)

    def __exit__(self, *_: Any) -> None:
        for p, grad in zip(self.parameters, self.kept, strict=True):
            p.grad = grad
        for p in self.frozen:
            p.requires_grad_(False)
