"""Lightweight and dynamic convolution: a softmax over the places of a window, fixed or predicted from the token in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product
from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalog.registry import Tags, method
from regard.nn import Cache, expand_mask
from regard.ops.attend import softmax

TAGS = Tags(causal=True, mask=True, cache=True)


def naive(layer: SequenceConvolution, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None) -> Tensor:
    """Token by token, head by head, tap by tap."""
    u, allowed = layer.enter(x), expand_mask(mask)
    (b, n, c), heads, kernel = u.shape, layer.num_heads, layer.kernel
    if allowed is not None:
        allowed = allowed.expand(b, heads, n, n)
    rows = []
    for r, i, h in product(range(b), range(n), range(heads)):
        own, out = slice(h * c // heads, (h + 1) * c // heads), torch.zeros(c // heads, dtype=x.dtype)
        if isinstance(kernel, nn.Linear):
            shares = (kernel.weight.unflatten(0, (heads, -1))[h] @ u[r, i]).exp()
        else:
            shares = kernel[h].exp()
        taps = [(k, i + k - layer.left) for k in range(layer.kernel_size)]
        seen = [(k, j) for k, j in taps if 0 <= j < n and (allowed is None or allowed[r, h, i, j])]
        total = sum(shares[k] for k, _ in (seen if layer.renorm_padding else taps))
        for k, j in seen:
            out = out + shares[k] / total * u[r, j, own]
        rows.append(out)
    return layer.out(torch.stack(rows).view(b, n, c))


def convolve(
    u: Float[Tensor, "b h s d"], kernels: Float[Tensor, "_ h _ k"], n: int, left: int
) -> Float[Tensor, "b h n d"]:
    r"""The last ``n`` tokens of u, each with a kernel of its own, :math:`y_i = \sum_k w_{ik}\, u_{i+k-left}`.

    Tokens beyond the ends are zero. Blocks of as many queries as there are taps are a matrix product each: two times the
    work of the sum itself, by a dense kernel, and memory that grows with n alone.

    Args:
        kernels: (b, h, n, k), or with one row that all tokens share.
        left: taps before the token.
    """
    taps, s, shared = kernels.shape[-1], u.shape[2], kernels.shape[2] == 1
    rows = min(taps, n)
    count = -(-n // rows)
    spare = count * rows - n
    windows = F.pad(u, (0, 0, left + n - s, taps - 1 - left + spare)).unfold(2, rows + taps - 1, rows)
    if shared:
        blocks = kernels[:, :, None].expand(-1, -1, 1, rows, -1)
    else:
        blocks = F.pad(kernels, (0, 0, 0, spare)).unflatten(2, (count, rows))
    # A row wider than the band by one: read without it, row r has its taps at r .. r + k - 1.
    band = F.pad(blocks, (0, rows)).flatten(-2)[..., : rows * (rows + taps - 1)].unflatten(-1, (rows, -1))
    return (band @ windows.transpose(-1, -2)).flatten(2, 3)[:, :, :n]


class Recent:
    """The newest ``size`` tokens that a causal convolution goes on reading, (b, h, size, d) or fewer.

    A cache in the sense of :class:`regard.nn.Cache` whose keys are the tokens themselves; it holds no values.
    """

    def __init__(self, held: Float[Tensor, "b h 0 d"], size: int) -> None:
        self.held, self.size, self.position = held, size, 0

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (b, h, n, d) tokens; returns those held before and the new ones, twice."""
        if k.shape[:2] != self.held.shape[:2] or k.shape[-1] != self.held.shape[-1] or k.dtype != self.held.dtype:
            raise ValueError(
                f"k is {tuple(k.shape)}, {k.dtype}; the cache has {tuple(self.held.shape)}, {self.held.dtype}"
            )
        known = torch.cat([self.held, k], 2)
        self.position += k.shape[2]
        self.held = known[:, :, max(0, known.shape[2] - self.size) :].clone()
        return known, known

    def keep(self, index: Tensor) -> None:
        raise ValueError("a convolution reads the tokens next to each other: none can be taken out from between")

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.held = self.held[rows]


