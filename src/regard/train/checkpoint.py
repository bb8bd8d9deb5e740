"""A training run in one file: modules, optimiser and counters, so that resuming changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from regard.train.files import write_whole


def save_checkpoint(
    path: str | Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Write the run's whole state to ``path`` (safetensors; ``counters`` as JSON in its header), whole or not at all.

    Args:
        path: the file.
        modules: by name; their parameters and buffers are kept.
        optimizer: its state, parameter by parameter; options such as the learning rate are not.
        counters: anything JSON can hold: the epoch reached, the curve so far.
    """
    tensors: dict[str, Tensor] = {
        f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    whole = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    write_whole(path, save(whole, {"counters": json.dumps(counters)}))


def load_checkpoint(
    path: str | Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Bring ``modules`` and ``optimizer`` to the state in ``path``; returns the counters."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(path), "pt") as file:
        counters = json.loads(file.metadata()["counters"])
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = file.get_tensor(key)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts.pop("optimizer", {}).items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    for name, module in modules.items():
        module.load_state_dict(parts[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return counters
