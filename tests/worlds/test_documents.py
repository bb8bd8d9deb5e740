"""Pages: boxes are the ink of their words and stay with it when the page is turned; order, tables and forms are true."""

import textwrap
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.documents import Documents, Page, render_text, turn
from regard.worlds.layouts import COLUMNS, FIELDS, LAYOUTS, VOCABULARY, compose
from regard.worlds.typeset import FAMILIES, Column, Face, Sheet, font, wrap
from regard.worlds.world import SPLITS


@st.composite
def worlds(draw: st.DrawFn, skew: bool = False) -> Documents:
    size = draw(st.integers(6, 14))
    turned = draw(st.floats(0.5, 15.0)) if skew else 0.0
    room = draw(st.integers(0, 120)), draw(st.integers(0, 120))
    wide, high = 16 * size + room[0] + 70 * (turned > 0), 8 * size + room[1] + 110 * (turned > 0)
    layouts = (draw(st.sampled_from(LAYOUTS)),)
    return Documents(seed=draw(st.integers(0, 2**32)), width=wide, height=high, size=size, layouts=layouts, skew=turned)


def sheet_of(world: Documents) -> Sheet:
    """The sheet behind the world's first page."""
    rng = world.rng(0)
    layout = str(rng.choice(world.layouts))
    sheet = Sheet(world.width, world.height)
    compose(sheet, layout, world.size, world.margin, rng)
    return sheet


