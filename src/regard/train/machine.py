"""What a figure was measured on."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> str:
    """The first GPU's name, else the processor's architecture and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"
