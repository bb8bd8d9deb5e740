"""timm: sites are met at the fused kernel or at the hand-written pattern; here is what their tokens mean."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.host import HOSTS, Host, Sample
from regard.core.swap import Plan, Projection, Projections
from regard.core.tokens import Segment, Tokens

# Attention in which the tokens are channels.
CHANNEL = ("XCA", "ChannelAttention", "ChannelAttentionV2", "CrossCovarianceAttn")


class Timm(Host):
    """Class and register tokens first, then the patches row by row; windowed sites see one window each."""

    name = "timm"

    def tokens(self, model: nn.Module, name: str, call: Call, sample: Sample) -> tuple[Tokens | None, Tokens | None]:
        if self.kind(model, name, call) == "channel":
            return None, None
        layouts = [x for x in (_layout(model, sample.shape), _part(model, name)) if x is not None]
        q, k = (next((x for x in layouts if x.size == n), None) for n in (call.q.shape[2], call.k.shape[2]))
        return q, k

    def kind(self, model: nn.Module, name: str, call: Call) -> str | None:
        return "channel" if type(model.get_submodule(name)).__name__ in CHANNEL else None

    def plan(self, model: nn.Module, name: str) -> Plan | None:
        module = model.get_submodule(name)
        qkv, proj, heads = (getattr(module, n, None) for n in ("qkv", "proj", "num_heads"))
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or heads is None:
            return None
        # Biases kept apart, tokens that are channels, rotations and sizes handed in: a layer of tokens cannot take these.
        called_with = set(inspect.signature(module.forward).parameters) - {"x", "attn_mask", "mask", "is_causal"}
        if called_with or hasattr(module, "q_bias") or type(module).__name__ in CHANNEL:
            return None
        if qkv.out_features != 3 * qkv.in_features or proj.in_features != qkv.in_features:
            return None
        q, k, v = _split(qkv, 3)
        out = _split(proj, 1)[0]
        prefix = getattr(model, "num_prefix_tokens", 0)
        part = _part(model, name)
        grid = None if part is None else part.segments[0].shape
        if grid is None and hasattr(model, "patch_embed"):
            grid = getattr(model.patch_embed, "grid_size", None)
        projections = Projections(qkv.in_features, heads, heads, q, k, v, out)
        return Plan(projections, lambda layer: _Slot(layer, None if prefix else grid), grid, prefix)


def _layout(model: nn.Module, sample: tuple[int, ...]) -> Tokens | None:
    embed: Any = getattr(model, "patch_embed", None)
    if not hasattr(embed, "patch_size") or len(sample) != 4:
        return None
    patch = embed.patch_size if isinstance(embed.patch_size, tuple) else (embed.patch_size,) * 2
    if hasattr(embed, "feat_ratio"):  # a backbone before the patches has made the image smaller already
        patch = embed.feat_ratio(as_scalar=False)
    grid = tuple(-(-n // p) for n, p in zip(sample[-2:], patch, strict=True))
    registers = getattr(model, "num_reg_tokens", 0)
    classes = getattr(model, "num_prefix_tokens", 0) - registers
    segments = [Segment("cls", (classes,))] if classes else []
    if registers:
        segments.append(Segment("register", (registers,)))
    return Tokens((*segments, Segment("image", grid)))


def _part(model: nn.Module, name: str) -> Tokens | None:
    """The part of the image that one call of the site sees: a window, or every n-th token of a grid (MaxViT)."""
    module, role = model.get_submodule(name), "window"
    size = getattr(module, "window_size", getattr(module, "ws", None))
    parent = model.get_submodule(name.rpartition(".")[0])
    if hasattr(parent, "partition_block"):
        size, role = parent.partition_size, "window" if parent.partition_block else "grid"
    if isinstance(size, int):
        size = (size, size)
    return Tokens((Segment(role, tuple(size)),)) if isinstance(size, tuple | list) and len(size) == 2 else None


class _Slot(nn.Module):
    """A layer called as timm calls its attention, with the grid that its tokens have."""

    def __init__(self, layer: nn.Module, grid: tuple[int, ...] | None) -> None:
        super().__init__()
        self.layer = layer
        self.grid = grid if "grid" in inspect.signature(layer.forward).parameters else None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        if is_causal:
            raise ValueError("is_causal=True reached a layer that was put in as a bidirectional one")
        if mask is not None:  # Swin's, one a window; the windows of an image follow each other.
            attn_mask = mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        given = {} if self.grid is None else {"grid": self.grid}
        return self.layer(x, **given) if attn_mask is None else self.layer(x, mask=_allowed(attn_mask), **given)


def _allowed(mask: Tensor) -> Tensor:
    """A mask that is added, 0 or -100 and below, as a boolean one."""
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not (allowed | (mask <= -100)).all():
        raise ValueError("a position bias reached a layer that takes boolean masks only")
    return allowed


def _split(linear: nn.Linear, parts: int) -> list[Projection]:
    biases = [None] * parts if linear.bias is None else list(linear.bias.detach().chunk(parts))
    return list(zip(linear.weight.detach().chunk(parts), biases, strict=True))


HOSTS["timm"] = Timm()
