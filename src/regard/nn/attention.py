"""The base of every layer that is, at heart, weights times values."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.nn.cache import Cache, KVCache
from regard.nn.rotary import Rotary
from regard.ops import attend as ops


def expand_mask(mask: Tensor | None) -> Tensor | None:
    """A layer's ``mask`` as (b, h, l, s): 2-D is (b, s) valid keys, 3-D is (b, l, s), 4-D is taken as it is.

    Raises ValueError when it is not boolean: True means "may look".
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where a query may look; got {mask.dtype}")
    match mask.ndim:
        case 2:
            return mask[:, None, None, :]
        case 3:
            return mask[:, None]
        case 4:
            return mask
    raise ValueError(f"mask must be (b, s), (b, l, s) or (b, h, l, s); got {tuple(mask.shape)}")


class Attention(nn.Module):
    r"""Multi-head attention in five stages: project, scores, normalize, mix, merge.

    A subclass overrides the stages in which its paper differs. While ``scores``, ``normalize`` and ``mix`` are those of
    this class the fused kernel runs; as soon as one is overridden the matrix is in the open.

    .. math:: y = \mathrm{merge}\big(\mathrm{softmax}(q k^\top / \sqrt d)\, v\big)

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v; the output projection always has one.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim). ``mask`` is boolean, True where a query may look: (b, s),
    (b, n, s) or (b, h, n, s). With a ``cache`` the keys and values of earlier calls come first.

    A layer has no sense of place of its own. ``layer.rotary = Rotary(rates)`` turns queries and keys of self-attention after
    their projection; ``takes_rotary`` is false where a paper's scores bring their positions along.
    """

    form = "softmax"
    takes_rotary = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}, or give head_dim")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.scale = self.head_dim**-0.5
        self.causal, self.dropout = causal, dropout
        context_dim = dim if context_dim is None else context_dim
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k = nn.Linear(context_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(context_dim, num_kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim)
        self.rotary: Rotary | None = None

    @property
    def fused(self) -> bool:
        return all(getattr(type(self), n) is getattr(Attention, n) for n in ("scores", "normalize", "mix"))

    def split(self, x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; ``start`` is the position of the first token of ``x`` (cached decoding)."""
        return (
            self.split(self.q(x), self.num_heads),
            self.split(self.k(context), self.num_kv_heads),
            self.split(self.v(context), self.num_kv_heads),
        )

    def scores(self, q: Float[Tensor, "b h l d"], k: Float[Tensor, "b g s d"]) -> Float[Tensor, "b h l s"]:
        return ops.scores(q, k, scale=self.scale)

    def normalize(self, scores: Float[Tensor, "b h l s"], mask: Tensor | None) -> Float[Tensor, "b h l s"]:
        return ops.softmax(scores, mask)

    def mix(self, weights: Float[Tensor, "b h l s"], v: Float[Tensor, "b g s e"]) -> Float[Tensor, "b h l e"]:
        return ops.mix(weights, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b h l e"]:
        """Weights times values: fused, or stage by stage when a stage is the paper's own."""
        dropout = self.dropout if self.training else 0.0
        if self.fused:
            return ops.attend(q, k, v, mask=mask, causal=self.causal, scale=self.scale, dropout=dropout)
        ops.check_heads(q, k, v)
        if self.causal:
            mask = ops.merge_masks(mask, ops.causal_mask(q.shape[2], k.shape[2], q.device))
        weights = self.normalize(self.scores(q, k), mask)
        return self.mix(nn.functional.dropout(weights, dropout, self.training), v)

    def seam(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b h l e"]:
        """:meth:`attend`, as it is called from outside: a watch on the layer stands around this call."""
        return self.attend(q, k, v, mask)

    def merge(self, out: Float[Tensor, "b h l e"]) -> Float[Tensor, "b l c"]:
        return self.out(out.transpose(1, 2).flatten(2))

    def prepare(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, cache: Cache | None, **where: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What :meth:`seam` is called with: projected (``where`` goes to :meth:`project`), turned, with what is cached."""
        if x.ndim != 3:
            raise ValueError(f"x must be (b, n, {self.dim}); got {tuple(x.shape)}")
        if context is not None and self.causal:
            raise ValueError("context was given to a causal layer: a causal layer attends to its own past")
        start = 0 if cache is None else cache.position
        q, k, v = self.project(x, x if context is None else context, start, **where)
        if self.rotary is not None and context is None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        if cache is not None:
            k, v = cache.append(k, v)
        allowed = expand_mask(mask)
        if allowed is not None and allowed.shape[-1] not in (1, k.shape[2]):
            raise ValueError(
                f"mask {tuple(allowed.shape)} is for {allowed.shape[-1]} keys, of which there are {k.shape[2]}"
            )
        return q, k, v, allowed

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        return self.merge(self.seam(*self.prepare(x, context, mask, cache)))

    def new_cache(self, batch: int, capacity: int, **where: object) -> KVCache:
        """An empty cache of the right shape for this layer; ``where`` takes dtype and device."""
        v_dim = self.v.out_features // self.num_kv_heads
        return KVCache(batch, self.num_kv_heads, capacity, self.head_dim, v_dim, **where)  # type: ignore[arg-type]