class SequenceConvolution(nn.Module, ABC):
    """What both forms share: a gated projection, a convolution whose kernel is shared by the channels of a head, another."""

    form = "convolution"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        kernel_size: int = 31,
        *,
        causal: bool = False,
        glu: bool = True,
        renorm_padding: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}, or give head_dim")
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size} must be positive")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.kernel_size, self.causal, self.glu = kernel_size, causal, glu
        self.left = kernel_size - 1 if causal else (kernel_size - 1) // 2
        self.renorm_padding, self.dropout = renorm_padding, dropout
        inner = num_heads * self.head_dim
        self.input, self.out = nn.Linear(dim, 2 * inner if glu else inner), nn.Linear(inner, dim)
        for linear in (self.input, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.kernel = self.make_kernel()

    @abstractmethod
    def make_kernel(self) -> nn.Linear | nn.Parameter:
        """What the kernels come from, as the paper's form starts it."""

    @abstractmethod
    def logits(self, u: Float[Tensor, "b n e"]) -> Float[Tensor, "_ h _ k"]:
        """Of the kernels: (b, h, n, k), or (1, h, 1, k) where all tokens share theirs."""

    def normalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Over the taps, of which only those ``seen`` count where there is such a mask."""
        return softmax(logits if seen is None else torch.broadcast_tensors(logits, seen)[0], seen)

    def enter(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        """What is convolved."""
        return F.glu(self.input(x), -1) if self.glu else self.input(x)

    def seen(self, mask: Tensor | None, n: int, s: int, device: torch.device) -> Bool[Tensor, "_ _ n k"]:
        """The taps of the last n of s tokens that are not beyond the ends, nor masked."""
        taps = torch.arange(self.kernel_size, device=device) - self.left
        places = torch.arange(s - n, s, device=device)[:, None] + taps
        inside = (places >= 0) & (places < s)
        mask = expand_mask(mask)
        if mask is None:
            return inside[None, None]
        if mask.shape[-2] not in (1, n) or mask.shape[-1] != s:
            raise ValueError(f"mask must be about {n} tokens that read {s}; got {tuple(mask.shape)}")
        rows = mask.expand(-1, -1, n, -1)
        return rows.gather(-1, places.clamp(0, s - 1).expand(*rows.shape[:2], -1, -1)) & inside

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (b, n, {self.dim}); got {tuple(x.shape)}")
        n, s, u = x.shape[1], x.shape[1], self.enter(x)
        logits, tokens = self.logits(u), u.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if cache is not None:
            if not self.causal:
                raise ValueError("cache was given to a layer that is not causal: its tokens also read later ones")
            s += cache.position
            tokens = cache.append(tokens, tokens)[0][:, :, -(self.left + n) :]
        counted = mask is not None or self.renorm_padding
        seen = self.seen(mask, n, s, x.device) if counted else None
        kernels = F.dropout(self.normalize(logits, seen if self.renorm_padding else None), self.dropout, self.training)
        if seen is not None:
            kernels = kernels.masked_fill(~seen, 0.0)
        return self.out(convolve(tokens, kernels, n, self.left).transpose(1, 2).flatten(2))

    def new_cache(self, batch: int, capacity: int, **where: object) -> Recent:
        """An empty cache; it holds ``kernel_size`` - 1 tokens at most, whatever the ``capacity``."""
        held = torch.zeros(batch, self.num_heads, 0, self.head_dim, **where)  # type: ignore[call-overload]
        return Recent(held, self.kernel_size - 1)


@method(
    "dynamic-convolution",
    kind="layer",
    tags=TAGS,
    example={"dim": 32, "num_heads": 4, "kernel_size": 5},
    naive=naive,
)
class DynamicConvolution(SequenceConvolution):
    r"""A convolution over time whose kernel every token predicts for itself, in the place of self-attention.

    A token looks at a window around it with weights that depend on what it is, and not on what stands there: nothing is
    compared, so the cost is linear in the length. The channels of a head share a kernel, normalised by a softmax over
    the window.

    .. math::
        y = \Big(\sum_{k} \mathrm{softmax}_k(W^k_h u_i)\; u_{i + k - P,\, [h]}\Big)_h W^o, \qquad
        u = \mathrm{GLU}(x W^u)

    with :math:`P = K - 1` in a causal layer, else half of the window. Weights sum to one over the whole window, also over
    the part that is beyond the ends or masked: there outputs are smaller.

    Args:
        dim: channels in and out.
        num_heads: kernels at every token; head h owns channels h d to (h + 1) d of u.
        head_dim: channels of one head, d; default ``dim // num_heads``.
        kernel_size: tokens in the window, K; of an even number one more stands after the token than before.
        causal: the window ends at the token.
        glu: gate the input projection by another one; without it that is half as wide.
        renorm_padding: let weights sum to one over the tokens in the window that there are and may be seen.
        dropout: of the normalised weights, in training.

    Shape: x (b, n, dim) -> (b, n, dim). ``mask`` as for attention: (b, n) zeroes the padding of u; in masks about pairs
    those in the window count.

    Raises:
        ValueError: heads that do not divide, an empty window, a mask of other length or type, a cache in a layer that is
            not causal.

    Cost: 4 b n K c FLOPs for the sum and 2 b n c h K for the kernels, which are c h K parameters; memory b h n K. A cache
    holds K - 1 tokens, b (K - 1) c numbers.

    Example:
        >>> layer = DynamicConvolution(dim=32, num_heads=4, kernel_size=7)
        >>> layer(torch.randn(2, 20, 32)).shape
        torch.Size([2, 20, 32])
        >>> layer.kernel.weight.numel() == 32 * 4 * 7
        True

    Differs: where the window is longer than the sequence the official code has two answers; here, as in its short-sequence
    form, the softmax is over the whole window and taps beyond the ends are dropped after it. Masks about pairs are an
    addition. The encoders, decoders and fused kernels of the paper are not here.

    Reference: Felix Wu, Angela Fan, Alexei Baevski, Yann N. Dauphin, Michael Auli, Pay Less Attention with Lightweight and
    Dynamic Convolutions, ICLR 2019, arXiv:1901.10430.
    """

    kernel: nn.Linear

    def make_kernel(self) -> nn.Linear:
        linear = nn.Linear(self.num_heads * self.head_dim, self.num_heads * self.kernel_size, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        return linear

    def logits(self, u: Float[Tensor, "b n e"]) -> Float[Tensor, "b h n k"]:
        return self.kernel(u).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@method(
    "dynamic-convolution-lightweight",
    kind="layer",
    paper="dynamic-convolution",
    tags=TAGS,
    example={"dim": 32, "num_heads": 4, "kernel_size": 5},
    naive=naive,
)
class LightweightConvolution(SequenceConvolution):
    r"""A convolution over time with one softmax-normalised kernel a head, the same for every token.

    As :class:`DynamicConvolution`, with h K parameters in the place of what predicts the kernels.

    .. math:: y = \Big(\sum_{k} \mathrm{softmax}_k(w_h)\; u_{i + k - P,\, [h]}\Big)_h W^o, \qquad u = \mathrm{GLU}(x W^u)

    Args:
        dim: as for :class:`DynamicConvolution`, and all that follow.

    Cost: 4 b n K c FLOPs.

    Example:
        >>> LightweightConvolution(dim=32, num_heads=4, kernel_size=7).kernel.shape
        torch.Size([4, 7])

    Reference: Felix Wu, Angela Fan, Alexei Baevski, Yann N. Dauphin, Michael Auli, Pay Less Attention with Lightweight and
    Dynamic Convolutions, ICLR 2019, arXiv:1901.10430.
    """

    kernel: nn.Parameter

    def make_kernel(self) -> nn.Parameter:
        bound = sqrt(6 / (self.kernel_size * (1 + self.num_heads)))
        return nn.Parameter(torch.empty(self.num_heads, self.kernel_size).uniform_(-bound, bound))

    def logits(self, u: Float[Tensor, "b n e"]) -> Float[Tensor, "1 h 1 k"]:
        return self.kernel[None, :, None]