def ink(image: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(np.asarray(image) < 255)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@settings(deadline=None, max_examples=40)
@given(worlds())
def test_a_box_is_the_ink_of_its_word(world: Documents) -> None:
    page, sheet = world[0], sheet_of(world)
    assert page.words == tuple(word.text for word in sheet.words)
    together = np.asarray(sheet.draw([]))
    for word, box in zip(sheet.words, page.boxes.tolist(), strict=True):
        alone = np.asarray(sheet.draw([word], rules=False))
        assert ink(alone) == tuple(box)
        together = np.minimum(together, alone)
    assert np.array_equal(together, (page.image[0] * 255).round().numpy())


@settings(deadline=None, max_examples=40)
@given(worlds(skew=True))
def test_boxes_turn_with_the_page_and_stay_on_it(world: Documents) -> None:
    page, sheet = world[0], sheet_of(world)
    assert abs(page.angle) <= world.skew
    size = torch.tensor([world.width, world.height])
    for corners in (page.corners, page.block_corners):
        assert (corners >= 0).all()
        assert (corners <= size).all()
    for i, word in enumerate(sheet.words):
        x0, y0, x1, y1 = ink(turn(sheet.draw([word], rules=False), page.angle))
        found, box = torch.tensor([x0, y0, x1, y1]), page.boxes[i]
        assert (box[:2] - 1.2 <= found[:2]).all()
        assert (box[2:] + 1.2 >= found[2:]).all()
        upright = torch.tensor(word.box)
        sides = (page.corners[i].roll(-1, 0) - page.corners[i]).norm(dim=1)
        assert torch.allclose(sides[:2], (upright[2:] - upright[:2]).float(), atol=1e-3)


def test_a_turned_mark_lies_where_its_corners_say() -> None:
    """Centre of mass of a word against the centre of its turned box, for a word with ink spread evenly: a full block."""
    for angle in (-10.0, 3.0, 10.0):
        sheet = Sheet(200, 120)
        sheet.rules.append((140, 20, 160, 30))
        turned = 255 - np.asarray(turn(sheet.draw(), angle), float)
        ys, xs = np.mgrid[:120, :200] + 0.5
        mass = torch.tensor([(xs * turned).sum(), (ys * turned).sum()]) / turned.sum()
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        dx, dy = 150 - 100, 25 - 60
        assert torch.allclose(mass, torch.tensor([100 + c * dx + s * dy, 60 - s * dx + c * dy]).double(), atol=0.05)


def overlap(a: torch.Tensor, b: torch.Tensor, axis: int) -> bool:
    return bool(min(a[axis + 2], b[axis + 2]) > max(a[axis], b[axis]))


@settings(deadline=None, max_examples=40)
@given(worlds())
def test_order_lines_and_blocks(world: Documents) -> None:
    page = world[0]
    boxes, lines, blocks = page.boxes, page.lines.tolist(), page.blocks.tolist()
    assert set(page.words) <= set(VOCABULARY)
    assert lines == sorted(lines)
    assert blocks == sorted(blocks)
    assert set(range(len(page.kinds))) - set(blocks) == {i for i, kind in enumerate(page.kinds) if kind == "figure"}
    for i, j in pairwise(range(len(boxes))):
        if lines[i] == lines[j]:
            assert blocks[i] == blocks[j]
            assert boxes[i, 2] < boxes[j, 0]
        elif blocks[i] == blocks[j] and page.kinds[blocks[i]] not in ("table", "form"):
            assert boxes[j, 3] > boxes[i, 3]
    for i, block in enumerate(blocks):
        frame = page.block_boxes[block]
        assert (frame[:2] <= boxes[i, :2]).all()
        assert (frame[2:] >= boxes[i, 2:]).all()
    for i, j in combinations(range(len(boxes)), 2):
        assert not (overlap(boxes[i], boxes[j], 0) and overlap(boxes[i], boxes[j], 1))
    for before, after in pairwise(page.block_boxes):
        same_column = overlap(before, after, 0) or page.layout != "columns"
        assert after[1] >= before[3] - world.size // 2 if same_column else after[0] >= before[2]


def pages(layout: str, count: int = 20, **fields: int) -> list[Page]:
    world = Documents(layouts=(layout,), count=count, **fields)
    return [world[i] for i in range(count)]


def test_two_columns_are_read_one_after_the_other() -> None:
    for page in pages("columns"):
        left = (page.boxes[:, 0] < 128) | (page.blocks == 0)
        assert left.tolist() == sorted(left.tolist(), reverse=True)
        assert not left.all()


def test_values_stand_beside_their_keys_and_come_from_their_lists() -> None:
    for page in pages("form") + pages("invoice"):
        for key, value in page.fields.items():
            assert page.words[value] in FIELDS[page.words[key]]
            assert overlap(page.boxes[key], page.boxes[value], 1)
            assert page.boxes[value, 0] > page.boxes[key, 2]
        assert len(page.fields) == (5 if page.layout == "form" else 3)


def test_a_table_is_read_by_rows_and_aligned_by_columns() -> None:
    for page in pages("invoice", height=400):
        table = [i for i, block in enumerate(page.blocks.tolist()) if page.kinds[block] == "table"]
        cells = {tuple(page.cells[i].tolist()): i for i in table}
        assert list(cells) == sorted(cells)
        rows, columns = 1 + max(r for r, _ in cells), 1 + max(c for _, c in cells)
        assert len(cells) == len(table) == rows * columns
        assert rows >= 3
        for (r, c), i in cells.items():
            head = page.words[cells[0, c]]
            assert head in COLUMNS
            assert r == 0 or page.words[i] in FIELDS[head]
            assert abs(page.boxes[i, 0] - page.boxes[cells[0, c], 0]) <= 3
            assert c == 0 or overlap(page.boxes[cells[r, c - 1]], page.boxes[i], 1)


def test_lists_number_their_items() -> None:
    found = 0
    for page in pages("article", 40):
        for number, kind in enumerate(page.kinds):
            rows = [r for (r, c), b in zip(page.cells.tolist(), page.blocks.tolist()) if b == number]
            if kind == "list":
                found += 1
                assert sorted(set(rows)) == list(range(max(rows) + 1))
                assert rows == sorted(rows)
            elif kind in ("title", "paragraph", "caption"):
                assert set(rows) == {-1}
    assert found > 5


def test_scattered_words_are_all_different() -> None:
    for page in pages("scattered", 5) + pages("scattered", 1, height=1024, width=1024, size=6):
        assert len(set(page.words)) == len(page.words)


def test_blur_and_noise_change_pixels_and_nothing_else() -> None:
    clean, spoilt = Documents(skew=3.0), Documents(skew=3.0, blur=1.0, noise=0.1)
    for i in range(5):
        a, b = clean[i], spoilt[i]
        assert torch.equal(a.corners, b.corners)
        assert a.words == b.words
        assert b.image.min() >= 0
        assert b.image.max() <= 1
        assert 0.03 < (a.image - b.image).std() < 0.3
        assert b.image.dtype == torch.float32


@pytest.mark.parametrize(("height", "width", "size"), [(128, 128, 8), (1024, 1024, 20), (64, 160, 10), (128, 1024, 12)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes(height: int, width: int, size: int, layout: str) -> None:
    page = Documents(height=height, width=width, size=size, layouts=(layout,))[3]
    assert page.image.shape == (3, height, width)
    assert len(page.words) > 0


def test_different_in_every_split() -> None:
    world = Documents(skew=5.0, noise=0.1, count=30)
    texts = [{replace(world, split=split)[i].words for i in range(30)} for split in SPLITS]
    assert len(set.union(*texts)) > 80
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]


def test_panels() -> None:
    world = Documents()
    panels = world.panels(world[0])
    assert [panel.shape for panel in panels.values() if isinstance(panel, torch.Tensor)] == [(3, 256, 256)] * 3
    red = (panels["words"][0] > 0.8) & (panels["words"][1] < 0.3)
    x, y = world[0].boxes[0, :2].long().tolist()
    assert red[y, x]
    assert panels["reading order"] == " ".join(world[0].words)


@settings(deadline=None)
@given(st.lists(st.text("abcdefgh", min_size=1, max_size=8), max_size=40), st.integers(8, 30))
def test_wrapping_is_that_of_the_standard_library(texts: list[str], columns: int) -> None:
    """In a face whose letters are all six pixels wide."""
    face = Face("DejaVuSansMono", 10)
    assert font(*face).getlength("abcdefgh") == 48
    lines = wrap(texts, face, 6 * columns)
    assert [" ".join(line) for line in lines] == textwrap.wrap(" ".join(texts), columns)


@settings(deadline=None)
@given(st.lists(st.text("abcXYZ019.,é", min_size=1, max_size=9), min_size=1, max_size=60), st.integers(200, 600))
def test_a_given_text_is_set_whole(texts: list[str], width: int) -> None:
    page = render_text(" ".join(texts), width)
    assert list(page.words) == texts
    assert page.image.shape[2] == width
    assert (page.boxes[:, 2] <= width - 20).all()
    assert (page.boxes[:, 3] <= page.image.shape[1] - 20).all()


def test_paragraphs_of_a_given_text() -> None:
    page = render_text("one two\nthree\n \nfour")
    assert page.blocks.tolist() == [0, 0, 0, 1]
    assert page.words == ("one", "two", "three", "four")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Documents(size=5), "size=5 must be 6 or more"),
        (lambda: Documents(layouts=("poster",)), r"layouts=\('poster',\) must be some of 'article'"),
        (lambda: Documents(layouts=()), r"layouts=\(\) must be some"),
        (lambda: Documents(skew=20.0), r"skew=20\.0 must lie between 0 and 15"),
        (lambda: Documents(blur=-1.0), r"blur=-1\.0"),
        (lambda: Documents(noise=-1.0), r"noise=-1\.0"),
        (lambda: Documents(width=128), r"size=12 needs 168 x 60 .* width=128 and height=256 leave 112 x 240"),
        (lambda: Documents(height=64), "leave 240 x 48"),
        (lambda: render_text("  \n"), "must hold a word"),
        (lambda: render_text("so 語"), "text holds .*no glyphs"),
        (lambda: render_text("hippopotamus", width=80), "'hippopotamus' is .* must fit in 40"),
        (lambda: font("Comic", 9), "name='Comic' must be a font"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_block_without_room_is_not_set() -> None:
    sheet, face = Sheet(100, 40), Face(FAMILIES[0], 10)
    column = Column(5, 95, 5, 20)
    assert not sheet.text("paragraph", ["one", "two", "three", "four", "five", "six"], face, column)
    assert not sheet.figure(30, column)
    assert (sheet.words, sheet.blocks, sheet.rules, column.y) == ([], [], [], 5)
