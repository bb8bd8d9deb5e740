"""Words set on a page with the fonts that come inside matplotlib: where each of them stands is known to the pixel."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

Box = tuple[int, int, int, int]
FAMILIES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")


@cache
def font(name: str, size: int) -> FreeTypeFont:
    """A font of matplotlib's, at a size in pixels; matplotlib is not imported.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: it brings no font of this name.
    """
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the fonts come with the package matplotlib: pip install matplotlib")
    file = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"
    if not file.exists():
        raise ValueError(f"name={name!r} must be a font of matplotlib, such as {', '.join(map(repr, FAMILIES))}")
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyphs(name: str) -> frozenset[int]:
    """The code points that a font of matplotlib's has a glyph for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font(name, 12).path)).get_charmap())


class Face(NamedTuple):
    """A font by its name and its size in pixels."""

    name: str
    size: int

    @property
    def ascent(self) -> int:
        return font(*self).getmetrics()[0]

    @property
    def height(self) -> int:
        """From one line to the next."""
        return sum(font(*self).getmetrics()) + max(1, self.size // 8)

    @property
    def space(self) -> int:
        return max(2, round(font(*self).getlength(" ")))

    def ink(self, text: str) -> Box:
        """The box of the pixels that a word blackens when it starts at (0, 0) on the base line."""
        mask, (dx, dy) = font(*self).getmask2(text, mode="L", anchor="ls")
        x0, y0, x1, y1 = mask.getbbox() or (0, 0, 0, 0)
        return x0 + dx, y0 + dy, x1 + dx, y1 + dy

    def width(self, text: str) -> int:
        return max(round(font(*self).getlength(text)), self.ink(text)[2])


class Word(NamedTuple):
    """A word: its text, where it starts on the base line, its face, and its line, block and cell (row, column)."""

    text: str
    x: int
    y: int
    face: Face
    line: int
    block: int
    cell: tuple[int, int]

    @property
    def box(self) -> Box:
        x0, y0, x1, y1 = self.face.ink(self.text)
        return self.x + x0, self.y + y0, self.x + x1, self.y + y1


@dataclass
class Column:
    """Room between x0 and x1 that is filled from y down to y1."""

    x0: int
    x1: int
    y: int
    y1: int


def wrap(texts: Sequence[str], face: Face, width: int) -> list[list[str]]:
    """Words in lines no wider than ``width``, each line as full as it can be.

    Raises:
        ValueError: a word wider than that.
    """
    lines: list[list[str]] = []
    used = 0
    for text in texts:
        wide = face.width(text)
        if wide > width:
            raise ValueError(f"{text!r} is {wide} pixels wide and must fit in {width}")
        if not lines or used + face.space + wide > width:
            lines.append([])
            used = -face.space
        lines[-1].append(text)
        used += face.space + wide
    return lines


class Sheet:
    """A page in the making: words, blocks (kind and frame) and rules; a block that finds no room is not set."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.words: list[Word] = []
        self.blocks: list[tuple[str, Box]] = []
        self.rules: list[Box] = []
        self._line = 0

    def line(self, texts: Sequence[str], face: Face, x: int, y: int, cell: tuple[int, int] = (-1, -1)) -> None:
        """Words side by side from x on."""
        starts = accumulate((face.width(text) + face.space for text in texts), initial=x)
        self.spread(list(zip(texts, starts)), face, y, cell)

    def spread(self, placed: Sequence[tuple[str, int]], face: Face, y: int, cell: tuple[int, int] = (-1, -1)) -> None:
        """A line of words, each with where it starts, its top at y, in the block that is closed next."""
        for text, x in placed:
            self.words.append(Word(text, x, y + face.ascent, face, self._line, len(self.blocks), cell))
        self._line += 1

    def close(self, kind: str, frame: Box | None = None) -> None:
        """Ends a block; its frame is the hull of its words unless given."""
        boxes = [word.box for word in self.words if word.block == len(self.blocks)]
        if frame is None:
            x0, y0, x1, y1 = zip(*boxes)
            frame = min(x0), min(y0), max(x1), max(y1)
        self.blocks.append((kind, frame))

    def text(self, kind: str, texts: Sequence[str], face: Face, column: Column) -> bool:
        """A block of running text at the top of the column's room."""
        lines = wrap(texts, face, column.x1 - column.x0)
        if column.y + len(lines) * face.height > column.y1:
            return False
        for i, line in enumerate(lines):
            self.line(line, face, column.x0, column.y + i * face.height)
        column.y += len(lines) * face.height + face.size // 2
        self.close(kind)
        return True

    def bullets(self, items: Sequence[Sequence[str]], face: Face, column: Column) -> bool:
        """A list, an item a row, with a square before each."""
        indent = face.size
        items_lines = [wrap(item, face, column.x1 - column.x0 - indent) for item in items]
        if column.y + sum(map(len, items_lines)) * face.height > column.y1:
            return False
        for row, lines in enumerate(items_lines):
            side, y = max(2, face.size // 4), column.y + face.ascent
            self.rules.append((column.x0, y - 2 * side, column.x0 + side, y - side))
            for line in lines:
                self.line(line, face, column.x0 + indent, column.y, (row, 0))
                column.y += face.height
        column.y += face.size // 2
        self.close("list")
        return True

    def figure(self, height: int, column: Column) -> bool:
        """A framed empty place for a picture, as wide as the column."""
        if column.y + height > column.y1:
            return False
        frame = (column.x0, column.y, column.x1, column.y + height)
        self._outline(frame)
        column.y += height + 2
        self.close("figure", frame)
        return True

    def grid(
        self,
        kind: Literal["table", "form"],
        rows: Sequence[Sequence[Sequence[str]]],
        faces: tuple[Face, Face],
        column: Column,
    ) -> bool:
        """Rows of cells in columns of one width; as many rows as there is room for.

        The first row of a table is its heading, and all cells are framed; in a form the first column names what stands
        beside it. Headings take the second face.
        """
        plain, strong = faces
        width = (column.x1 - column.x0) // len(rows[0])
        pad = max(2, plain.size // 4)
        top = y = column.y
        for r, row in enumerate(rows):
            head = [r == 0 if kind == "table" else c == 0 for c in range(len(row))]
            cells = [wrap(cell, strong if h else plain, width - 2 * pad) for cell, h in zip(row, head)]
            tall = max(map(len, cells)) * max(plain.height, strong.height) + 2 * pad
            if y + tall > column.y1:
                break
            for c, lines in enumerate(cells):
                face = strong if head[c] else plain
                left = column.x0 + c * width
                for i, line in enumerate(lines):
                    self.line(line, face, left + pad, y + pad + i * face.height, (r, c))
                if kind == "table":
                    self._outline((left, y, left + width + 1, y + tall + 1))
            y += tall
        if y == top:
            return False
        framed = (column.x0, top, column.x0 + width * len(rows[0]) + 1, y + 1)
        self.close(kind, framed if kind == "table" else None)
        column.y = y + plain.size // 2
        return True

    def _outline(self, box: Box) -> None:
        x0, y0, x1, y1 = box
        self.rules += [(x0, y0, x1, y0 + 1), (x0, y1 - 1, x1, y1), (x0, y0, x0 + 1, y1), (x1 - 1, y0, x1, y1)]

    def draw(self, words: Sequence[Word] | None = None, rules: bool = True) -> Image.Image:
        """The page in grey, black on white; with ``words``, only these of its words."""
        from PIL import Image, ImageDraw

        image = Image.new("L", (self.width, self.height), 255)
        pen = ImageDraw.Draw(image)
        for x0, y0, x1, y1 in self.rules if rules else ():
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=0)
        for word in self.words if words is None else words:
            pen.text((word.x, word.y), word.text, fill=0, font=font(*word.face), anchor="ls")
        return image
