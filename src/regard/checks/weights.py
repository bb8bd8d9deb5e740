"""The weights of a layer, however they can be met, and what their sums along both axes say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.checks.samples import run
from regard.core.call import OpaqueSite
from regard.core.capture import capture
from regard.nn.attention import Attention
from regard.ops.attend import mix


class NotMeasured(Exception):
    """Raised where a layer gives no hold for a measurement, with the reason."""


@dataclass(frozen=True)
class Weights:
    """Weights (..., queries, keys), of one call or of several alike.

    Attributes:
        source: where they were met.
        over_keys: least and largest sum of the weights of one query.
        over_queries: least and largest sum of the weights on one key.
        minimum, maximum: of single weights.
        zeros: share of weights that are exactly zero.
        blind: share of queries whose weights are all zero.
        unseen: share of keys whose weights are all zero.
        kept: the largest number of keys with a weight for one query.
    """

    source: str
    over_keys: tuple[float, float]
    over_queries: tuple[float, float]
    minimum: float
    maximum: float
    zeros: float
    blind: float
    unseen: float
    kept: int

    @property
    def normalised_over(self) -> tuple[str, ...]:
        """The axes, of ``keys`` and ``queries``, along which every sum is 1."""
        sums = {"keys": self.over_keys, "queries": self.over_queries}
        return tuple(axis for axis, (low, high) in sums.items() if abs(low - 1) < 1e-5 and abs(high - 1) < 1e-5)


def summarise(weights: Sequence[Tensor], source: str = "") -> Weights:
    """What can be said of ``weights``, each (..., queries, keys); ValueError where there are none."""
    if not weights:
        raise ValueError("weights is empty: there is nothing to summarise")

    def flat(measure: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([measure(w.double()).double().flatten() for w in weights])

    def ends(values: Tensor) -> tuple[float, float]:
        return values.min().item(), values.max().item()

    least, most = ends(flat(lambda w: w))
    over_keys, over_queries = ends(flat(lambda w: w.sum(-1))), ends(flat(lambda w: w.sum(-2)))
    zeros, blind, unseen = (
        flat(of).mean().item() for of in (lambda w: w == 0, lambda w: (w == 0).all(-1), lambda w: (w == 0).all(-2))
    )
    kept = int(flat(lambda w: (w != 0).sum(-1)).max())
    return Weights(source, over_keys, over_queries, least, most, zeros, blind, unseen, kept)


class _Normalised(TorchFunctionMode):
    """Keeps what every softmax gives, and every sigmoid where there is no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Tensor]] = {"softmax": [], "sigmoid": []}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in self.found:
            self.found[name].append(out)
        return out


@torch.no_grad()
def weights_of(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> Weights:
    """The weights of one call: as a capture reads them, else as they answer to unit values, else what was normalised.

    Raises:
        NotMeasured: the layer has no site that can be read and calls neither softmax nor sigmoid.
    """
    why = "it makes no weights: no site that can be read, no softmax, no sigmoid"
    with capture(layer) as cap:
        run(layer, x, **options)
    try:
        if cap:
            return summarise([call.weights() for call in cap.sequence()], "capture")
    except OpaqueSite as error:
        why = str(error)
    if isinstance(layer, Attention) and type(layer).forward is Attention.forward:
        q, k, v = layer.project(x, options.get("context", x))
        unit = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:3], -1)
        weights = layer.attend(q, k, unit, None)
        if torch.allclose(mix(weights, v), layer.attend(q, k, v, None), atol=1e-5):
            return summarise([weights], "unit values")
    with _Normalised() as seen:
        run(layer, x, **options)
    for name, found in seen.found.items():
        if found:
            gates = [w.flatten(1)[:, None] if name == "sigmoid" else w for w in found]
            return summarise(gates, name)
    raise NotMeasured(why)
