"""The charts of a comparison's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from regard.bench.scaling import Scaling
from regard.view.comparison import Comparison, Row
from regard.view.svg import (
    Chart,
    Point,
    Scale,
    linear,
    log_ticks,
    logarithmic,
    number,
    place_labels,
    png,
    spread,
    text_width,
    ticks,
)

SHAPES = {"baseline": "circle", "vision": "square", "cnn": "triangle", "sequence": "diamond", "sparse": "star"}
# Dark to light in even steps of lightness, readable with every kind of colour vision.
RAMP = ((0, 20, 60), (20, 52, 110), (72, 84, 118), (118, 116, 122), (160, 150, 112), (206, 188, 92), (252, 234, 84))


def shape(family: str) -> str:
    return SHAPES.get(family, "star")


def _along(path: Sequence[Point]) -> list[Point]:
    """Points on a path, close to each other, for labels to keep clear of."""
    points = []
    for (x0, y0), (x1, y1) in pairwise(path):
        pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 8))
        points += [(x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces) for i in range(pieces + 1)]
    return points


def _errors(accuracies: Sequence[float], tests: int, top: float, bottom: float) -> tuple[Scale, list[float]]:
    """A scale for accuracies, spaced by the logarithm of the error, and round accuracies (in %) to mark on it.

    90 to 95 % takes as much room as 95 to 97.5 %. No error counts as half an image out of ``tests``.
    """
    least = 0.5 / tests
    errors = [max(least, 1 - accuracy) for accuracy in accuracies]
    low, high = min(errors) / 1.12, min(1.0, max(errors) * 1.12)
    scale = logarithmic(low, high, top, bottom)
    marks = log_ticks(100 * low, 100 * high, 6)
    return lambda accuracy: scale(max(least, 1 - accuracy)), [100 - mark for mark in marks]


def pareto(comparison: Comparison, width: float) -> Chart:
    """Accuracy against the time of a forward pass: seeds as dots, the mean as a mark, the front as a line."""
    rows = [(row, row.cost.forward) for row in comparison.measured() if row.cost]
    wide = width > 500
    height = 470.0 if wide else 520.0
    box = (46.0, 34.0, width - 12, height - 48)
    low, high = (
        min(time.median for _, time in rows) / 1.15,
        max(time.median for _, time in rows) * (1.25 if wide else 1.6),
    )
    x = logarithmic(low, high, box[0], box[2])
    y, marks = _errors(
        [a for row, _ in rows for a in row.accuracies], comparison.info["data"]["test"], box[1] + 14, box[3]
    )
    batch = min(comparison.info["settings"]["batch_size"], comparison.info["data"]["train"])
    chart = Chart(width, height, "Accuracy against time of a forward pass")
    chart.axes(
        box,
        (x, log_ticks(low, high, 8 if wide else 5), f"forward pass of {batch} images, ms (logarithmic)"),
        (lambda percent: y(percent / 100), marks, "accuracy on test images, %"),
    )
    front = comparison.front()
    steps = sorted((x(time.median), y(row.accuracy)) for row, time in rows if row.layer in front)
    stairs = [point for (x0, y0), (x1, _) in pairwise(steps) for point in ((x0, y0), (x1, y0))]
    stairs += [steps[-1], (box[2], steps[-1][1])]
    chart.line(stairs, "front", "no layer is both faster and more accurate than these")
    points = [(x(time.median), y(row.accuracy)) for row, time in rows]
    dots = [(x(time.median), y(a)) for row, time in rows for a in row.accuracies]
    labels = [row.layer for row, _ in rows]
    places = place_labels(points, labels, (*box[:3], box[3] - 2), dots + _along(stairs))
    for (at, level), label, (left, base) in zip(points, labels, places):
        near = (max(left, min(at, left + text_width(label))), max(base - 10, min(level, base)))
        if math.dist(near, (at, level)) > 13:
            chart.line([(at, level), near], "lead")
    for (row, time), (at, level), (left, base) in zip(rows, points, places):
        tone, best = f"f-{row.family}", row.layer in front
        chart.line([(at, y(min(row.accuracies))), (at, y(max(row.accuracies)))], f"whisker {tone}")
        for seed, accuracy in enumerate(row.accuracies):
            tip = f"{row.layer}, seed {seed}: {100 * accuracy:.1f} %"
            chart.mark(at, y(accuracy), 2.2, "circle", f"dot {tone}", tip)
        tip = f"{row.layer}: {100 * row.accuracy:.1f} % at {time.median:.2f} ms (quartiles {time.low:.2f} and {time.high:.2f})"
        chart.mark(at, level, 5.5, shape(row.family), f"mark {tone}" + " best" * best, tip)
        chart.text(left, base, row.layer, f"label t-{row.family}" + " strong" * best)
    return chart


def growth(rows: Sequence[Row], what: str, width: float) -> Chart:
    """Time or memory of the layer alone against the number of tokens, with fitted exponents at the line's end."""
    wide = width > 500
    series = [(row, row.scaling, _values(row.scaling, what)) for row in rows if row.scaling]
    series = [(row, s, values) for row, s, values in series if len(values) > 1 and min(values) > 0]
    ends = []
    for row, found, _ in series:
        fit = found.time_fit if what == "time" else found.memory_fit
        error = f" ± {fit.error:.2f}" if fit and wide else ""
        ends.append(row.layer if fit is None else f"{row.layer} {fit.exponent:.2f}{error}")
    room = 0.9 * max(text_width(end, 11) for end in ends) + 10
    height = max(300.0, 15.0 * len(series) + 90) if wide else max(330.0, 15.0 * len(series) + 120)
    box = (46.0, 34.0, width - room, height - 48)
    tokens = [n for _, found, _ in series for n in found.tokens]
    values = [value for *_, numbers in series for value in numbers]
    low, high = min(values) / 1.2, max(values) * 1.2
    x, y = logarithmic(min(tokens), max(tokens), box[0] + 6, box[2] - 6), logarithmic(low, high, box[3], box[1])
    chart = Chart(width, height, f"{what} against number of tokens")
    sizes = sorted(set(tokens))
    chart.axes(
        box,
        (x, sizes if wide else sizes[::2], "tokens (logarithmic)"),
        (y, log_ticks(low, high), "forward pass, ms" if what == "time" else "peak memory, MB"),
    )
    last = [y(numbers[-1]) for *_, numbers in series]
    for (row, found, numbers), end, at, label_y in zip(series, ends, last, spread(last, 14.0, box[1], box[3])):
        tone = f"f-{row.family}"
        points = [(x(n), y(value)) for n, value in zip(found.tokens, numbers)]
        chart.line(points, f"curve {tone}", end)
        for n, value, (px, py) in zip(found.tokens, numbers, points):
            unit = "ms" if what == "time" else "MB"
            chart.mark(px, py, 2.6, shape(row.family), f"mark {tone}", f"{row.layer}: {value:.3g} {unit} at {n} tokens")
        chart.line([(points[-1][0] + 4, at), (box[2] + 2, label_y), (box[2] + 4, label_y)], "lead")
        chart.text(box[2] + 7, label_y + 4, end, f"label small t-{row.family}")
    return chart


