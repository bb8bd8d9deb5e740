"""Plain torch: ``nn.MultiheadAttention`` and what is built of it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F

from regard.core.host import HOSTS, Host
from regard.core.tap import SEAMS, Tap

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
    with tap:
        return _MHA_BODY(*args, **kwargs)


SEAMS[F.multi_head_attention_forward] = _multi_head_attention


class Torch(Host):
    """torch and torchvision: shapes say what a site is."""

    name = "torch"


HOSTS["torch"] = HOSTS["torchvision"] = Torch()
