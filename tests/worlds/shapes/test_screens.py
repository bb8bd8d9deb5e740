"""Widgets are inside their sections and boxes, and marks tell what can be tapped."""

import torch

from regard.worlds.shapes.screens import HEADERS, LABELS, Screens

SAMPLES = [Screens()[i] for i in range(30)]


def test_widgets_do_not_overlap_and_lie_on_the_screen() -> None:
    for sample in SAMPLES:
        taken = torch.zeros(128, 128)
        for x0, y0, x1, y1 in sample.boxes.int().tolist():
            assert 0 <= x0 < x1 <= 128
            assert 0 <= y0 < y1 <= 128
            taken[y0:y1, x0:x1] += 1
        assert taken.max() == 1


def test_all_ink_is_in_boxes() -> None:
    for sample in SAMPLES:
        empty = torch.ones(128, 128, dtype=torch.bool)
        for x0, y0, x1, y1 in sample.boxes.int().tolist():
            empty[y0 : y1 + 1, x0 : x1 + 1] = False
        assert (sample.image[:, empty] > 0.94).all()


def test_sections_and_marks() -> None:
    on = []
    for sample in SAMPLES:
        headers = [w for w in sample.widgets if w.kind == "header"]
        assert [w.text for w in headers] == list(sample.sections)
        assert set(sample.sections) <= set(HEADERS)
        tops = [w.box[1] for w in headers]
        for widget in sample.widgets:
            above = sum(top <= widget.box[1] for top in tops) - 1
            assert widget.section == above
            assert sample.section(widget) == sample.sections[above]
            if widget.kind in ("button", "icon"):
                assert widget.tappable == sample.on[above]
                assert widget.text in LABELS
        for header, state in zip(headers, sample.on):
            y = header.box[1] + 8
            assert (sample.image[:, y, 128 - 12].mean() < 0.3) == state
        on += sample.on
    assert 0.3 < sum(on) / len(on) < 0.7


def test_the_widget_itself_does_not_tell() -> None:
    words = {(w.kind, w.tappable) for s in SAMPLES for w in s.widgets}
    assert {("button", True), ("button", False), ("icon", True), ("icon", False)} <= words
    one = next(w for s in SAMPLES for w in s.widgets if w.kind == "icon")
    assert one.describe() == f"{one.colour} {one.shape} icon {one.text}"
