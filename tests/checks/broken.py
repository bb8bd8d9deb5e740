"""Attention layers, each broken in one way that somebody has shipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.nn import Attention
from regard.nn.cache import KVCache
from regard.ops import attend as ops


class SoftLeak(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, **options) + 0.01 * x.mean(1, keepdim=True)


class HardLeak(Attention):
    """Chooses by all tokens, the later ones too; no gradient says so."""

    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        top = x.detach().mean(-1).argmax(1)
        return super().forward(x, context, **options) * (1.0 + (top % 2)[:, None, None])


class IgnoresMask(Attention):
    def forward(self, x: Tensor, context: Any = None, *, mask: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, **options)


class IgnoresMaskOfContext(Attention):
    def forward(self, x: Tensor, context: Any = None, *, mask: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, mask=mask if context is None else None, **options)


class CastsMask(Attention):
    def forward(self, x: Tensor, context: Any = None, *, mask: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, mask=None if mask is None else mask.bool(), **options)


class CountsPadding(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, **options) / x.shape[1]


class NaNWhenMasked(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = ops.scores(q, k, scale=self.scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return ops.mix(scores.softmax(-1), v)


class UniformWhenMasked(NaNWhenMasked):
    """The usual cure of the NaN, -1e9, which looks at what it must not see."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = ops.scores(q, k, scale=self.scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        return ops.mix(scores.softmax(-1), v)


class WrongScale(Attention):
    def __init__(self, dim: int, num_heads: int = 4, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.scale = dim**-0.5


class MixesRows(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x - x.mean((0, 1)), context, **options)


class DeadParameter(Attention):
    def __init__(self, dim: int, num_heads: int = 4, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.temperature = nn.Parameter(torch.ones(()))


class ZeroGradient(DeadParameter):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, **options) + 0.0 * self.temperature


class InPlace(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        x.data.mul_(1.5)
        return super().forward(x, context, **options)


class DropsInEval(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return nn.functional.dropout(super().attend(q, k, v, mask), self.dropout)


class NeverDrops(Attention):
    def __init__(self, dim: int, num_heads: int = 4, *, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads)


class Float32Out(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, **options).float()


class Float32Inside(Attention):
    def normalize(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return super().normalize(scores.float(), mask).to(scores.dtype)


class RepeatsHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        return super().attend(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), mask)


class TalkingHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = super().attend(q, k, v, mask)
        return out + 0.1 * out.mean(1, keepdim=True)


class CacheOffByOne(Attention):
    def project(self, x: Tensor, context: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(max(start - 1, 0), max(start - 1, 0) + x.shape[1], device=x.device, dtype=x.dtype)
        return super().project(x + position[:, None].sin(), x + position[:, None].sin(), start)


class ReadsEmptyCache(Attention):
    """Attends to the whole capacity, zeros that were never written included."""

    def forward(self, x: Tensor, context: Any = None, *, cache: KVCache | None = None, **options: Any) -> Tensor:
        if cache is None:
            return super().forward(x, context, **options)
        q, k, v = self.project(x, x)
        cache.append(k, v)
        return self.merge(ops.attend(q, cache.k, cache.v, scale=self.scale))


class GrowingBuffer(Attention):
    def __init__(self, dim: int, num_heads: int = 4, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.register_buffer("seen", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean((0, 1))])
        return super().forward(x, context, **options)


class KeepsWeights(Attention):
    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        self.weights = weights
        return super().mix(weights, v)


class HiddenProjection(Attention):
    """A random matrix that no state dict holds."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__(dim, num_heads)
        self.register_buffer("mixing", torch.randn(dim, dim) / dim**0.5, persistent=False)

    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x @ self.mixing, context, **options)


class RandomShape(Attention):
    """A state dict that depends on chance."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__(dim, num_heads)
        self.extra = nn.ParameterDict({f"p{int(torch.randint(1000, ()))}": torch.ones(1)})


class HoldsLambda(Attention):
    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__(dim, num_heads)
        self.act = lambda x: x


_SHARED = nn.Linear(32, 32)


class SharesParameters(Attention):
    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__(dim, num_heads)
        self.out = _SHARED


class TableOnCPU(Attention):
    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__(dim, num_heads)
        self.register_buffer("table", torch.zeros(dim, device="cpu"))


class PositionsOnCPU(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        position = torch.arange(x.shape[1], dtype=x.dtype, device="cpu")
        return super().forward(x + position[:, None], context, **options)


class ReadsEmptyMemory(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x, context, **options) + 0.0 * torch.empty(x.shape[2], dtype=x.dtype)


class CountsCalls(Attention):
    calls = 0

    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        self.calls += 1
        return super().forward(x * (1 + self.calls % 2), context, **options)


class Positional(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        position = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        return super().forward(x + position[:, None].sin(), context, **options)


class IgnoresContext(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x, **options)


class WrongGradient(Attention):
    def normalize(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        weights = super().normalize(scores, mask)
        return weights.detach() + 0.5 * (weights - weights.detach())


class IgnoresItsAttention(Attention):
    """Attends, and returns something else."""

    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        attended = super().forward(x, context, **options)
        return self.out(x) + 0.0 * attended.detach()


class MergesHalves(Attention):
    """Two softmaxes over half the keys each, added up: neither has the weights of the whole."""

    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        q, k, v = self.project(x, x)
        return self.merge(
            sum(nn.functional.scaled_dot_product_attention(q, k[:, :, i::2], v[:, :, i::2]) for i in (0, 1))
        )


class BackwardGradient(Attention):
    """Learns in the wrong direction."""

    def merge(self, out: Tensor) -> Tensor:
        y = super().merge(out)
        return 2 * y.detach() - y


class BreaksTheGraph(Attention):
    def forward(self, x: Tensor, context: Any = None, **options: Any) -> Tensor:
        return super().forward(x if x.sum().item() > 1e9 else 1.0 * x, context, **options)
