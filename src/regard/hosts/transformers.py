"""transformers: the entries of its attention interface, wrapped under their own names while somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard.core.call import Call
from regard.core.host import HOSTS, Handle, Host, Sample
from regard.core.swap import Plan, Projection, Projections
from regard.core.tap import Tap, taps_of
from regard.core.tokens import Segment, Tokens
from regard.hosts.decoder import decoder_slot
from regard.hosts.eviction import LayerCache, held_by

# Under these names a function attends to whole (b, h, l, d) tensors. Their names stay, so that the masks that the model
# makes for them stay right.
WRAPPED = ("eager", "sdpa", "flex_attention")


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The model's own ``eager_attention_forward``, from the file in which the class of ``module`` (or a parent) stands."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError(f"{type(module).__name__} calls eager attention but its module defines no eager_attention_forward")


def _wrap(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        native = _eager_of(module) if original is None else original
        tap = taps_of(module)
        if tap is None:
            return native(module, query, key, value, mask, **kwargs)
        return _watched(tap, native, name, module, query, key, value, mask, kwargs)

    return attention


def _watched(
    tap: Tap,
    native: Callable[..., Any],
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{tap.name}: attention sinks are learned columns of the softmax, which a site cannot show yet"
        )
    kept = tap.held.kept if isinstance(tap.held, LayerCache) else None
    if kept is not None and mask is not None:
        mask = kept.mask(mask, query.shape[1])
    call = Call(
        query,
        key,
        value,
        mask=mask if mask is None or mask.ndim == 4 else None,
        bias=kwargs.get("position_bias"),
        causal=_is_causal(name, module, query, mask, kwargs),
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        dropout=kwargs.get("dropout", 0.0),
    )
    if getattr(module, "is_causal", False) and mask is None and query.shape[2] < key.shape[2]:
        call.q_start = (key.shape[2] if kept is None else kept.seen) - query.shape[2]
    given = (call.q, call.k, call.v, call.mask, call.bias, call.causal)
    rest: tuple[Any, ...] = ()

    def run(c: Call) -> Tensor:
        nonlocal rest
        now = (c.q, c.k, c.v, c.mask, c.bias, c.causal)
        changed = not all(a is b for a, b in zip(given, now, strict=True))
        arguments = dict(kwargs)
        new_mask = mask
        if changed:
            new_mask, arguments = _arguments(c, mask, kwargs, name == "sdpa")
        tap.quiet = True
        try:
            out, *others = native(module, c.q, c.k, c.v, new_mask, **arguments)
        finally:
            tap.quiet = False
        rest = tuple(others)
        return out.transpose(1, 2)

    out = tap.run(call, run, "interface").transpose(1, 2)
    weights = rest[0] if rest else None
    if call.final_weights is not None and name == "eager":
        weights = call.final_weights.to(query.dtype)
    return (out.contiguous(), weights)


def _is_causal(name: str, module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """The fused function makes its own causal mask where the model gave none; the eager one never does."""
    if name == "eager" or mask is not None or query.shape[2] == 1:
        return False
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _arguments(
    call: Call, mask: Tensor | None, kwargs: dict[str, Any], boolean: bool
) -> tuple[Tensor | None, dict[str, Any]]:
    """Mask and keyword arguments for the host's function after an edit of mask or bias."""
    arguments = {**kwargs, "is_causal": call.causal}
    if call.mask is mask and call.bias is kwargs.get("position_bias"):
        return mask, {**kwargs}
    allowed, added = call.allowed(), call.added()
    arguments.pop("position_bias", None)
    arguments["is_causal"] = False
    if added is None and (allowed is None or (boolean and (mask is None or mask.dtype == torch.bool))):
        return allowed, arguments
    total = torch.zeros((), dtype=call.q.dtype, device=call.q.device) if added is None else added.to(call.q.dtype)
    if allowed is not None:
        total = total.masked_fill(~allowed, torch.finfo(call.q.dtype).min)
    shape = (1, 1, call.q.shape[2], call.k.shape[2])
    return total.broadcast_to(torch.broadcast_shapes(total.shape, shape)), arguments


