"""Reading patches by a few small convolutions instead of one large one."""

from __future__ import annotations

from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor


class Stem(ConvStem):
    """timm's convolutional stem as a patch embedding: patches a power of two wide, halved by each 3 x 3 convolution.

    A small vision transformer learns soon with it. After Tete Xiao et al., Early Convolutions Help Transformers See Better,
    2021, arXiv:2106.14881.

    Args:
        channels: of the picture.
        patch: width of a patch in pixels.
        dim: of a token.

    Raises:
        ValueError: ``patch`` is no power of two, or 1.
    """

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        halvings = patch.bit_length() - 1
        if patch != 1 << halvings or halvings < 1:
            raise ValueError(f"patch={patch} must be a power of two, and 2 at least")
        super().__init__(
            channels,
            depth=halvings + 1,
            channels=(*(dim >> i for i in reversed(range(halvings))), dim),
            kernel_size=(3,) * halvings + (1,),
            stride=(2,) * halvings + (1,),
            padding=(1,) * halvings + (0,),  # type: ignore[arg-type]
        )

    @property
    def weight(self) -> Tensor:
        """The last kernel, by which a vision tower of transformers asks for the precision of its pictures."""
        return next(self[-1].parameters())
