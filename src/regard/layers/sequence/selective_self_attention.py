"""Selective self-attention: every token learns how sharply it looks and how much it contributes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Attention, Cache, expand_mask
from regard.ops.attend import causal_mask, merge_masks
from regard.ops.rows import single


def naive(
    layer: SelectiveSelfAttention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Float[Tensor, "b n c"]:
    """One query after the other: its scores times its temperature, and values times theirs."""
    source = x if context is None else context
    q, k, v = Attention.project(layer, x, source)
    (b, h, l, d), (g, s) = q.shape, k.shape[1:3]
    at = torch.arange(l).expand(b, l) if positions is None else positions
    at_v = at if context is None else torch.arange(s).expand(b, s)
    everything = torch.ones(b, h, l, s, dtype=torch.bool)
    allowed = merge_masks(everything, causal_mask(l, s) if layer.causal else None, expand_mask(mask))
    assert allowed is not None

    def tau(temperature: Temperature, heads: Tensor, place: Tensor) -> Tensor:
        w = temperature.token.get_parameter("weight")[:, 0]
        token = torch.einsum("bhnd,hd->bhn", F.gelu(heads), w).tanh()
        return token + 1 + temperature.slope() * (place[:, None] + 1.0).double().log()

    sharpness = tau(layer.q_temperature, q, at)
    shared = torch.arange(h) // (h // g)
    k, v = k[:, shared], (tau(layer.v_temperature, v, at_v)[..., None] * v)[:, shared]
    rows = []
    for t in range(l):
        logits = sharpness[:, :, t, None] * torch.einsum("bhd,bhsd->bhs", q[:, :, t], k) / d**0.5
        shares = torch.where(allowed[:, :, t], (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
        total = shares.sum(-1, keepdim=True)
        weights = shares / torch.where(total > 0, total, 1.0)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights, v).flatten(1))
    return layer.out(torch.stack(rows, 1))


class ProjectedFeature(nn.Module):
    r"""One number per token and head from what is projected anyway, :math:`f = w_h \cdot \mathrm{GELU}(x W_h)`.

    It starts at zero.

    Shape: (b, heads, n, head_dim) -> (b, heads, n).
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 1, head_dim))

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
        return (F.gelu(x) @ self.weight.mT).squeeze(-1)


