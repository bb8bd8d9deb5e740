"""Small charts as SVG text: coloured by style sheet classes, explained by tooltips."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Scale = Callable[[float], float]


def png(rows: Sequence[Sequence[tuple[int, int, int]]]) -> str:
    """An image of (red, green, blue) bytes as a data address."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    pixels = b"".join(b"\0" + bytes(value for colour in row for value in colour) for row in rows)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels, 9)), chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Maps [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Maps [low, high] to [start, end] by logarithms."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them, or finer, as long as there are at most ``most``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= most:
            break
    return found


def number(value: float) -> str:
    """Without needless digits, with thin groups of thousands."""
    return f"{value:,.6g}".replace(",", "\u202f")


def text_width(text: str, size: float = 12.0) -> float:
    """An estimate that errs on the wide side."""
    return 0.6 * size * len(text)


@dataclass
class Chart:
    """A drawing of ``width`` by ``height`` units; what is drawn later lies on top."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, content: str = "", tip: str = "", **attributes: object) -> None:
        """One element; underscores in attribute names become hyphens, ``class_`` is the class."""
        pairs = (
            f'{key.rstrip("_").replace("_", "-")}="{value:.1f}"'
            if isinstance(value, float)
            else f'{key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
            for key, value in attributes.items()
        )
        inner = f"<title>{escape(tip)}</title>" * bool(tip) + content
        self.parts.append(f"<{tag} {' '.join(pairs)}>{inner}</{tag}>")

    def text(
        self, x: float, y: float, text: str, class_: str = "", anchor: str = "start", **attributes: object
    ) -> None:
        self.add("text", escape(text), x=float(x), y=float(y), class_=class_, text_anchor=anchor)

    def line(self, points: Iterable[Point], class_: str, tip: str = "") -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.add("path", tip=tip, d=path, class_=class_)

    def area(self, upper: Sequence[Point], lower: Sequence[Point], class_: str) -> None:
        corners = [*upper, *reversed(lower)]
        self.add("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "Z", class_=class_)

    def mark(self, x: float, y: float, size: float, shape: str, class_: str, tip: str = "") -> None:
        """A circle, square, diamond, triangle or star around (x, y)."""
        outlines = {
            "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
            "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
            "triangle": ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
            "star": ((0, -1.3), (0.4, -0.4), (1.3, 0), (0.4, 0.4), (0, 1.3), (-0.4, 0.4), (-1.3, 0), (-0.4, -0.4)),
        }
        if shape == "circle":
            self.add("circle", tip=tip, cx=float(x), cy=float(y), r=float(size), class_=class_)
        else:
            corners = "L".join(f"{x + size * dx:.1f} {y + size * dy:.1f}" for dx, dy in outlines[shape])
            self.add("path", tip=tip, d=f"M{corners}Z", class_=class_)

    def axes(
        self,
        box: Box,
        x: tuple[Scale, Sequence[float], str],
        y: tuple[Scale, Sequence[float], str],
    ) -> None:
        """Grid lines, ticks and names around ``box`` (left, top, right, bottom); an axis is its scale, ticks and name."""
        left, top, right, bottom = box
        for value in y[1]:
            self.line([(left, y[0](value)), (right, y[0](value))], "grid")
            self.text(left - 8, y[0](value) + 4, number(value), "tick", "end")
        for value in x[1]:
            self.line([(x[0](value), bottom), (x[0](value), bottom + 4)], "axis")
            self.text(x[0](value), bottom + 18, number(value), "tick", "middle")
        self.line([(left, bottom), (right, bottom)], "axis")
        self.text((left + right) / 2, bottom + 38, x[2], "name", "middle")
        self.text(0, top - 14, y[2], "name")

    def __str__(self) -> str:
        inside = "".join(self.parts)
        label = escape(self.title)
        return f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{label}">{inside}</svg>'


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near ``wanted``, in the same order, at least ``gap`` apart and within [low, high] if there is room.

    Neighbours that are too close form a group, placed around the mean of what its members want.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []

    def start(group: list[int]) -> float:
        centre = sum(wanted[i] for i in group) / len(group)
        half = gap * (len(group) - 1) / 2
        return max(low, min(centre - half, high - 2 * half))

    for i in order:
        groups.append([i])
        while len(groups) > 1 and start(groups[-1]) - (start(groups[-2]) + gap * (len(groups[-2]) - 1)) < gap:
            last = groups.pop()
            groups[-1] += last
    placed = [0.0] * len(wanted)
    for group in groups:
        for place, i in enumerate(group):
            placed[i] = start(group) + gap * place
    return placed


def place_labels(
    points: Sequence[Point],
    labels: Sequence[str],
    box: Box,
    obstacles: Sequence[Point],
) -> list[Point]:
    """Where to start each label (left end of its baseline), greedily: near its point, on no other label and no point.

    A place that is nearer to another point than to its own is avoided, so are ``obstacles``; all stay within ``box``
    (left, top, right, bottom).
    """
    taken: list[Box] = []
    placed = []
    sides = ((1, 0), (1, -0.8), (1, 0.8), (0, -1), (0, 1), (-1, 0), (-1, -0.8), (-1, 0.8))
    for point, label in zip(points, labels):
        width = text_width(label)
        best, least, area = point, math.inf, (0.0, 0.0, 0.0, 0.0)
        for ring in (0, 8, 18, 30, 44, 60, 80):
            for dx, dy in sides:
                left = point[0] + dx * (9 + ring * 0.5) - width * (1 - dx) / 2
                base = point[1] + 4 + dy * (12 + ring)
                tried = (left, base - 11, left + width, base + 3)
                own = _distance(point, tried)
                cost = 0.35 * ring + own / 10 + (dx < 0)
                cost += 500 * (tried[0] < box[0] or tried[1] < box[1] or tried[2] > box[2] or tried[3] > box[3])
                cost += 200 * sum(_overlap(tried, other) for other in taken)
                others = [_distance(other, tried) for other in points if other != point]
                cost += 60 * sum(far < 6 for far in others) + 40 * any(far < own for far in others)
                cost += 6 * sum(_distance(other, tried) < 3 for other in obstacles)
                if cost < least:
                    best, least, area = (left, base), cost, tried
        taken.append(area)
        placed.append(best)
    return placed


def _distance(point: Point, box: Box) -> float:
    dx = max(box[0] - point[0], 0.0, point[0] - box[2])
    dy = max(box[1] - point[1], 0.0, point[1] - box[3])
    return math.hypot(dx, dy)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
