"""Real photographs that come inside scikit-image and scikit-learn, and a stereo pair with true disparity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from regard.worlds.world import Split, World

CAPTIONS = {
    "astronaut": "a smiling astronaut in an orange suit before a flag and a model of a space shuttle",
    "brick": "a brick wall",
    "camera": "a man with a camera on a tripod on a lawn, in grey",
    "chelsea": "the face of a striped cat",
    "china": "a temple with curved roofs among trees",
    "coffee": "a cup of coffee and a spoon on a wooden table",
    "coins": "rows of old coins, in grey",
    "flower": "a red flower before green leaves",
    "grass": "grass seen from above, in grey",
    "gravel": "gravel seen from above, in grey",
    "motorcycle": "a motorcycle in a workshop",
    "retina": "the back of an eye",
    "rocket": "a rocket on its launch pad between towers",
}
"""What each photograph shows."""

HELD: dict[Split, tuple[str, ...]] = {"val": ("coins", "gravel", "rocket"), "test": ("brick", "chelsea", "flower")}


@cache
def _pixels(name: str) -> UInt8[Tensor, "3 h w"]:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data

        pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _known(name: str) -> None:
    if name not in CAPTIONS:
        raise ValueError(f"name={name!r} must be one of {', '.join(map(repr, CAPTIONS))}")


def photo(name: str) -> Float[Tensor, "3 h w"]:
    """A photograph in [0, 1], at its own size, 300 x 451 to 1411 x 1411 pixels; grey ones have three equal channels.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: scikit-image or scikit-learn is not installed.
    """
    _known(name)
    return _pixels(name).float() / 255


@dataclass(frozen=True, eq=False)
class Stereo:
    """A rectified pair: (u, v) on the left is (u - disparity, v) on the right.

    Args:
        left, right: in [0, 1].
        disparity: of the left image, pixels; 0 where it is not known.
        depth: focal length times baseline over (disparity + shift of the principal points), metres; 0 where it is not known.
        known: where the truth is known.
    """

    left: Float[Tensor, "3 h w"]
    right: Float[Tensor, "3 h w"]
    disparity: Float[Tensor, "h w"]
    depth: Float[Tensor, "h w"]
    known: Bool[Tensor, "h w"]


def motorcycle() -> Stereo:
    """The Middlebury 2014 motorcycle, 500 x 741 pixels, with measured disparities of 7 to 60 pixels.

    Reference: Scharstein et al., High-resolution stereo datasets with subpixel-accurate ground truth, GCPR 2014.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    import skimage.data

    focal, baseline, shift = 994.978, 0.193001, 31.086
    *images, truth = skimage.data.stereo_motorcycle()
    left, right = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images)
    disparity = torch.from_numpy(truth).float()
    known = disparity.isfinite()
    depth = focal * baseline / (disparity + shift)
    return Stereo(left, right, disparity.where(known, 0), depth.where(known, 0), known)


@dataclass(frozen=True, eq=False)
class Crop:
    """Part of a photograph.

    Args:
        image: in [0, 1].
        name: of the photograph.
        box: (x0, y0, x1, y1) in it, pixels, far edge excluded.
        flipped: whether left and right were exchanged.
    """

    image: Float[Tensor, "3 h w"]
    name: str
    box: tuple[int, int, int, int]
    flipped: bool


@dataclass(frozen=True, kw_only=True)
class Crops(World[Crop]):
    """Random crops of photographs; the three splits have different photographs unless ``names`` says which.

    Args:
        size: height and width of a crop, pixels.
        zoom: least and greatest number of the photograph's pixels, along a side, to one of the crop's; drawn uniformly in
            its logarithm, and no more than the photograph has.
        names: photographs to draw from, each alike.

    Raises:
        ValueError: a size that is not positive or does not fit into a photograph, a zoom below 1 or falling, an unknown name.
    """

    size: tuple[int, int] = (64, 64)
    zoom: tuple[float, float] = (1.0, 4.0)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names:
            _known(name)
        if min(self.size) < 1:
            raise ValueError(f"size={self.size} must be positive")
        if not 1 <= self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom={self.zoom} must be 1 or more and not fall")
        for name in self.photographs:
            if self._most(name) < self.zoom[0]:
                shape = tuple(_pixels(name).shape[1:])
                raise ValueError(f"size={self.size} with zoom={self.zoom} does not fit into {name!r} of {shape}")

    @property
    def photographs(self) -> tuple[str, ...]:
        """What this split draws from."""
        held = {name for names in HELD.values() for name in names}
        return self.names or HELD.get(self.split) or tuple(name for name in CAPTIONS if name not in held)

    def _most(self, name: str) -> float:
        """The greatest zoom that the photograph allows."""
        h, w = _pixels(name).shape[1:]
        return min(h / self.size[0], w / self.size[1])

    def make(self, rng: np.random.Generator) -> Crop:
        name = self.photographs[int(rng.integers(len(self.photographs)))]
        pixels = _pixels(name)
        low, high = np.log(self.zoom)
        zoom = float(np.exp(rng.uniform(low, max(low, min(high, np.log(self._most(name)))))))
        h, w = (min(int(side * zoom + 1e-9), whole) for side, whole in zip(self.size, pixels.shape[1:]))
        y, x = (int(rng.integers(whole - side + 1)) for side, whole in zip((h, w), pixels.shape[1:]))
        image = pixels[:, y : y + h, x : x + w].float() / 255
        if (h, w) != self.size:
            image = F.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        flipped = bool(rng.integers(2))
        return Crop(image.flip(2) if flipped else image, name, (x, y, x + w, y + h), flipped)

    def panels(self, sample: Crop) -> dict[str, Tensor | str]:
        return {"image": sample.image, "photograph": CAPTIONS[sample.name]}