class SigmoidSlope(nn.Module):
    r"""The paper's growth of a temperature with the logarithm of the position, :math:`\sigma(\alpha)`."""

    def __init__(self, alpha: float = -6.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def forward(self) -> Float[Tensor, ""]:
        return self.alpha.sigmoid()


class GompertzSlope(nn.Module):
    r"""The official code's growth of a temperature, :math:`\exp(-\exp(\beta))`; above 3 nothing is left of it.

    It starts at 1.5 for GPT-2, at 2 for Pythia and Llama.
    """

    def __init__(self, beta: float = 1.5) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def forward(self) -> Float[Tensor, ""]:
        return (-self.beta.exp()).exp()


class Temperature(nn.Module):
    r"""The inverse temperature of every token, from what it is and where it is.

    .. math:: \tau(x, n) = \tanh(f(x)) + 1 + s \log n, \qquad n = \mathrm{position} + 1

    To use it on any attention multiply queries and values with it, after a norm of the queries; a rotation by position
    commutes with it.

    Args:
        token: f, a module that gives one number per token, such as :class:`ProjectedFeature` or a perceptron.
        slope: s, a module that gives one number: :class:`SigmoidSlope` or :class:`GompertzSlope`.

    Shape: ``x`` as ``token`` takes it, ``positions`` broadcastable to what it gives -> as ``token`` gives, in single
    precision or better.

    Raises:
        ValueError: a negative position.
    """

    def __init__(self, token: nn.Module, slope: nn.Module) -> None:
        super().__init__()
        self.token, self.slope = token, slope

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        f = single(self.token(x))
        return f.tanh() + 1.0 + self.slope().to(f.dtype) * (positions.to(f.dtype) + 1.0).log()


@method(
    "selective-self-attention",
    kind="layer",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class SelectiveSelfAttention(Attention):
    r"""Attention in which a learned temperature scales each query, for sharpness, and each value, for its contribution.

    What a query attends to and how sparsely it does so are one quantity in softmax attention, the size of its scores.
    Here the direction of a query says what, and :math:`\tau_q` how sharply; sharpness may also grow with the position,
    so that attention does not thin out over a long context. :math:`\tau_v` turns noisy tokens down. Only queries and
    values are scaled, so the fused kernel and the cache stay what they are.

    .. math::

        y = \mathrm{softmax}\big(\tau_q\, q\, k^\top / \sqrt d\big)\, (\tau_v\, v), \qquad
        \tau(x, n) = \tanh(f(x)) + 1 + \sigma(\alpha) \log n

    with n = 1 for the first token, :math:`f(x) = w_h \cdot \mathrm{GELU}(x W_h)` on the projection that is scaled, w
    per head and :math:`\alpha` per layer, one pair for queries and one for values.

    Args:
        dim: channels in and out.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, dividing ``num_heads``; default ``num_heads``.
        head_dim: channels of one head; default ``dim // num_heads``.
        context_dim: channels of ``context``; default ``dim``.
        causal: no token looks at a later one.
        bias: of the projections to q, k and v.
        dropout: of the weights, in training.

    Shape: x (b, n, dim), context (b, s, context_dim) -> (b, n, dim); weights (b, num_heads, n, s). ``positions`` (b,
    n), counted from 0, are those of x where they are not 0 .. n - 1 after what is cached, as in a batch padded on the
    left. The tokens of a context stand at 0 .. s - 1.

    Raises:
        ValueError: heads that do not divide, positions of another shape or below 0.

    Cost: that of attention, and 2 b n c FLOPs; h d + g d + 2 more parameters for g key heads.

    Example:
        >>> layer = SelectiveSelfAttention(dim=32, num_heads=4, causal=True)
        >>> x = torch.randn(2, 7, 32)
        >>> layer(x).shape
        torch.Size([2, 7, 32])
        >>> q, _, _ = Attention.project(layer, x, x)
        >>> layer.q_temperature(q, torch.arange(7)).shape
        torch.Size([2, 4, 7])

    Differs: keys are not scaled (the paper finds little in it). The vector w starts at zero and :math:`\alpha` at -6,
    so that a layer begins within :math:`0.0025 \log n` of plain attention. How weights are shared is a reading of the
    paper: its code holds only the position's part, for queries, with another slope (:class:`GompertzSelfAttention`).

    Reference: Xuechen Zhang, Xiangyu Chang, Mingchen Li, Amit Roy-Chowdhury, Jiasi Chen, Samet Oymak, Selective
    Attention: Enhancing Transformer through Principled Context Control, NeurIPS 2024, arXiv:2411.12892.
    """

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
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, context_dim=context_dim, causal=causal, bias=bias, dropout=dropout
        )
        self.q_temperature = Temperature(ProjectedFeature(self.num_heads, self.head_dim), self.make_slope())
        self.v_temperature = Temperature(ProjectedFeature(self.num_kv_heads, self.head_dim), self.make_slope())

    def make_slope(self) -> nn.Module:
        """How a temperature grows with the position."""
        return SigmoidSlope()

    def project(
        self, x: Tensor, context: Tensor, start: int = 0, positions: Int[Tensor, "b n"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, start)
        own = start + torch.arange(x.shape[1], device=x.device) if positions is None else positions[:, None]
        tau_q = self.q_temperature(q, own)
        tau_v = self.v_temperature(v, own if context is x else torch.arange(context.shape[1], device=x.device))
        return (q * tau_q[..., None]).to(q.dtype), k, (v * tau_v[..., None]).to(v.dtype)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b s e"] | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        positions: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        if positions is None:
            return super().forward(x, context, mask=mask, grid=grid, cache=cache)
        if self.rotary is not None:
            raise ValueError("positions cannot be given to a layer with rotary positions, which counts its own")
        if positions.shape != x.shape[:2]:
            raise ValueError(f"positions must be {tuple(x.shape[:2])}; got {tuple(positions.shape)}")
        if positions.numel() and positions.min() < 0:
            raise ValueError(f"positions are counted from 0; got {int(positions.min())}")
        return self.merge(self.seam(*self.prepare(x, context, mask, cache, positions=positions)))


@method(
    "selective-self-attention-gompertz",
    kind="layer",
    paper="selective-self-attention",
    tags=Tags(cross=True, causal=True, mask=True, cache=True, grouped=True),
    example={"dim": 32, "num_heads": 4},
    naive=naive,
)
class GompertzSelfAttention(SelectiveSelfAttention):
    r"""Selective self-attention whose temperatures grow with the position as in the official code.

    .. math:: \tau(x, n) = \tanh(f(x)) + 1 + e^{-e^{\beta}} \log n

    Args:
        dim: as for :class:`SelectiveSelfAttention`, and all that follow.

    Shape: x (b, n, dim) -> (b, n, dim).

    Cost: that of :class:`SelectiveSelfAttention`.

    Example:
        >>> layer = GompertzSelfAttention(dim=32, num_heads=4, causal=True)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    Differs: the official code multiplies the scores of a query, and has no part that depends on the token and none for
    values; here they start at nothing, and values have the same slope as queries.

    Reference: Xuechen Zhang, Xiangyu Chang, Mingchen Li, Amit Roy-Chowdhury, Jiasi Chen, Samet Oymak, Selective
    Attention: Enhancing Transformer through Principled Context Control, NeurIPS 2024, arXiv:2411.12892.
    """

    def make_slope(self) -> nn.Module:
        return GompertzSlope()
