"""Formulas from a random grammar as images with their markup, their tree, and the box of every sign."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.worlds.markup import (
    DIGITS,
    GREEK,
    LARGE,
    LETTERS,
    OPERATORS,
    STACKED,
    Fraction,
    Group,
    Node,
    Root,
    Row,
    Scripts,
    Sign,
    compact,
    edit_score,
    encode,
    spell,
    split,
)
from regard.worlds.world import SPLITS, Split, World

if TYPE_CHECKING:
    from matplotlib.path import Path
    from matplotlib.textpath import TextToPath

FAMILIES = ("cm", "stix", "dejavusans")
MARGIN = 3


@dataclass(frozen=True)
class Formula:
    """A formula, drawn at the left end of the image and half-way up.

    Args:
        image: (3, h, w), black on white.
        markup: its tokens parted by spaces.
        tokens: their numbers in :data:`regard.worlds.markup.TOKENS`, with those of start and end.
        tree: what :func:`regard.worlds.markup.parse` makes of the markup.
        boxes: (m, 4), the ink of each sign, fraction bar and root.
        signs: (m,), the place in ``tokens`` of what each box belongs to, ascending; braces and scripts have no ink.
    """

    image: Float[Tensor, "3 h w"]
    markup: str
    tokens: Int[Tensor, "n"]
    tree: Row
    boxes: Float[Tensor, "m 4"]
    signs: Int[Tensor, "m"]


@dataclass(frozen=True, kw_only=True)
class Formulas(World[Formula]):
    r"""Formulas of letters, digits, Greek letters and operators with scripts, fractions, roots, brackets, sums and integrals.

    No formula stands in two splits, however short.

    Args:
        height, width: of the image in pixels.
        size: of the text in pixels.
        longest: tokens of markup, start and end not counted, that a formula may have.
        depth: how far fractions, roots and brackets are nested.
        family: of the mathematical font, ``cm`` (Computer Modern), ``stix`` or ``dejavusans``.

    Raises:
        ValueError: an image too small for a sign, no token or a negative depth, an unknown family.
        ModuleNotFoundError: matplotlib is not installed.
    """

    height: int = 32
    width: int = 128
    size: int = 13
    longest: int = 16
    depth: int = 2
    family: Literal["cm", "stix", "dejavusans"] = "cm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 6:
            raise ValueError(f"size={self.size} must be 6 or more to be legible")
        if min(self.height, self.width) < 2 * self.size:
            raise ValueError(
                f"height={self.height} and width={self.width} must be {2 * self.size} or more, twice the size"
            )
        if self.longest < 1 or self.depth < 0:
            raise ValueError(f"longest={self.longest} must be 1 or more, depth={self.depth} must not be negative")
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} must be one of {', '.join(map(repr, FAMILIES))}")

    def make(self, rng: np.random.Generator) -> Formula:
        while True:
            tree = _expression(rng, self.depth)
            tokens = spell(tree)
            markup = " ".join(tokens)
            if len(tokens) > self.longest or _split_of(markup) != self.split:
                continue
            glyphs, bars = _outlines(markup, self.size, self.family)
            if (placed := _placed([*glyphs, *bars], self.height, self.width)) is not None:
                break
        glyph, bar = iter(placed[: len(glyphs)]), iter(placed[len(glyphs) :])
        inked = [(place, next(bar if is_bar else glyph)) for place, is_bar in _drawn(tree, 0)]
        signs = sorted({place for place, _ in inked})
        hulls = torch.tensor([_hull([path for place, path in inked if place == sign]) for sign in signs])
        x0, low, x1, high = hulls.unbind(1)
        return Formula(
            image=_paint(placed, self.height, self.width),
            markup=markup,
            tokens=encode(tokens),
            tree=tree,
            boxes=torch.stack([x0, self.height - high, x1, self.height - low], 1).float(),
            signs=torch.tensor(signs) + 1,
        )

    def panels(self, sample: Formula) -> dict[str, Tensor | str]:
        image = sample.image.clone()
        for x0, y0, x1, y1 in sample.boxes.round().long().tolist():
            frame = np.zeros(image.shape[1:], bool)
            frame[y0 : y1 + 1, x0 : x1 + 1] = True
            frame[y0 + 1 : y1, x0 + 1 : x1] = False
            image[:, torch.from_numpy(frame)] = torch.tensor([[0.9], [0.2], [0.1]])
        return {"formula": sample.image, "signs": image, "markup": sample.markup}


def render(markup: str, height: int, width: int, size: int = 13, family: str = "cm") -> Float[Tensor, "3 h w"]:
    """Any markup that matplotlib understands, drawn as :class:`Formulas` draws its own.

    Raises:
        ValueError: markup that cannot be drawn, or does not fit.
    """
    glyphs, bars = _outlines(markup, size, family)
    if (placed := _placed([*glyphs, *bars], height, width)) is None:
        raise ValueError(f"markup={markup!r} does not fit in height={height}, width={width} at size={size}")
    return _paint(placed, height, width)


def image_score(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h v"]) -> float:
    """How alike two images of one height are: edit distance with columns as symbols, 1 for equal images.

    White columns at the right end do not count.
    """
    columns = [(image * 255).round().byte().permute(2, 0, 1).flatten(1).numpy() for image in (a, b)]
    inked = [side[: 1 + max(np.flatnonzero((side < 255).any(1)), default=-1)] for side in columns]
    return edit_score(*([column.tobytes() for column in side] for side in inked))


def _split_of(markup: str) -> Split:
    """Each formula belongs to one split: eight in ten to train on, one to validate, one to test."""
    return SPLITS[max(0, zlib.crc32(markup.encode()) % 10 - 7)]


def _pick(rng: np.random.Generator, tokens: Sequence[str]) -> Sign:
    return Sign(tokens[int(rng.integers(len(tokens)))])


def _expression(rng: np.random.Generator, depth: int) -> Row:
    """Terms with operators between them, such that ``parse`` of the spelling gives the same tree."""
    row = _term(rng, depth)
    for _ in range(rng.integers(0, 3)):
        row = (*row, _pick(rng, OPERATORS), *_term(rng, depth))
    return row


def _term(rng: np.random.Generator, depth: int) -> Row:
    kinds = ("sign", "scripts", "fraction", "root", "brackets", "large")
    kind = rng.choice(kinds, p=(0.4, 0.25, 0.12, 0.08, 0.1, 0.05)) if depth else "sign"
    sign = _pick(rng, LETTERS + DIGITS + GREEK)
    if kind == "scripts":
        which = rng.integers(3)
        below, above = (_small(rng) if which != skipped else None for skipped in (0, 1))
        return (Scripts(_pick(rng, LETTERS + GREEK), below, above),)
    if kind == "fraction":
        return (Fraction(_expression(rng, depth - 1), _expression(rng, depth - 1)),)
    if kind == "root":
        return (Root(_expression(rng, depth - 1)),)
    if kind == "brackets":
        opening, closing = ("()", "[]")[rng.integers(2)]
        return (Sign(opening), *_expression(rng, depth - 1), Sign(closing))
    if kind == "large":
        return (Scripts(_pick(rng, LARGE), _small(rng), _small(rng)), sign)
    return (sign,) if rng.random() < 0.6 else (_pick(rng, DIGITS), _pick(rng, LETTERS + GREEK))


def _small(rng: np.random.Generator) -> Row:
    """One sign, or two with an operator."""
    first = _pick(rng, LETTERS + DIGITS)
    return (first,) if rng.random() < 0.7 else (first, _pick(rng, ("+", "-")), _pick(rng, DIGITS))


def _drawn(row: Row, start: int) -> Iterator[tuple[int, bool]]:
    """The places of the tokens with ink in the order in which they are drawn, and whether each is a bar."""
    for node in row:
        yield from _drawn_node(node, start)
        start += len(spell((node,)))


def _drawn_node(node: Node, start: int) -> Iterator[tuple[int, bool]]:
    match node:
        case Sign():
            yield start, False
        case Fraction(above, below):
            yield from _drawn(above, start + 2)
            yield start, True
            yield from _drawn(below, start + 4 + len(spell(above)))
        case Root(body):
            yield from ((start, False), (start, True))
            yield from _drawn(body, start + 2)
        case Group(body):
            yield from _drawn(body, start + 1)
        case Scripts(base, below, above):
            low = start + len(spell((base,))) + 2
            high = low if below is None else low + len(spell(below)) + 3
            parts = [_drawn_node(base, start), _drawn(above or (), high), _drawn(below or (), low)]
            if isinstance(base, Sign) and base.token in STACKED:
                parts[:2] = parts[1::-1]
            for part in parts:
                yield from part


@cache
def _typesetter() -> TextToPath:
    from matplotlib.textpath import TextToPath

    return TextToPath()


def _outlines(markup: str, size: int, family: str) -> tuple[list[Path], list[Path]]:
    """The outlines of glyphs and of bars, in pixels, y upwards."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path

    typesetter = _typesetter()
    scale = size / typesetter.FONT_SCALE
    try:
        placed, shapes, bars = typesetter.get_glyphs_mathtext(
            FontProperties(math_fontfamily=family), f"${compact(split(markup))}$"
        )
    except ValueError as error:
        raise ValueError(f"markup={markup!r} cannot be drawn: {error}") from error
    glyphs = []
    for name, x, y, shrunk in placed:
        points, codes = shapes[name]
        glyphs.append(Path((np.asarray(points, float).reshape(-1, 2) * shrunk + (x, y)) * scale, codes))
    return glyphs, [Path(np.asarray(points) * scale, codes) for points, codes in bars]