class Transformers(Host):
    """Text, images and both: what the tokens are follows from the configuration and the input ids."""

    name = "transformers"

    def enter(self) -> None:
        for name in WRAPPED:
            original = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
            ALL_ATTENTION_FUNCTIONS[name] = _wrap(name, original)

    def leave(self) -> None:
        for name in WRAPPED:
            del ALL_ATTENTION_FUNCTIONS[name]

    def kind(self, model: nn.Module, name: str, call: Call) -> str | None:
        """Position embeddings reach some self-attention as a second stream, so names go before shapes."""
        last = name.rpartition(".")[2].lower()
        if "cross" in last or last.startswith("enc"):
            return "cross"
        return "self" if "self" in last and call.q.shape[2] == call.k.shape[2] else None

    def tokens(self, model: nn.Module, name: str, call: Call, sample: Sample) -> tuple[Tokens | None, Tokens | None]:
        config = _config(model, name)
        layout = _image_layout(config)
        image_id = getattr(getattr(model, "config", None), "image_token_id", None)
        found: list[Tokens | None] = []
        for size in (call.q.shape[2], call.k.shape[2]):
            if layout is not None and layout.size == size:
                found.append(layout)
            elif image_id is not None and sample.ids is not None and sample.ids.shape[1] == size:
                found.append(_roles(sample.ids == image_id, sample.prompt))
            elif getattr(config, "vocab_size", None):
                found.append(Tokens((Segment("text", (size,)),)))
            else:
                found.append(None)
        return found[0], found[1]

    def cache(self, module: nn.Module, kwargs: dict[str, Any]) -> LayerCache | None:
        return held_by(module, kwargs)

    def prune(self, model: nn.Module, after: int, keep: Callable[[Call, Tensor, Tensor], Tensor]) -> Handle:
        from regard.hosts.pruning import TokenPruning

        return TokenPruning(model, after, keep)

    def plan(self, model: nn.Module, name: str) -> Plan | None:
        module = model.get_submodule(name)
        parts = [[_linear(getattr(module, n, None)) for n in triple] for triple in _NAMES]
        found = next((p for p in parts if all(x is not None for x in p)), None)
        heads = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
        heads = heads or getattr(getattr(module, "config", None), "num_attention_heads", None)
        if found is None or heads is None or getattr(module, "attn_logit_softcapping", None) is not None:
            return None
        q, k, v = found
        assert q is not None
        assert k is not None
        assert v is not None
        kv_heads = heads * k[0].shape[0] // q[0].shape[0]
        out = next((_linear(getattr(module, n, None)) for n in _OUT if hasattr(module, n)), None)
        causal = bool(getattr(module, "is_causal", False))
        wrap = decoder_slot(model, name) if causal else _Slot
        return Plan(Projections(q[0].shape[1], heads, kv_heads, q, k, v, out, causal), wrap)


def _config(model: nn.Module, name: str) -> Any:
    """Configuration of the innermost model around ``name`` that has one."""
    module, config = model, getattr(model, "config", None)
    for part in name.split("."):
        module = getattr(module, part)
        config = getattr(module, "config", config)
    return config


def _image_layout(config: Any) -> Tokens | None:
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not size or not patch:
        return None
    sizes = [n if isinstance(n, tuple | list) else (n, n) for n in (size, patch)]
    grid = tuple(a // b for a, b in zip(*sizes, strict=True))
    image = Segment("image", grid)
    if getattr(config, "model_type", "").startswith("siglip"):
        return Tokens((image,))
    registers = getattr(config, "num_register_tokens", 0)
    middle = (Segment("register", (registers,)),) if registers else ()
    return Tokens((Segment("cls", (1,)), *middle, image))


def _roles(is_image: Tensor, prompt: int) -> Tokens | None:
    """System, image, instruction and output tokens of a prompt with images; None when the rows of a batch differ."""
    if not bool((is_image == is_image[:1]).all()):
        return None
    segments: list[Segment] = []
    row = is_image[0, :prompt]
    kinds, counts = torch.unique_consecutive(row, return_counts=True)
    images = texts = 0
    for i, (image, count) in enumerate(zip(kinds.tolist(), counts.tolist(), strict=True)):
        if image:
            images += 1
            role = "image" if images == 1 else f"image_{images}"
        elif i == 0:
            role = "system"
        elif i == len(kinds) - 1:
            role = "instruction"
        else:
            texts += 1
            role = f"text_{texts}"
        segments.append(Segment(role, (count,)))
    if is_image.shape[1] > prompt:
        segments.append(Segment("output", (is_image.shape[1] - prompt,)))
    return Tokens(tuple(segments))


_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_OUT = ("o_proj", "out_proj", "o")


class _Slot(nn.Module):
    """A layer called as an encoder of transformers calls its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        for name in ("position_embeddings", "past_key_values", "cache", "encoder_hidden_states"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} reached a layer that was put into an encoder without it")
        if attention_mask is None:
            return self.layer(hidden_states), None
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        return self.layer(hidden_states, mask=attention_mask), None


def _linear(module: Any) -> Projection | None:
    if not isinstance(module, nn.Linear):
        return None
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


HOSTS["transformers"] = Transformers()
