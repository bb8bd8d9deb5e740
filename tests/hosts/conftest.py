"""The oracle of captured weights: what the hosts' own softmaxes gave."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Softmaxes(TorchFunctionMode):
    """What every softmax of the eager code gave, in order; torch's own mode, around the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.softmax, Tensor.softmax, torch.softmax):
            if out.requires_grad:
                out.retain_grad()
            self.weights.append(out)
        return out


@pytest.fixture
def softmaxes() -> Softmaxes:
    return Softmaxes()
