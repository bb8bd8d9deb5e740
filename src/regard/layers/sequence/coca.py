"""Collinear constrained attention: a key points where its query points in every rotary plane, so near tokens score highest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from regard.catalog.registry import Tags, method
from regard.nn import Attention, Cache, expand_mask
from regard.ops.attend import causal_mask, merge_masks
from regard.ops.positions import rotary_angles, rotate_halves
from regard.ops.rows import single

Queries = Float[Tensor, "b h n d"]
Keys = Float[Tensor, "b g n d"]


# From the tokens of a sequence, the channels that are rotated and the base: the base to use, and what divides positions.
Stretch = Callable[[int, int, float], tuple[float, float]]


@dataclass(frozen=True)
class Linear:
    """Positions divided by ``factor``."""

    factor: float

    def __call__(self, length: int, dim: int, base: float) -> tuple[float, float]:
        return base, self.factor


@dataclass(frozen=True)
class DynamicNTK:
    r"""The base grows with the length: :math:`base \, (f L / L_0 - f + 1)^{d / (d - 2)}` beyond :math:`L_0` trained tokens."""

    factor: float
    trained: int

    def __call__(self, length: int, dim: int, base: float) -> tuple[float, float]:
        growth = self.factor * length / self.trained - (self.factor - 1.0)
        return base * max(growth, 1.0) ** (dim / (dim - 2)), 1.0


def naive(layer: Collinear, x: Tensor, *, mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
    """Planes as complex numbers; for every query its own keys, built and rotated one query after the other."""
    q, t, v = (layer.split(y, g) for y, g in zip((layer.q(x), layer.t(x), layer.v(x)), layer.heads))
    (b, h, n, d), r = q.shape, layer.rotary_dim
    shared = torch.arange(h) // (h // layer.num_kv_heads)
    rates = layer.rope_base ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    turn = torch.polar(torch.ones(n, r // 2, dtype=torch.float64), torch.arange(n)[:, None] * rates)

    def rotate(y: Tensor, by: Tensor) -> Tensor:
        z = torch.complex(y[..., : r // 2], y[..., r // 2 : r]) * by
        return torch.cat((z.real, z.imag, y[..., r:]), -1)

    def fold(y: Tensor) -> Tensor:
        return ((y[..., : y.shape[-1] // 2] + y[..., y.shape[-1] // 2 :]) / 2).relu().repeat(1, 1, 1, 2)

    exact = isinstance(layer, CollinearAttention)
    t = torch.cat((fold(t[..., :r]), t[..., r:].relu()), -1) if exact else fold(t)
    t, v = t[:, shared], v[:, shared]
    everything = torch.ones(b, h, n, n, dtype=torch.bool)
    allowed = merge_masks(everything, causal_mask(n, n) if layer.causal else None, expand_mask(mask))
    assert allowed is not None
    rows = []
    for i in range(n):
        own = q[:, :, i : i + 1]
        keys = rotate(own * t, turn) if exact else own * rotate(t, turn)
        scores = (rotate(own, turn[i]) * keys).sum(-1) / sqrt(d)
        shares = torch.where(allowed[:, :, i], (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
        total = shares.sum(-1, keepdim=True)
        weights = shares / torch.where(total > 0, total, 1.0)
        rows.append(torch.einsum("bhs,bhse->bhe", weights, v).flatten(1))
    return layer.out(torch.stack(rows, 1))


class Collinear(Attention, ABC):
    """What both forms share: coefficients t in the place of keys, positions, and the cache of rotated coefficients."""

    takes_rotary = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = False,
        bias: bool = False,
        rope_base: float = 10000.0,
        rotary_dim: int | None = None,
        stretch: Stretch | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, head_dim, causal=causal, bias=bias, dropout=dropout)
        rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if self.head_dim % 2 or rotary_dim % 2 or not 2 <= rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim={rotary_dim} must be even and at most head_dim={self.head_dim}, which is even"
            )
        if rope_base <= 0:
            raise ValueError(f"rope_base={rope_base} must be positive")
        if stretch is not None and not callable(stretch):
            raise ValueError(
                f"stretch={stretch!r} must be Linear(factor), DynamicNTK(factor, trained) or a like function"
            )
        if isinstance(stretch, DynamicNTK) and rotary_dim == 2:
            raise ValueError(
                f"stretch={stretch} changes nothing with rotary_dim=2: one plane turns at rate 1 at any base"
            )
        # Another name than that of keys: coefficients and a pretrained key projection do not mean the same.
        self.t = self.k
        del self.k
        self.rope_base, self.rotary_dim, self.stretch = rope_base, rotary_dim, stretch

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.num_kv_heads

    @abstractmethod
    def features(self, q: Queries, t: Keys, angles: Float[Tensor, "..."]) -> tuple[Queries, Keys]:
        """Queries and keys whose dot product is the score."""

    def angles(self, positions: Float[Tensor, "*n"], length: int) -> Float[Tensor, "*n m"]:
        """Radians of every position, one for each plane, in a sequence of ``length`` tokens."""
        stretch = (
            (self.rope_base, 1.0) if self.stretch is None else self.stretch(length, self.rotary_dim, self.rope_base)
        )
        return rotary_angles(positions / stretch[1], self.rotary_dim, stretch[0])

    def project(
        self, x: Tensor, context: Tensor, start: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if context is not x:
            raise ValueError("context was given to collinear attention, whose positions are those of x")
        end = start + x.shape[1]
        if start and self.stretch is not None:
            now, then = (self.stretch(length, self.rotary_dim, self.rope_base) for length in (end, start))
            if now != then:
                raise ValueError(
                    f"stretch={self.stretch} turns {end} tokens at other rates than the {start} that are cached; for "
                    f"decoding give the layer the base of its longest sequence, such as rope_base={now[0]:.6g}"
                )
        q, t, v = (self.split(y, g) for y, g in zip((self.q(x), self.t(x), self.v(x)), self.heads))
        kind = torch.promote_types(x.dtype, torch.float32)
        own = torch.arange(start, end, device=x.device) if positions is None else positions[:, None]
        features = self.features(single(q), single(t), self.angles(own.to(kind), end))
        return features[0].to(q.dtype), features[1].to(q.dtype), v

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        if positions is None:
            return super().forward(x, context, mask=mask, grid=grid, cache=cache)
        if positions.shape != x.shape[:2]:
            raise ValueError(f"positions must be {tuple(x.shape[:2])}; got {tuple(positions.shape)}")
        if positions.numel() and positions.min() < 0:
            raise ValueError(f"positions are counted from 0; got {int(positions.min())}")
        return self.merge(self.seam(*self.prepare(x, context, mask, cache, positions=positions)))


@method(
    "coca",
    kind="layer",
    tags=Tags(causal=True, mask=True, cache=True, grouped=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class CollinearAttention(Collinear):
    r"""Attention whose key, for every query, is that query itself, scaled in each rotary plane by a coefficient of the token.

    With rotary positions a score is a sum of :math:`|q_a| |k_a| \cos(\phi_a + (i - j) \theta_a)` over planes a; where the
    angle :math:`\phi_a` between query and key is not zero, near tokens score *less* than somewhat farther ones, and the
    order breaks beyond the trained length. Here :math:`\phi_a = 0`: keys are :math:`k_{ij} = t_j \odot q_i` with
    :math:`t_j \ge 0`, one number per plane. No key is ever built, as the score is a plain dot product of features:

    .. math::

        s_{ij} = \frac{1}{\sqrt d} \sum_a t_{j,a}\, |q_{i,a}|^2 \cos((i - j)\, \theta_a)
               = \frac{1}{\sqrt d} \sum_a |q_{i,a}|^2 \binom{\cos i \theta_a}{\sin i \theta_a} \cdot
                 t_{j,a} \binom{\cos j \theta_a}{\sin j \theta_a}

    with :math:`t_{j,a} = \mathrm{ReLU}\big((T_{j,a} + T_{j,a+d/2}) / 2\big)`, T = x W^T in the place of the key
    projection, and plane a of channels a and a + d/2. The fused kernel runs on the features. A score is even in i - j:
    without the causal mask left and right are the same.

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of coefficients and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head, d, even; default ``dim // num_heads``.
        causal: no token looks at a later one.
        bias: of the projections to q, t and v.
        rope_base: the longest wavelength is nearly 2 pi times it.
        rotary_dim: channels that are rotated, the first ones, even; the others score :math:`q_c^2 \mathrm{ReLU}(T_c)`.
        stretch: for longer sequences than those of training, :class:`Linear` or :class:`DynamicNTK`.
        dropout: of the weights, in training.

    Shape: x (b, n, dim) -> (b, n, dim); weights (b, num_heads, n, s). ``positions`` (b, n), counted from 0, where they are
    not 0 .. n - 1 after what is cached; only their differences matter here.

    Raises:
        ValueError: heads that do not divide, odd widths, a context, positions of another shape or below 0, a cache that
            grows past the length to which its keys were stretched.

    Cost: that of attention, with as many parameters and as large a cache (:math:`t_j` rotated, and v), and O(b n c) more.

    Example:
        >>> layer = CollinearAttention(dim=32, num_heads=4, causal=True)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> here, there = (layer.scores(*layer.project(x, x, start)[:2]) for start in (0, 90))
        >>> torch.allclose(here, there, atol=1e-5)
        True

    Differs: this is the paper's equation; the released code computes something else (:class:`OfficialCollinearAttention`).
    Under ``rotary_dim`` coefficients are paired within the rotated channels, without which keys would not be collinear.
    The projection is named ``t``: swapped into a trained model it starts anew, as keys and coefficients differ in meaning.
    Stretched dynamically, a sequence cannot be decoded past the length of its cached keys; the released code goes on with
    keys turned at old rates. Without causal mask by default, as all layers here.

    Reference: Shiyi Zhu, Jing Ye, Wei Jiang, Siqiao Xue, Qi Zhang, Yifan Wu, Jianguo Li, Cure the headache of Transformers
    via Collinear Constrained Attention, ACL 2024 (as "CoCA: Fusing Position Embedding with Collinear Constrained Attention
    in Transformers for Long Context Window Extending"), arXiv:2309.08646
    """

    def features(self, q: Queries, t: Keys, angles: Float[Tensor, "..."]) -> tuple[Queries, Keys]:
        m, cos, sin = angles.shape[-1], angles.cos(), angles.sin()
        size = q[..., :m].square() + q[..., m : 2 * m].square()
        share = ((t[..., :m] + t[..., m : 2 * m]) / 2).relu()
        return (
            torch.cat((size * cos, size * sin, q[..., 2 * m :].square()), -1),
            torch.cat((share * cos, share * sin, t[..., 2 * m :].relu()), -1),
        )


@method(
    "coca-official",
    kind="layer",
    paper="coca",
    tags=Tags(causal=True, mask=True, cache=True, grouped=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class OfficialCollinearAttention(Collinear):
    r"""Collinear attention as the released code computes it: the rotated query times the query, against rotated coefficients.

    .. math:: s_{ij} = \frac{1}{\sqrt d} \sum_c q_{i,c}\, (R_i q_i)_c\, (R_j [t_j, t_j])_c

    A rotation does not commute with a product of channels unless both channels of a plane are multiplied alike. That holds
    for t and not for q: :math:`q \odot R_j [t, t]` is not collinear with q, and the score depends on where the pair stands
    and not only on i - j. Arguments, shapes and cost are those of :class:`CollinearAttention`; use it to run weights that
    were trained with the released code. ``positions`` matter here: give them where a batch is padded on the left.

    Example:
        >>> OfficialCollinearAttention(dim=32, num_heads=4)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def features(self, q: Queries, t: Keys, angles: Float[Tensor, "..."]) -> tuple[Queries, Keys]:
        first, second = t.chunk(2, -1)
        share = ((first + second) / 2).relu()
        return q * rotate_halves(q, angles), rotate_halves(torch.cat((share, share), -1), angles)
