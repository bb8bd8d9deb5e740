"""What stands on a page: the words of its prose, the values of its fields, and six ways to lay them out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from regard.worlds.typeset import FAMILIES, Column, Face, Sheet

LAYOUTS = ("article", "columns", "letter", "form", "invoice", "scattered")
COMMON = (
    "after again air also always and any ask away back bear been best big bird blue boat book both box boy bring but by "
    "call came car care city cold come day deep door down draw dry each early earth end even eye fact fall far farm fast "
    "few field find fire first fish five fly food foot form four from full game garden girl give glass go gold good green "
    "ground grow hand hard head hear help here high hold home horse hot house hill island keep kind king know land large "
    "last late laugh learn leave left letter life light line list live long look love made make many map mark moon more "
    "morning mother mountain move music name near never new next night north note of old on open other over own page paper "
    "part paint people place plant play point poor power put quiet rain read ready red rest rich right ring river road "
    "rock room round run sail salt same sand school sea season second see seed send seven ship short show side silver sing "
    "sister sky sleep slow small snow soft song soon sound south spring stand star start step stone stop storm street "
    "strong summer sun table take talk tall teach ten the then thing think three time to town trade tree true turn two "
    "under until up valley very voice walk wall warm wash water way week well west wheel white wind window winter wish "
    "wood word work world write year yellow young"
)
PROSE = tuple(COMMON.split())
VALUES = {
    "name": "anna bruno carla david elena frank greta henry irene jonas karin louis",
    "town": "athens bergen cairo delhi essen genoa lagos lima malmo oslo quito turin",
    "date": "02.01.24 05.02.24 09.03.24 12.04.24 17.05.24 20.06.24 23.07.24 28.08.24 30.09.24 31.10.24",
    "phone": "210-664 225-871 301-559 348-120 402-993 467-305 518-246 577-082 630-417 694-738",
    "item": "apples bread candles desks eggs flour gloves honey ink jars kettles lamps",
    "count": "1 2 3 4 5 6 7 8 9 10 12 15 20 25 50",
    "price": "0.75 1.20 1.95 2.40 3.15 4.50 5.80 6.99 8.25 9.60 12.30 15.75",
    "colour": "amber black brown crimson indigo olive orange pink purple teal",
    "total": "10.40 14.65 21.80 33.25 47.90 52.15 68.70 75.05 81.35 96.20",
}
FIELDS = {key: tuple(values.split()) for key, values in VALUES.items()}
COLUMNS = ("item", "count", "price", "colour")
VOCABULARY = tuple(sorted({*PROSE, *FIELDS, *(value for values in FIELDS.values() for value in values)}))


def prose(rng: np.random.Generator, low: int, high: int) -> list[str]:
    """From ``low`` to ``high`` words."""
    return rng.choice(PROSE, rng.integers(low, high + 1)).tolist()


def field(rng: np.random.Generator, key: str) -> list[list[str]]:
    """A row of a form: the key, and one of its values."""
    return [[key], [str(rng.choice(FIELDS[key]))]]


def compose(sheet: Sheet, layout: str, size: int, margin: int, rng: np.random.Generator) -> None:
    """Fills an empty page in one of :data:`LAYOUTS` with text of ``size`` pixels."""
    family = str(rng.choice(FAMILIES))
    faces = Face(family, size), Face(f"{family}-Bold", size)
    room = Column(margin, sheet.width - margin, margin, sheet.height - margin)
    if layout == "scattered":
        _scatter(sheet, faces[0], room, rng)
        return
    if layout == "letter":
        _address(sheet, faces[0], room, rng)
    else:
        sheet.text("title", prose(rng, 1, 2), Face(faces[1].name, round(1.25 * size)), room)
    if layout == "form":
        keys = [key for key in FIELDS if key not in COLUMNS]
        sheet.grid("form", [field(rng, key) for key in rng.permutation(keys).tolist()], faces, room)
    elif layout == "invoice":
        _invoice(sheet, faces, room, rng)
    elif layout == "columns":
        half = (room.x1 - room.x0 - size) // 2
        for left in (room.x0, room.x0 + half + size):
            _fill(sheet, faces[0], Column(left, left + half, room.y, room.y1), rng, plain=False)
    else:
        _fill(sheet, faces[0], room, rng, plain=layout == "letter")


def _fill(sheet: Sheet, face: Face, column: Column, rng: np.random.Generator, plain: bool) -> None:
    """Paragraphs, unless ``plain`` also lists and figures with a caption, until one finds no room."""
    more = True
    while more:
        kind = "paragraph" if plain else rng.choice(("paragraph", "list", "figure"), p=(0.6, 0.2, 0.2))
        if kind == "list":
            more = sheet.bullets([prose(rng, 1, 5) for _ in range(rng.integers(2, 5))], face, column)
        elif kind == "figure":
            more = sheet.figure(int(rng.integers(3, 7)) * face.size, column)
            more = more and sheet.text("caption", prose(rng, 2, 5), face, column)
        else:
            more = sheet.text("paragraph", prose(rng, 5, 30), face, column)


def _address(sheet: Sheet, face: Face, room: Column, rng: np.random.Generator) -> None:
    """A name and a town at the right end."""
    for key in ("name", "town"):
        sheet.line(field(rng, key)[1], face, room.x1 - 6 * face.size, room.y)
        room.y += face.height
    sheet.close("address")
    room.y += face.size // 2


def _invoice(sheet: Sheet, faces: tuple[Face, Face], room: Column, rng: np.random.Generator) -> None:
    """To whom and when, what in a table, and the total."""
    sheet.grid("form", [field(rng, key) for key in ("name", "date")], faces, room)
    across = min(len(COLUMNS), (room.x1 - room.x0) // (6 * faces[0].size))
    heads = rng.permutation(COLUMNS)[:across].tolist()
    rows = [[field(rng, head)[1] for head in heads] for _ in range(rng.integers(2, 9))]
    body = replace(room, y1=room.y1 - 3 * faces[0].size)
    sheet.grid("table", [[[head] for head in heads], *rows], faces, body)
    room.y = body.y
    sheet.grid("form", [field(rng, "total")], faces, room)


def _scatter(sheet: Sheet, face: Face, room: Column, rng: np.random.Generator) -> None:
    """Rows of words, no word twice, with gaps of at least the size of the text."""
    words = rng.permutation(PROSE).tolist()
    while words and room.y + face.height <= room.y1:
        x, row = room.x0 + int(rng.integers(0, 3 * face.size)), []
        while words and x + face.width(words[-1]) <= room.x1:
            row.append((words.pop(), x))
            x += face.width(row[-1][0]) + int(rng.integers(face.size, 4 * face.size))
        sheet.spread(row, face, room.y)
        sheet.close("row")
        room.y += face.height + int(rng.integers(0, 2 * face.size))
