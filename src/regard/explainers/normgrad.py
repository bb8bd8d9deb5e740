"""NormGrad: saliency as the size of what each place adds to the gradient of a layer that is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import method
from regard.core.explain import Target, explain
from regard.core.features import Features
from regard.core.maps import Map


def _patches(x: Tensor) -> Tensor:
    """(b, c, 9, h, w): the 3x3 neighbourhood of every place, zeros outside."""
    return F.unfold(x, 3, padding=1).unflatten(1, (x.shape[1], 9)).unflatten(-1, x.shape[-2:])


def _outer(g: Tensor, x: Tensor) -> Tensor:
    return g[:, :, None] * x[:, None]


CONTRIBUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bias": lambda x, g: g,
    "scaling": lambda x, g: x * g,
    "conv1x1": lambda x, g: _outer(g, x),
    "conv3x3": lambda x, g: _outer(g, _patches(x).flatten(1, 2)),
    "conv3x3_depthwise": lambda x, g: (_patches(x) * g[:, :, None]).flatten(1, 2),
}
AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda t: t.norm(dim=1),
    "filter_norm": lambda t: t.clamp_min(0).norm(dim=1),
    "sum": lambda t: t.sum(1),
    "max": lambda t: t.amax(1),
}
# The same of all products x_i g_o, without making them.
OF_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda x, g: x.norm(dim=1) * g.norm(dim=1),
    "filter_norm": lambda x, g: torch.hypot(
        x.clamp_min(0).norm(dim=1) * g.clamp_min(0).norm(dim=1), x.clamp_max(0).norm(dim=1) * g.clamp_max(0).norm(dim=1)
    ),
    "sum": lambda x, g: x.sum(1) * g.sum(1),
    "max": lambda x, g: torch.stack([a * b for a in (x.amax(1), x.amin(1)) for b in (g.amax(1), g.amin(1))]).amax(0),
}


def virtual_identity_contributions(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b c h w"], identity: str = "conv1x1"
) -> Float[Tensor, "b *weights h w"]:
    """What each place adds to the weight gradient of an identity layer after ``x``; the sum over places is that gradient.

    Args:
        x, g: a layer's output and the gradient of the score there.
        identity: ``"bias"`` (c), ``"scaling"`` (c), ``"conv1x1"`` (c, c), ``"conv3x3"`` (c, 9 c) or ``"conv3x3_depthwise"``
            (9 c), with the sizes of their weights; channels of the output first.

    Raises:
        ValueError: another identity, x and g of different or other than four axes.
    """
    _check(x, g, identity, "norm")
    return CONTRIBUTIONS[identity](x, g)


def aggregate(contributions: Float[Tensor, "b *weights h w"], how: str = "norm") -> Float[Tensor, "b h w"]:
    """One number a place: ``"norm"``, ``"filter_norm"`` (norm of the positive entries), ``"sum"`` or ``"max"``."""
    _known("aggregate", how, AGGREGATES)
    return AGGREGATES[how](contributions.flatten(1, -3))


def saliency(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b c h w"], identity: str = "conv1x1", how: str = "norm"
) -> Float[Tensor, "b h w"]:
    """``aggregate(virtual_identity_contributions(x, g, identity), how)`` in memory of the size of x."""
    _check(x, g, identity, how)
    if identity in ("conv1x1", "conv3x3"):
        return OF_PRODUCTS[how](x if identity == "conv1x1" else _patches(x).flatten(1, 2), g)
    return aggregate(CONTRIBUTIONS[identity](x, g), how)


def _check(x: Tensor, g: Tensor, identity: str, how: str) -> None:
    _known("identity", identity, CONTRIBUTIONS)
    _known("aggregate", how, AGGREGATES)
    if x.ndim != 4 or x.shape != g.shape:
        raise ValueError(f"x and g must both be (b, c, h, w); got {tuple(x.shape)} and {tuple(g.shape)}")


def _known(name: str, value: str, choices: dict[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


@method("normgrad", kind="explainer", example={"layers": ("patch",)})
class NormGrad:
    r"""Saliency of a convolutional network: the norm of each place's share in the gradient of an identity layer.

    Put a layer that does nothing, say a 1x1 convolution with the identity as its weight, behind a feature map. The gradient
    of the score with respect to its weight is a sum over places, and the norm of one summand says how much training would
    change because of that place. The framework holds other saliency methods as well: another identity layer in the first
    step, another way to make one number of the summand in the second. Maps of several layers are multiplied.

    .. math::
        \frac{\partial z}{\partial W} = \sum_u g_u x_u^\top, \qquad
        s_u = \lVert g_u x_u^\top \rVert_F = \lVert g_u \rVert \, \lVert x_u \rVert

    ==================== ============ ============= =================================
    method               identity     aggregate     besides
    ==================== ============ ============= =================================
    gradient             bias         max           of the absolute values
    linear approximation scaling      sum
    Grad-CAM             scaling      sum           g averaged over places, then ReLU
    NormGrad             conv1x1      norm
    selective NormGrad   scaling      filter_norm
    ==================== ============ ============= =================================

    Args:
        layers: names of the modules whose outputs are read; the paper takes the ends of the four stages.
        identity: ``"bias"``, ``"scaling"``, ``"conv1x1"``, ``"conv3x3"``, ``"conv3x3_depthwise"``.
        aggregate: ``"norm"``, ``"filter_norm"``, ``"sum"``, ``"max"``.
        size: (H, W) to which the map of each layer is interpolated, the size of the image in the paper; default the finest
            grid among the layers.
        grid: (H, W) of the tokens, for layers that give tokens (b, n, c); tokens before the grid are left out.

    Shape: outputs (b, c, h, w) of the layers -> (b, H, W). The map of one layer is as it is; those of several are stretched
        to 0..1 item by item before they are multiplied.

    Raises:
        ValueError: no layer, a layer that does not exist or has no grid, an unknown identity or aggregate.

    Cost: one forward and one backward pass and 4 b c h w; no c x c matrices.

    Example:
        >>> from regard import explain
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> explain(model, torch.randn(2, 3, 17, 21), "normgrad", target=1, layers=["1"]).grid
        (8, 10)

    Differs: the gradient is that of the logit itself, where the released code takes its negative; norms are the same, sum
        and max change their sign there. A layer that the score does not depend on gives zeros, as does a constant map
        when several are multiplied.

    Reference: Sylvestre-Alvise Rebuffi, Ruth Fong, Xu Ji, Andrea Vedaldi, There and Back Again: Revisiting Backpropagation
        Saliency Methods, CVPR 2020, arXiv:2004.02866
    """

    needs = frozenset({"features"})
    claims = frozenset({"non-negative"})

    def __init__(
        self,
        layers: Sequence[str],
        *,
        identity: str = "conv1x1",
        aggregate: str = "norm",
        size: tuple[int, int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(layers, str) or not layers:
            raise ValueError(f"layers={layers!r} must be a list of module names, one or more")
        _known("identity", identity, CONTRIBUTIONS)
        _known("aggregate", aggregate, AGGREGATES)
        self.names, self.identity, self.aggregate = tuple(layers), identity, aggregate
        self.size, self.grid = size, grid

    def layers(self, model: nn.Module) -> tuple[str, ...]:
        return self.names

    def explain(self, evidence: Features) -> Float[Tensor, "b H W"]:
        maps = [Map(self._saliency(name, evidence)) for name in self.names]
        size = self.size or max((m.grid for m in maps), key=lambda grid: grid[0] * grid[1])
        maps = [m if m.grid == tuple(size) else m.upsample((size[0], size[1])) for m in maps]
        if len(maps) == 1:
            return maps[0].values
        return torch.stack([m.normalized().values for m in maps]).prod(0)

    def _saliency(self, name: str, evidence: Features) -> Tensor:
        x = evidence.outputs.get(name)
        if x is None:
            raise ValueError(f"layer={name!r} did not run")
        g = evidence.gradients.get(name)
        pair = [self._image(name, t) for t in (x, torch.zeros_like(x) if g is None else g)]
        return saliency(pair[0], pair[1], self.identity, self.aggregate)

    def _image(self, name: str, x: Tensor) -> Tensor:
        if x.ndim == 3 and self.grid is not None and x.shape[1] >= self.grid[0] * self.grid[1]:
            return x[:, x.shape[1] - self.grid[0] * self.grid[1] :].transpose(1, 2).unflatten(-1, self.grid)
        if x.ndim != 4:
            raise ValueError(
                f"layer={name!r} gives {tuple(x.shape)}, not (b, c, h, w); for tokens on a grid give grid=(H, W)"
            )
        return x


def meta_saliency(
    explainer: Any, model: nn.Module, x: Float[Tensor, "b c H W"], target: Sequence[int] | Tensor, *, lr: float = 1e-4
) -> Map:
    """The map after one step of gradient descent of all parameters on the cross-entropy of each item alone.

    Args:
        explainer: name or explainer, as in :func:`regard.explain`.
        target: class of each item.
        lr: length of the step; a negative one steps away from the target.

    Raises:
        ValueError: a model in training mode, in which statistics and dropout would enter; not one target an item.
    """
    if any(m.training for m in model.modules()):
        raise ValueError("model is in training mode: call model.eval() before meta_saliency()")
    labels = torch.as_tensor(target, device=x.device)
    if labels.shape != x.shape[:1]:
        raise ValueError(f"target must have one class for each of {len(x)} items; got {tuple(labels.shape)}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    found = []
    try:
        for item, label in zip(x.split(1), labels.split(1), strict=True):
            with torch.enable_grad():
                loss = F.cross_entropy(model(item), label)
            steps = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for p, step in zip(parameters, steps, strict=True):
                    if step is not None:
                        p.sub_(lr * step)
            found.append(explain(model, item, explainer, target=label).values)
            _restore(parameters, kept)
    finally:
        _restore(parameters, kept)
    return Map(torch.cat(found), x)


@torch.no_grad()
def _restore(parameters: list[nn.Parameter], kept: list[Tensor]) -> None:
    for p, old in zip(parameters, kept, strict=True):
        p.copy_(old)


def class_sensitivity(make: Callable[[Target], Map], logits: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """Correlation of the maps of the most and of the least likely class; low means that the method tells classes apart.

    NaN for an item one of whose maps is constant.

    Args:
        make: the map of each item for a class each, as ``lambda target: explain(model, x, "normgrad", target=target)``.
        logits: of the model.
    """
    pair = [make(logits.argmax(1)).values.flatten(1), make(logits.argmin(1)).values.flatten(1)]
    first, second = (m - m.mean(1, keepdim=True) for m in pair)
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


class PointingGame:
    """Share of maps whose largest value lies on an object of its class, or near enough.

    Args:
        num_classes: classes that are counted separately.
        tolerance: distance in pixels of the original image below which the point still counts.
    """

    def __init__(self, num_classes: int, tolerance: float = 15) -> None:
        self.tolerance = tolerance
        self.hits, self.count = torch.zeros(num_classes), torch.zeros(num_classes)

    def add(self, saliency: Float[Tensor, "h w"], mask: Bool[Tensor, "h w"], label: int) -> bool:
        """Count one map for class ``label``, whose objects are ``mask``, both at the size of the original image."""
        if saliency.shape != mask.shape or saliency.ndim != 2 or not mask.any():
            raise ValueError(
                f"map and mask must have one size (h, w) and the mask an object; got {tuple(saliency.shape)}, {tuple(mask.shape)}"
            )
        y, x = divmod(int(saliency.argmax()), saliency.shape[1])
        rows, columns = mask.nonzero().T
        hit = bool((((rows - y) ** 2 + (columns - x) ** 2) < self.tolerance**2).any())
        self.hits[label] += hit
        self.count[label] += 1
        return hit

    def accuracy(self) -> Float[Tensor, "k"]:
        """One share a class; NaN where no map was counted. The game's score is their ``nanmean``."""
        return self.hits / self.count