def _values(found: Scaling, what: str) -> list[float]:
    return [t.median for t in found.time] if what == "time" else [m / 1e6 for m in found.memory]


def curve(rows: Sequence[Row], own: Row) -> Chart:
    """Test accuracy of one layer after each epoch, mean and range over seeds, before the means of the others.

    Accuracies are spaced by the logarithm of the error, so that 90 to 95 % takes as much room as 95 to 97.5 %.
    """
    width, height = 240.0, 160.0
    box = (34.0, 10.0, width - 8, height - 22)
    curves = {row.layer: list(zip(*(run["accuracy"] for run in row.runs))) for row in rows}
    epochs = max(2, max(len(points) for points in curves.values()))
    everything = [a for points in curves.values() for epoch in points for a in epoch]
    x = linear(1, epochs, box[0] + 4, box[2] - 4)
    y, marks = _errors(everything, len(own.runs[0]["correct"]), box[1], box[3])
    chart = Chart(width, height, f"learning curve of {own.layer}")
    for value in marks:
        chart.line([(box[0], y(value / 100)), (box[2], y(value / 100))], "grid")
        chart.text(box[0] - 5, y(value / 100) + 4, number(value), "tick", "end")
    for value in (v for v in ticks(1, epochs, 4) if v == int(v)):
        chart.text(x(value), box[3] + 16, number(value), "tick", "middle")
    for name, points in curves.items():
        if name != own.layer:
            chart.line([(x(e), y(fmean(p))) for e, p in enumerate(points, 1)], "ghost", name)
    mine = curves[own.layer]
    upper = [(x(e), y(max(p))) for e, p in enumerate(mine, 1)]
    lower = [(x(e), y(min(p))) for e, p in enumerate(mine, 1)]
    chart.area(upper, lower, f"band f-{own.family}")
    chart.line([(x(e), y(fmean(p))) for e, p in enumerate(mine, 1)], f"curve thick f-{own.family}")
    for e, p in enumerate(mine, 1):
        tip = f"{own.layer}, epoch {e}: {100 * fmean(p):.1f} %, seeds from {100 * min(p):.1f} to {100 * max(p):.1f}"
        chart.mark(x(e), y(fmean(p)), 3.0, "circle", f"mark f-{own.family}", tip)
    return chart


def strip(row: Row, low: float, high: float) -> Chart:
    """The accuracies of one layer's seeds on a line, its mean as a bar; for a table cell."""
    chart = Chart(84, 14, f"accuracy of the seeds of {row.layer}")
    x = linear(low, high, 4, 80)
    chart.line([(4, 7), (80, 7)], "grid")
    for seed, accuracy in enumerate(row.accuracies):
        chart.mark(x(accuracy), 7, 2.6, "circle", f"dot f-{row.family}", f"seed {seed}: {100 * accuracy:.1f} %")
    chart.line([(x(row.accuracy), 2), (x(row.accuracy), 12)], f"mean f-{row.family}")
    return chart


def ramp(share: float) -> tuple[int, int, int]:
    """Colour of ``share`` in [0, 1]."""
    place = max(0.0, min(1.0, share)) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    a, b = RAMP[i], RAMP[i + 1]
    red, green, blue = (round(a[c] + (place - i) * (b[c] - a[c])) for c in range(3))
    return red, green, blue


def heat(values: Sequence[float], grid: tuple[int, int], top: float) -> str:
    """A map over ``grid``, coloured from 0 to ``top``, as a data address."""
    h, w = grid
    return png([[ramp(values[i * w + j] / top) for j in range(w)] for i in range(h)])


def picture(pixels: Sequence[Sequence[Sequence[int]]]) -> str:
    """An image (c, h, w) with one or three channels as a data address, stretched to its own brightest value."""
    most = max(value for channel in pixels for row in channel for value in row) or 1
    scale = 255 / most if most < 64 else 1.0
    red, green, blue = pixels if len(pixels) == 3 else [pixels[0]] * 3
    rows = [list(zip(*lines)) for lines in zip(red, green, blue)]
    return png([[tuple(min(255, math.floor(v * scale)) for v in colour) for colour in row] for row in rows])  # type: ignore[misc]
