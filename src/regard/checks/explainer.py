"""What every explainer must hold, on a tiny vision transformer of our own.

``explainer.claims`` names what it promises beyond the contract: ``"non-negative"``; ``"uniform"``, that uniform weights
give a uniform map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract
from regard.checks.samples import finite, random, stir
from regard.core.explain import explain
from regard.core.tokens import tokens
from regard.nn.attention import Attention

GRID = (3, 4)
PATCH = 4


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, 4)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("half way")


class TinyViT(nn.Module):
    """Two blocks on 3 x 4 patches behind a class token, five classes."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + GRID[0] * GRID[1], dim))
        self.blocks = nn.Sequential(_Block(dim), _Block(dim))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


def _model(seed: int = 0) -> TinyViT:
    torch.manual_seed(seed)
    model = TinyViT()
    stir(model, seed)
    layout = f"cls + image[{GRID[0]},{GRID[1]}]"
    tokens(model, q=layout, k=layout)
    return model.eval()


def _image() -> Tensor:
    return random((1, 3, GRID[0] * PATCH, GRID[1] * PATCH), torch.float32, seed=2)


def _map(method: Method, model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return explain(model, _image(), method.create(**method.example), target=1).values


def _claimed(method: Method, claim: str) -> None:
    if claim not in getattr(method.target, "claims", ()):
        raise Skip(f"does not claim to be {claim}")


def _traces(model: nn.Module) -> dict[str, Any]:
    """What a visitor could leave behind: hooks, own attributes, gradients, the mode, parameters."""
    found: dict[str, Any] = {}
    for name, m in model.named_modules():
        found[f"{name}: hooks"] = sum(len(v) for k, v in vars(m).items() if k.endswith("_hooks"))
        found[f"{name}: attributes"] = sorted(vars(m))
        found[f"{name}: training"] = m.training
    for name, p in model.named_parameters():
        found[f"{name}: gradient"] = p.grad is not None
        found[f"{name}: requires_grad"] = p.requires_grad
        found[f"{name}: sum"] = p.detach().double().sum().item()
    return found


@contract("explainer")
def check_map_is_on_the_grid(method: Method) -> None:
    """One finite number a patch, on the grid of patches, without the class token; a second call gives the same."""
    model = _model()
    values = _map(method, model)
    assert tuple(values.shape[-2:]) == GRID, f"map of shape {tuple(values.shape)}, expected (..., {GRID[0]}, {GRID[1]})"
    finite(values, "map")
    if not method.tags.random:
        assert torch.equal(_map(method, model), values), "a second call gives another map"


@contract("explainer")
def check_map_is_not_negative(method: Method) -> None:
    """Where claimed."""
    _claimed(method, "non-negative")
    lowest = _map(method, _model()).min().item()
    assert lowest >= 0, f"the lowest value is {lowest:.3g}"


@contract("explainer")
def check_map_depends_on_the_parameters(method: Method) -> None:
    """A model with other random parameters gets another map."""
    first, second = _map(method, _model(0)).flatten(), _map(method, _model(1)).flatten()
    assert not torch.allclose(first / first.norm(), second / second.norm(), atol=1e-3), "random parameters, same map"


@contract("explainer")
def check_uniform_weights_give_a_uniform_map(method: Method) -> None:
    """Where claimed: with queries of zero every token looks everywhere alike, and so must the map."""
    _claimed(method, "uniform")
    model = _model()
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, Attention)):
            for p in layer.q.parameters():
                p.zero_()
    values = _map(method, model)
    spread = (values.max() - values.min()) / values.abs().max().clamp_min(1e-12)
    assert spread <= 1e-4, f"uniform weights, but the map varies by {spread:.2g} of its largest value"


@contract("explainer")
def check_explainer_leaves_nothing_behind(method: Method) -> None:
    """After a map, and after a model that fails half way, the model is what it was."""
    model = _model()
    before = _traces(model)
    _map(method, model)
    _unchanged(before, _traces(model), "a map")

    model.blocks[1].mlp = _Fails()
    before = _traces(model)
    try:
        _map(method, model)
    except KeyError:
        pass
    else:
        raise AssertionError("the model raised, and the explainer swallowed it")
    _unchanged(before, _traces(model), "a model that failed")


def _unchanged(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"after {when}, changed: {changed}"
