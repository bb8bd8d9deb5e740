"""What every explainer must hold: on a tiny vision transformer of our own, and on models of two other families.

An explainer that needs ``"features"`` has an argument ``layers``, names of modules, or finds them by itself.

``explainer.claims`` names what it promises beyond the contract: ``"non-negative"``; ``"uniform"``, that uniform weights
give a uniform map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract, hosted
from regard.checks.samples import arguments, finite, random, stir
from regard.checks.traces import survives_failure, traces, unchanged
from regard.core.explain import explain
from regard.core.tokens import tokens
from regard.hosts.tiny import Hosted, tiny_encoder, tiny_resnet, tiny_vit_transformers
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
    before = traces(model)
    _map(method, model)
    unchanged(before, traces(model), "a map")
    survives_failure(model, "blocks.1.mlp", lambda: _map(method, model))


class _CNN(nn.Module):
    """Two convolutions and a mean over places, five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.first(x)).mean((2, 3)))


def _hosts(method: Method) -> dict[str, tuple[Hosted, dict[str, Any], tuple[int, int]]]:
    """Models of other families than :class:`TinyViT`: name -> (model and inputs, arguments of the explainer, grid)."""
    if "features" not in method.target.needs:  # type: ignore[attr-defined]
        return {
            "a ViT of transformers": (hosted(tiny_vit_transformers), {}, (3, 4)),
            "torch's transformer encoder": (hosted(tiny_encoder), {}, (2, 6)),
        }
    torch.manual_seed(0)
    own = _CNN().eval(), {"x": random((2, 3, 24, 32), torch.float32, seed=2)}
    return {
        "a plain CNN": (own, {"layers": ("last",)}, (6, 8)),
        "a ResNet of timm": (hosted(tiny_resnet), {"layers": ("layer2",)}, (6, 8)),
    }


@contract("explainer")
def check_map_on_other_hosts(method: Method) -> None:
    """Models of two other families get finite maps on their own grids, one an item, and are left as they were."""
    for name, ((model, inputs), wishes, grid) in _hosts(method).items():
        torch.manual_seed(0)
        before, explainer = traces(model), method.create(**arguments(method, **wishes))
        values = explain(model, inputs, explainer, target=1).values
        assert tuple(values.shape) == (2, *grid), f"{name}: map of shape {tuple(values.shape)}, expected {(2, *grid)}"
        finite(values, f"map of {name}")
        first, second = values.flatten(1)
        assert not torch.allclose(first, second), f"{name}: two images, one map"
        unchanged(before, traces(model), f"a map of {name}")
