"""Plain torch: ``nn.MultiheadAttention`` and what is built of it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from regard.core.call import Call
from regard.core.host import HOSTS, Host, Sample
from regard.core.tap import SEAMS, Tap
from regard.core.tokens import Segment, Tokens

# torch hides the fused kernel inside multi_head_attention_forward from function modes. This is torch's own body of that
# function with one name bound anew, so that it runs instead of dispatching once more, inside the tap.
_MHA_BODY = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
_MHA_BODY.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def _multi_head_attention(tap: Tap, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tap.batch = 0  # The axis of the input's batch depends on batch_first; heads are folded in either way.
    with tap:
        return _MHA_BODY(*args, **kwargs)


SEAMS[F.multi_head_attention_forward] = _multi_head_attention


class Torch(Host):
    """torch and torchvision: shapes say what a site is; a vision transformer has its class token first."""

    name = "torch"
    # With padding and without gradients it would hand its layers nested tensors, which only their fast path takes.
    around = (nn.TransformerEncoder,)

    def tokens(self, model: nn.Module, name: str, call: Call, sample: Sample) -> tuple[Tokens | None, Tokens | None]:
        layout = _part(model, name) or _layout(model, sample.shape)
        q, k = (layout if layout is not None and layout.size == n else None for n in (call.q.shape[2], call.k.shape[2]))
        return q, k


def _layout(model: nn.Module, sample: tuple[int, ...]) -> Tokens | None:
    patch = vars(model).get("patch_size")
    if not isinstance(patch, int) or not hasattr(model, "class_token") or len(sample) != 4:
        return None
    return Tokens((Segment("cls", (1,)), Segment("image", (sample[-2] // patch, sample[-1] // patch))))


def _part(model: nn.Module, name: str) -> Tokens | None:
    """Swin's attention has its window's sides; MaxViT's has one side, and sees a window or every n-th token of a grid."""
    module, role = model.get_submodule(name), "window"
    window = getattr(module, "window_size", None)
    if type(module).__name__ == "RelativePositionalMultiHeadAttention":
        window, role = [module.size] * 2, "grid" if ".grid_attention." in name else "window"
    return Tokens((Segment(role, tuple(window)),)) if isinstance(window, list) and len(window) == 2 else None


HOSTS["torch"] = HOSTS["torchvision"] = Torch()
