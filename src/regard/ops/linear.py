r"""Attention without a softmax, for queries and keys that have been through their feature map already.

Bidirectional: :func:`linear_attend` and its norm-free form :func:`linear_attend_image`. Causal, with a state that
decays: :func:`linear_attend_causal`. Sums are in float32 or wider. Heads are grouped as in :mod:`regard.ops.attend`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.attend import check_heads, widen


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _masked_keys(k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Keys with the masked ones zero, and how many are left, at least one."""
    if mask is None:
        return k, max(1, k.shape[2])
    allowed = mask[:, None, :, None]
    return k.masked_fill(~allowed, 0.0), allowed.sum(2, keepdim=True).clamp(min=1).to(k.dtype)


def _per_key_head(q: Tensor, states: Tensor) -> Tensor:
    """:math:`q S` for every query head, (b, h, l, d) and (b, g, d, e) -> (b, h, l, e)."""
    b, h, l, d = q.shape
    return (q.reshape(b, states.shape[1], -1, d) @ states).view(b, h, l, states.shape[-1])


def linear_attend_image(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Bool[Tensor, "#b s"] | None = None,
) -> Float[Tensor, "b h l e"]:
    r"""The mean of :math:`(q_i \cdot k_j)\, v_j` over the keys, in O(n d e); no row sum is divided by.

    .. math:: o_i = q_i \sum_j (k_j n^{-1/2})^\top (v_j n^{-1/2})

    Both factors carry :math:`n^{-1/2}`, so that neither overflows in half precision.

    Args:
        mask: (b, s), True on the keys that exist; n counts them. A sample with none is zero.
    """
    check_heads(q, k, v)
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    k, n = _masked_keys(k, mask)
    root = n**-0.5
    return _per_key_head(q, (k * root).transpose(-1, -2) @ (v * root)).to(dtype)


def linear_attend(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Bool[Tensor, "#b s"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "b h l e"]:
    r"""Attention whose weights are :math:`q_i \cdot k_j` over their row sum, in O(n d e).

    .. math:: o_i = \frac{q_i \cdot \frac1n \sum_j k_j^\top v_j}{q_i \cdot \frac1n \sum_j k_j + \epsilon}

    Args:
        q, k: after the feature map, which should leave them non-negative.
        mask: (b, s), True on the keys that exist. A sample with none is zero.
        eps: added to the mean of a row.
    """
    check_heads(q, k, v)
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    kept, n = _masked_keys(k, mask)
    mean = (kept / n).sum(2).unsqueeze(-1)
    return (linear_attend_image(q, k, v, mask) / (_per_key_head(q, mean) + eps)).to(dtype)


def _ratios(decay: Float[Tensor, "b h c"]) -> Float[Tensor, "b h c c"]:
    r"""What is left at step t of what came in at step s: :math:`\prod_{i=s+1}^{t} \lambda_i`, zero for s > t.

    As products, not as differences of logarithms: a decay of zero is exact, in value and gradient.
    """
    steps = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device)
    return torch.where(steps.tril(-1), decay[..., None], 1.0).cumprod(-2).tril()


def linear_attend_causal(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    decay: Float[Tensor, "..."] | None = None,
    state: Float[Tensor, "..."] | None = None,
    chunk: int = 64,
    normalize: bool = False,
) -> tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h d f"]]:
    r"""Causal linear attention with a decaying state, chunk by chunk.

    .. math:: S_t = \lambda_t S_{t-1} + k_t^\top v_t, \qquad o_t = q_t S_t

    so that key s weighs :math:`(q_t \cdot k_s) \prod_{i=s+1}^{t} \lambda_i` and a token's own weight never decays.
    The result does not depend on ``chunk``, nor on where a sequence is split when the state of the first part is given
    to the second. Time O(l (chunk + d) e), state d e numbers a head. A padded key is left out by making it zero.

    Args:
        decay: :math:`\lambda` in [0, 1], one per head (h,) or one per head and step (b, h, l); default 1.
        state: what an earlier call returned, (b, h, d, e) or (b, h, d, e + 1); default zero.
        chunk: tokens that are multiplied at once.
        normalize: divide by the sum of the row's weights (a row whose sum is zero stays zero). The state has one more
            column then, the running sum of keys.

    Returns:
        the output and the state after the last token, (b, h, d, e) or (b, h, d, e + 1), in float32 or wider.
    """
    groups = check_heads(q, k, v)
    (b, h, l, d), e = q.shape, v.shape[-1]
    if k.shape[2] != l:
        raise ValueError(f"q has {l} tokens but k has {k.shape[2]}; a causal scan needs one key per query")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if decay is not None and decay.shape not in ((h,), (b, h, l)):
        raise ValueError(f"decay must be ({h},) or ({b}, {h}, {l}); got {tuple(decay.shape)}")
    columns = e + 1 if normalize else e
    if state is not None and state.shape != (b, h, d, columns):
        raise ValueError(f"state must be ({b}, {h}, {d}, {columns}); got {tuple(state.shape)}")
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    decay = q.new_ones(1) if decay is None else decay.to(q.dtype)
    steps = decay[:, None].expand(1, -1, l) if decay.ndim == 1 else decay
    carried = q.new_zeros(b, h, d, columns) if state is None else state.to(q.dtype)
    outs = []
    for at in (slice(i, i + chunk) for i in range(0, l, chunk)):
        qc, kc, vc, dc = q[:, :, at], widen(k[:, :, at], groups), widen(v[:, :, at], groups), steps[..., at]
        left, since = _ratios(dc), dc.cumprod(-1)
        outs.append((qc @ kc.transpose(-1, -2) * left) @ vc + since[..., None] * (qc @ carried))
        carried = since[..., -1, None, None] * carried + (kc * left[..., -1, :, None]).transpose(-1, -2) @ vc
    out = torch.cat(outs, 2) if outs else q.new_zeros(b, h, 0, columns)
    if normalize:
        total = out[..., e:]
        out = (out[..., :e] / total.masked_fill(total == 0, 1.0)).masked_fill(total == 0, 0.0)
    return out.to(dtype), carried