def _hull(paths: Sequence[Path]) -> tuple[float, float, float, float]:
    """Of the outlines, their curves cut into pieces: right to a tenth of a pixel."""
    corners = [path.to_polygons(closed_only=False) for path in paths]
    points = np.concatenate([polygon for polygons in corners for polygon in polygons])
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return x0, y0, x1, y1


def _placed(paths: Sequence[Path], height: int, width: int) -> list[Path] | None:
    """The outlines moved to their place, or nothing when they do not fit."""
    from matplotlib.transforms import Affine2D

    x0, y0, x1, y1 = _hull(paths)
    if x1 - x0 > width - 2 * MARGIN or y1 - y0 > height - 2 * MARGIN:
        return None
    move = Affine2D().translate(MARGIN - x0, (height - y0 - y1) / 2)
    return [path.transformed(move) for path in paths]


def _paint(paths: Sequence[Path], height: int, width: int) -> Float[Tensor, "3 h w"]:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.transforms import IdentityTransform

    canvas = RendererAgg(width, height, 72)
    pen = canvas.new_gc()
    pen.set_linewidth(0)
    pen.set_snap(False)
    for path in paths:
        canvas.draw_path(pen, path, IdentityTransform(), (0.0, 0.0, 0.0))
    covered = np.asarray(canvas.buffer_rgba())[..., 3].astype(np.float32) / 255
    return torch.from_numpy(1 - covered).expand(3, -1, -1).contiguous()
