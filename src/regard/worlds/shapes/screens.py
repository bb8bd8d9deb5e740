"""Screens of an app: sections of buttons, fields and icons with labels, and what can be tapped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.worlds.shapes.render import layer
from regard.worlds.shapes.scene import COLOURS, SHAPES, Thing, known
from regard.worlds.world import World

KINDS = ("button", "field", "icon")
HEADERS = ("mail", "music", "maps", "photos", "files", "games")
LABELS = ("open", "save", "send", "edit", "copy", "find", "next", "back", "play", "stop")
ROW = 18


@dataclass(frozen=True)
class Widget:
    """Something on a screen.

    Args:
        kind: ``header`` or one of ``KINDS``.
        text: what is written on it or beside it.
        box: (x0, y0, x1, y1) in pixels, the text included.
        section: number of the section, from 0.
        shape, colour: of an icon.
        tappable: buttons and icons of a section that is on; fields and headers always.
    """

    kind: str
    text: str
    box: tuple[int, int, int, int]
    section: int
    tappable: bool
    shape: str | None = None
    colour: str | None = None

    def describe(self) -> str:
        """``"send button"``, ``"red star icon play"``."""
        return f"{self.colour} {self.shape} icon {self.text}" if self.kind == "icon" else f"{self.text} {self.kind}"


@dataclass(frozen=True, eq=False)
class ScreenSample:
    """A screen and its widgets from the top.

    Args:
        image: (3, h, w).
        sections: names of the sections, from the top.
        on: whether each section is switched on, shown by a filled mark in its header.
    """

    image: Float[Tensor, "3 h w"]
    widgets: tuple[Widget, ...]
    sections: tuple[str, ...]
    on: tuple[bool, ...]

    @property
    def boxes(self) -> Float[Tensor, "n 4"]:
        return torch.tensor([widget.box for widget in self.widgets], dtype=torch.float32)

    def section(self, widget: Widget) -> str:
        """The header above a widget."""
        return self.sections[widget.section]


@dataclass(frozen=True, kw_only=True)
class Screens(World[ScreenSample]):
    """Two or three sections, each a header with a mark that is filled or empty and rows of one or two widgets.

    Whether a button or an icon can be tapped shows at its section's mark alone, not at the widget.

    Args:
        size: (height, width) in pixels.
        kinds: what is drawn from, of ``KINDS``.

    Raises:
        ValueError: an unknown kind, a screen too small for two sections.
    """

    size: tuple[int, int] = (128, 128)
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            known("kinds", kind, KINDS)
        if not self.kinds:
            raise ValueError(f"kinds=() must name at least one of {KINDS}")
        if self.size[0] < 5 * ROW or self.size[1] < 96:
            raise ValueError(f"size={self.size} must be {5 * ROW} by 96 pixels or more")

    def make(self, rng: np.random.Generator) -> ScreenSample:
        from PIL import Image, ImageDraw

        h, w = self.size
        rows = (h - 4) // ROW
        count = int(rng.integers(2, min(3, rows // 2) + 1))
        names = [HEADERS[int(i)] for i in rng.choice(len(HEADERS), count, replace=False)]
        on = [bool(rng.uniform() < 0.5) for _ in names]
        starts = sorted(int(2 * i) for i in rng.choice(np.arange(1, rows // 2), count - 1, replace=False))
        canvas = Image.new("RGB", (w, h), (245, 245, 245))
        draw = ImageDraw.Draw(canvas)
        widgets: list[Widget] = []
        section = -1
        for row in range(rows):
            y = 2 + row * ROW
            if row in (0, *starts):
                section += 1
                widgets.append(_header(draw, names[section], on[section], section, y, w))
                continue
            columns = 1 + int(rng.uniform() < 0.6)
            for column in range(columns):
                x0, x1 = 4 + column * (w - 4) // columns, (column + 1) * (w - 4) // columns
                widgets.append(self._widget(rng, draw, section, on[section], (x0, y + 1, x1, y + ROW - 2)))
        pixels = np.asarray(canvas, np.float32) / 255
        image = pixels.copy()
        for widget in widgets:
            if widget.kind == "icon":
                x0, y0, _, y1 = widget.box
                thing = Thing(str(widget.shape), str(widget.colour), (x0 + 7.5, (y0 + y1) / 2), 12.0)
                one = layer(thing, self.size)
                image[one.window] += one.covers[0][..., None] * (one.colours[0] - image[one.window])
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return ScreenSample(tensor, tuple(widgets), tuple(names), tuple(on))

    def _widget(
        self, rng: np.random.Generator, draw: object, section: int, on: bool, box: tuple[int, int, int, int]
    ) -> Widget:
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        text = LABELS[int(rng.integers(len(LABELS)))]
        x0, y0, x1, y1 = box
        if kind == "icon":
            shape, colour = SHAPES[int(rng.integers(8))], list(COLOURS)[int(rng.integers(8))]
            end = _write(draw, text, x0 + 17, y0 + 2, (40, 40, 40))
            return Widget(kind, text, (x0, y0, end, y1), section, on, shape, colour)
        fill, ink = ((90, 120, 190), (255, 255, 255)) if kind == "button" else ((255, 255, 255), (120, 120, 120))
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=fill, outline=(60, 60, 60))  # type: ignore[attr-defined]
        _write(draw, text, x0 + 4, y0 + 2, ink)
        return Widget(kind, text, box, section, on or kind == "field")

    def panels(self, sample: ScreenSample) -> dict[str, Tensor | str]:
        """The screen, its boxes, and what they hold."""
        image = sample.image.clone()
        for x0, y0, x1, y1 in sample.boxes.int().tolist():
            image[:, y0:y1, [x0, x1 - 1]] = torch.tensor(COLOURS["red"])[:, None, None]
            image[:, [y0, y1 - 1], x0:x1] = torch.tensor(COLOURS["red"])[:, None, None]
        return {"image": sample.image, "boxes": image, "widgets": ", ".join(w.describe() for w in sample.widgets)}


def _write(draw: object, text: str, x: int, y: int, ink: tuple[int, int, int]) -> int:
    """Writes in Pillow's small built-in letters; where the text ends."""
    from PIL import ImageFont

    font = ImageFont.load_default_imagefont()
    draw.text((x, y), text, fill=ink, font=font)  # type: ignore[attr-defined]
    return x + int(font.getbbox(text)[2])


def _header(draw: object, name: str, on: bool, section: int, y: int, width: int) -> Widget:
    box = (0, y, width, y + ROW - 1)
    draw.rectangle((0, y, width - 1, y + ROW - 2), fill=(205, 205, 210))  # type: ignore[attr-defined]
    _write(draw, name, 6, y + 3, (20, 20, 20))
    mark = (width - 16, y + 4, width - 8, y + 12)
    draw.rectangle(mark, fill=(20, 20, 20) if on else None, outline=(20, 20, 20))  # type: ignore[attr-defined]
    return Widget("header", name, box, section, True)
