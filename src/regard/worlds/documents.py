"""Rendered pages: articles, forms, tables, and the box, line, block, cell and place in the reading order of every word."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.layouts import LAYOUTS, compose
from regard.worlds.typeset import FAMILIES, Box, Column, Face, Sheet, glyphs
from regard.worlds.world import World

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Page:
    """A page and what stands on it; words are numbered in reading order.

    Args:
        image: (3, h, w).
        words: their texts.
        boxes: (n, 4), the ink of each word; on a turned page the hull of ``corners``, which smoothing may exceed by a pixel.
        corners: (n, 4, 2), the ink's box from its top left corner round clockwise, turned with the page.
        lines: (n,), the line of each word, numbered through the page; a cell of a table has lines of its own.
        blocks: (n,), the block of each word.
        cells: (n, 2), row and column in a table or form, item and 0 in a list, -1 elsewhere.
        kinds: of each block: title, paragraph, list, table, form, figure, caption, address or row.
        block_boxes, block_corners: of each block, as for words; figures and tables with their frames.
        layout: the name of the layout.
        angle: by which the page is turned, in degrees, counter-clockwise.
    """

    image: Float[Tensor, "3 h w"]
    words: tuple[str, ...]
    boxes: Float[Tensor, "n 4"]
    corners: Float[Tensor, "n 4 2"]
    lines: Int[Tensor, "n"]
    blocks: Int[Tensor, "n"]
    cells: Int[Tensor, "n 2"]
    kinds: tuple[str, ...]
    block_boxes: Float[Tensor, "m 4"]
    block_corners: Float[Tensor, "m 4 2"]
    layout: str
    angle: float

    @property
    def fields(self) -> dict[int, int]:
        """The number of each value on a form by the number of its key, both of one word."""
        form = torch.tensor([self.kinds[block] == "form" for block in self.blocks.tolist()], dtype=torch.bool)
        keys, values = ((form & (self.cells[:, 1] == column)).nonzero()[:, 0].tolist() for column in (0, 1))
        return dict(zip(keys, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class Documents(World[Page]):
    """Pages of words from :data:`VOCABULARY`, black on white in one of three families.

    Layouts: ``article`` (title, paragraphs, lists, figures with captions), ``columns`` (the same in two columns),
    ``letter``, ``form`` (keys with values), ``invoice`` (form, table, total) and ``scattered`` (rows of words with wide
    gaps; what is right of a word is the next one of its line). A key or a heading of a table settles from which of
    :data:`FIELDS` its values are drawn.

    Args:
        height, width: of the page in pixels.
        size: of the text in pixels.
        layouts: from which one is drawn for each page.
        skew: pages are turned by up to this many degrees either way.
        blur: deviation of the blur in pixels.
        noise: deviation of the noise, of a range of 1.

    Raises:
        ValueError: text below 6 pixels or too large for the page, an unknown layout, a skew outside [0, 15], negative
            blur or noise.
        ModuleNotFoundError: matplotlib, whose fonts these are, is not installed.
    """

    height: int = 256
    width: int = 256
    size: int = 12
    layouts: tuple[str, ...] = LAYOUTS
    skew: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 6:
            raise ValueError(f"size={self.size} must be 6 or more to be legible")
        if not self.layouts or not set(self.layouts) <= set(LAYOUTS):
            raise ValueError(f"layouts={self.layouts} must be some of {', '.join(map(repr, LAYOUTS))}")
        if not 0.0 <= self.skew <= 15.0:
            raise ValueError(f"skew={self.skew} must lie between 0 and 15 degrees")
        if self.blur < 0 or self.noise < 0:
            raise ValueError(f"blur={self.blur} and noise={self.noise} must not be negative")
        wide, high = (side - 2 * self.margin for side in (self.width, self.height))
        if wide < 14 * self.size or high < 5 * self.size:
            raise ValueError(
                f"size={self.size} needs {14 * self.size} x {5 * self.size} pixels inside the margins; "
                f"width={self.width} and height={self.height} leave {wide} x {high}"
            )

    @property
    def margin(self) -> int:
        """Pixels left free on every side: what is inside stays on the page when it is turned."""
        c, s = cos(radians(self.skew)), sin(radians(self.skew))
        short, long = sorted((self.width / 2, self.height / 2))
        return round(self.size * 0.7 + max(0.0, (long * s - short * (1 - c)) / (c + s)))

    def make(self, rng: np.random.Generator) -> Page:
        from scipy.ndimage import gaussian_filter

        layout = str(rng.choice(self.layouts))
        sheet = Sheet(self.width, self.height)
        compose(sheet, layout, self.size, self.margin, rng)
        angle = float(rng.uniform(-self.skew, self.skew))
        pixels = np.asarray(turn(sheet.draw(), angle), np.float32) / 255
        pixels = gaussian_filter(pixels, self.blur) + self.noise * rng.standard_normal(pixels.shape, np.float32)
        return _page(sheet, pixels.clip(0, 1), layout, angle)

    def panels(self, sample: Page) -> dict[str, Tensor | str]:
        return {
            "page": sample.image,
            "words": _outlined(sample.image, sample.corners, (230, 50, 25)),
            "blocks": _outlined(sample.image, sample.block_corners, (25, 75, 230)),
            "reading order": " ".join(sample.words),
        }


def render_text(text: str, width: int = 512, size: int = 15, padding: int = 20) -> Page:
    """A given text on a page, wrapped to its width and as high as it needs; an empty line ends a paragraph.

    Raises:
        ValueError: no text, signs that the font lacks, a word wider than the page has room for.
    """
    paragraphs = [words for part in re.split(r"\n\s*\n", text) if (words := part.split())]
    if not paragraphs:
        raise ValueError(f"text={text!r} must hold a word")
    face = Face(FAMILIES[0], size)
    unknown = sorted({sign for sign in "".join(text.split()) if ord(sign) not in glyphs(face.name)})
    if unknown:
        raise ValueError(f"text holds {', '.join(map(repr, unknown))}, which {face.name} has no glyphs for")
    sheet = Sheet(width, 0)
    column = Column(padding, width - padding, padding, sys.maxsize)
    for words in paragraphs:
        sheet.text("paragraph", words, face, column)
    sheet.height = column.y + padding
    return _page(sheet, np.asarray(sheet.draw(), np.float32) / 255, "text", 0.0)


def turn(image: Image.Image, angle: float) -> Image.Image:
    """The image turned counter-clockwise by ``angle`` degrees about its centre, white where nothing was."""
    from PIL import Image

    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255) if angle else image


def _corners(boxes: Sequence[Box], angle: float, width: int, height: int) -> Float[Tensor, "n 4 2"]:
    """The corners of the boxes, clockwise from the top left, after :func:`turn`."""
    x0, y0, x1, y1 = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4).unbind(1)
    centre = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    corners = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], 1).reshape(-1, 4, 2) - centre
    c, s = cos(radians(angle)), sin(radians(angle))
    return (corners @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64) + centre).float()


def _page(sheet: Sheet, pixels: np.ndarray, layout: str, angle: float) -> Page:
    corners, frames = (
        _corners(boxes, angle, sheet.width, sheet.height)
        for boxes in ([word.box for word in sheet.words], [frame for _, frame in sheet.blocks])
    )
    return Page(
        image=torch.from_numpy(pixels).expand(3, -1, -1).contiguous(),
        words=tuple(word.text for word in sheet.words),
        boxes=torch.cat([corners.amin(1), corners.amax(1)], 1),
        corners=corners,
        lines=torch.tensor([word.line for word in sheet.words], dtype=torch.long),
        blocks=torch.tensor([word.block for word in sheet.words], dtype=torch.long),
        cells=torch.tensor([word.cell for word in sheet.words], dtype=torch.long).reshape(-1, 2),
        kinds=tuple(kind for kind, _ in sheet.blocks),
        block_boxes=torch.cat([frames.amin(1), frames.amax(1)], 1),
        block_corners=frames,
        layout=layout,
        angle=angle,
    )


def _outlined(image: Float[Tensor, "3 h w"], corners: Float[Tensor, "n 4 2"], colour: tuple[int, int, int]) -> Tensor:
    from PIL import Image, ImageDraw

    picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
    for shape in corners.tolist():
        ImageDraw.Draw(picture).polygon([(x, y) for x, y in shape], outline=colour)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
