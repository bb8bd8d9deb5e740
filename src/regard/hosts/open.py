"""Opening a model by name: ``timm:NAME``, ``torchvision:NAME``, or ``transformers:FOLDER`` (or a hub id)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("timm", "torchvision", "transformers")


@dataclass
class Opened:
    """A model in eval mode, inputs of the right shape to try it with, and what an image must become for it."""

    model: nn.Module
    inputs: dict[str, Tensor]
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def image(self, path: str | Path) -> Tensor:
        """(1, 3, H, W): the image at ``path``, shorter side resized and centre cropped to the model's size, normalised."""
        if self.size is None:
            raise ValueError(f"{type(self.model).__name__} takes no image")
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"image={str(path)!r} cannot be read: {error}") from None
        fitted = ImageOps.fit(picture, (self.size[1], self.size[0]), method=Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(*self.size, 3)
        x = pixels.permute(2, 0, 1)[None].float() / 255
        return (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


def open_model(name: str, *, pretrained: bool = False, weights: str | Path | None = None, **arguments: Any) -> Opened:
    """Build the model called ``name``; a bare name is timm's.

    Args:
        pretrained: fetch the library's weights (needs a network or a cache); default random ones.
        weights: a safetensors file with the model's state.

    Raises:
        ValueError: unknown library or name (with the nearest names), a weights file that does not fit.
    """
    library, _, model = name.rpartition(":")
    library = library or "timm"
    if library not in LIBRARIES:
        raise ValueError(f"library={library!r} of {name!r} is not one of {', '.join(LIBRARIES)}")
    opened = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library](
        model, pretrained, arguments
    )
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            opened.model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"weights={str(weights)!r} do not fit {name}: {str(error).splitlines()[0]}") from None
    opened.model.eval()
    return opened


def _unknown(name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
    return ValueError(f"model={name!r} is not known; nearest: {', '.join(near) or ', '.join(known[:5])}")


def _timm(name: str, pretrained: bool, arguments: dict[str, Any]) -> Opened:
    import timm

    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    model = timm.create_model(name, pretrained=pretrained, **arguments)
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][1:]
    return Opened(model, {"x": torch.randn(1, 3, *size)}, size, config["mean"], config["std"])


def _torchvision(name: str, pretrained: bool, arguments: dict[str, Any]) -> Opened:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise _unknown(name, list_models())
    model = get_model(name, weights="DEFAULT" if pretrained else None, **arguments)
    size = (224, 224)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Opened(model, {"x": torch.randn(1, 3, *size)}, size, mean, std)


def _transformers(name: str, pretrained: bool, arguments: dict[str, Any]) -> Opened:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={name!r} cannot be loaded by transformers: {str(error).splitlines()[0]}") from None
    config = model.config
    side = getattr(config, "image_size", None)
    if side:
        size = (side, side) if isinstance(side, int) else tuple(side)
        return Opened(model, {"pixel_values": torch.randn(1, 3, *size)}, size)
    return Opened(model, {"input_ids": torch.arange(3, 19)[None] % config.vocab_size})
