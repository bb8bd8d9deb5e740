"""A text comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from itertools import pairwise
from statistics import fmean
from string import Template

from regard.view import charts, notes
from regard.view.report import FAMILIES, both
from regard.view.svg import Chart, linear, log_ticks, logarithmic, number, place_labels, spread, text_width, ticks
from regard.view.text_comparison import HEADS, TextComparison, TextRow, cells


def html(comparison: TextComparison) -> str:
    """The report of ``comparison``: charts, figures, how to read them, what failed and what was run."""
    ranked = comparison.ranked()
    sections = [_head(comparison)]
    if any(not math.isnan(row.rate("decoding")) for row in ranked):
        sections.append(_speed(comparison))
    sections.append(_table(comparison))
    for figure, title, unit in (
        ("perplexity", "Learning to predict", "perplexity a byte"),
        ("recall", "Learning to recall", "values recalled, %"),
    ):
        if any(row.last(figure) for row in ranked):
            draw = _drawing(comparison, figure)
            sections.append(
                f'<h2 id="{figure}">{title}</h2><p class="soft">Held-out {unit}, after each epoch, mean over seeds.</p>'
                f'<div class="card">{both(draw, 1050.0)}</div>'
            )
    sections += [_reading(comparison), notes.failed(comparison.failures), _settings(comparison)]
    page = Template((notes.ASSETS / "report.html").read_text())
    return page.substitute(
        title=f"Sequence layers compared: {escape(comparison.info['data']['name'])}",
        style=(notes.ASSETS / "report.css").read_text(),
        script=(notes.ASSETS / "report.js").read_text(),
        body="\n".join(section for section in sections if section),
    )


def _drawing(comparison: TextComparison, figure: str) -> Callable[[float], Chart]:
    return lambda width: curves(comparison.ranked(), figure, width)


def _head(comparison: TextComparison) -> str:
    info = comparison.info
    data, machine, settings = info["data"], info["machine"], info["settings"]
    done, wanted = sum(len(row.runs) for row in comparison.rows), 2 * settings["seeds"] * len(comparison.rows)
    facts = [
        (data["name"], "data, byte by byte; and associative recall"),
        (f"{number(data['train'])} + {number(data['test'])}", "bytes to learn from + to test on"),
        (
            f"{len(comparison.rows)} x 2 x {settings['seeds']}",
            f"layers x tasks x seeds; {done} of {wanted} runs finished",
        ),
        (f"{settings['epochs']} x {settings['steps']} steps", f"{info['seconds'] / 60:.1f} minutes in all"),
        (machine["processor"], f"{machine['cores']} cores; one thread a run"),
        (f"torch {machine['torch']}", f"regard compare --task text, {info['date']}"),
    ]
    inside = "".join(f"<div><b>{escape(str(value))}</b><span>{escape(name)}</span></div>" for value, name in facts)
    return f"""<h1>Which sequence layer should I use?</h1>
<p class="lead">{len(comparison.rows)} layers in one identical decoder, trained alike on the same text and the same questions, and
measured on one machine.</p>
<div class="advice"><p>{escape(comparison.advice())}</p><p>This holds for these data, this small decoder and this short training;
the sections below say how far to trust it.</p></div>
<div class="facts">{inside}</div>
<nav><a href="#table">All figures</a><a href="#perplexity">Learning to predict</a><a href="#recall">Learning to recall</a>
<a href="#reading">How to read it</a><a href="#settings">What was run</a></nav>"""


def _key(rows: list[TextRow]) -> str:
    items = []
    for family in dict.fromkeys(row.family for row in rows):
        chart = Chart(14, 14, family)
        chart.mark(7, 7, 5, charts.shape(family), f"mark best f-{family}")
        items.append(f"<span>{chart}{FAMILIES.get(family, family)}</span>")
    return f'<div class="key">{"".join(items)}</div>'


def _speed(comparison: TextComparison) -> str:
    return f"""<h2 id="speed">Perplexity against speed of decoding</h2>
<p class="soft">Lower is better text, right is faster. Small dots are single seeds, marks their mean; filled marks, joined by the
dashed line, are the front: no layer both decodes faster and has a perplexity as low. Point at anything for its figures.</p>
<div class="card">{_key(comparison.ranked())}{both(lambda width: front(comparison, width), 1050.0)}</div>"""


def front(comparison: TextComparison, width: float) -> Chart:
    """Perplexity against tokens a second in cached decoding."""
    rows = [row for row in comparison.ranked() if not math.isnan(row.rate("decoding"))]
    wide = width > 500
    height = 430.0 if wide else 480.0
    box = (46.0, 34.0, width - 12, height - 48)
    rates = [row.rate("decoding") for row in rows]
    values = [p for row in rows for p in row.last("perplexity")]
    low, high = min(rates) / 1.15, max(rates) * (1.25 if wide else 1.6)
    least, most = min(values) / 1.02, max(values) * 1.02
    x, y = logarithmic(low, high, box[0], box[2]), logarithmic(least, most, box[3], box[1] + 14)
    chart = Chart(width, height, "Perplexity against speed of decoding")
    chart.axes(
        box,
        (x, log_ticks(low, high, 8 if wide else 5), "tokens a second in cached decoding (logarithmic)"),
        (y, ticks(least, most, 6), "perplexity a byte (logarithmic)"),
    )
    names = comparison.front()
    steps = sorted((x(row.rate("decoding")), y(row.mean("perplexity"))) for row in rows if row.layer in names)
    stairs = [(box[0], steps[0][1]), steps[0]]
    stairs += [point for (x0, _), (x1, y1) in pairwise(steps) for point in ((x0, y1), (x1, y1))]
    chart.line(stairs, "front", "no layer both decodes faster and has a perplexity as low as these")
    points = [(x(row.rate("decoding")), y(row.mean("perplexity"))) for row in rows]
    labels = [row.layer for row in rows]
    dots = [(at, y(p)) for row, (at, _) in zip(rows, points) for p in row.last("perplexity")]
    places = place_labels(points, labels, (*box[:3], box[3] - 2), dots)
    for (at, level), label, (left, base) in zip(points, labels, places):
        near = (max(left, min(at, left + text_width(label))), max(base - 10, min(level, base)))
        if math.dist(near, (at, level)) > 13:
            chart.line([(at, level), near], "lead")
    for row, (at, level), (left, base) in zip(rows, points, places):
        tone, best = f"f-{row.family}", row.layer in names
        for seed, p in enumerate(row.last("perplexity")):
            chart.mark(at, y(p), 2.2, "circle", f"dot {tone}", f"{row.layer}, seed {seed}: {p:.3f}")
        tip = f"{row.layer}: perplexity {row.mean('perplexity'):.3f} at {row.rate('decoding'):,.0f} tokens a second"
        chart.mark(at, level, 5.5, charts.shape(row.family), f"mark {tone}" + " best" * best, tip)
        chart.text(left, base, row.layer, f"label t-{row.family}" + " strong" * best)
    return chart


def curves(rows: list[TextRow], figure: str, width: float) -> Chart:
    """``figure`` of every layer after each epoch, mean over seeds; the names stand at the ends."""
    factor = 100.0 if figure == "recall" else 1.0
    series = [
        (row, [factor * fmean(values) for values in zip(*(run[figure] for run in row.runs if figure in run))])
        for row in rows
        if row.last(figure)
    ]
    room = max(text_width(row.layer, 11) for row, _ in series) + 14
    height = max(300.0, 15.0 * len(series) + 90)
    box = (46.0, 34.0, width - room, height - 48)
    epochs = max(2, max(len(values) for _, values in series))
    flat = [value for _, values in series for value in values]
    x = linear(1, epochs, box[0] + 4, box[2] - 4)
    if figure == "recall":
        y, marks, name = linear(0, 100, box[3], box[1]), ticks(0, 100, 5), "values recalled, %"
    else:
        least, most = min(flat) / 1.02, max(flat) * 1.02
        y, marks = logarithmic(least, most, box[3], box[1]), ticks(least, most, 6)
        name = "perplexity a byte (logarithmic)"
    chart = Chart(width, height, f"{figure} after each epoch")
    chart.axes(box, (x, [e for e in ticks(1, epochs, 8) if e == int(e)], "epoch"), (y, marks, name))
    last = [y(values[-1]) for _, values in series]
    for (row, values), at, label in zip(series, last, spread(last, 14.0, box[1], box[3])):
        tone = f"f-{row.family}"
        chart.line([(x(e), y(v)) for e, v in enumerate(values, 1)], f"curve {tone}", row.layer)
        for e, v in enumerate(values, 1):
            chart.mark(x(e), y(v), 2.6, charts.shape(row.family), f"mark {tone}", f"{row.layer}, epoch {e}: {v:.2f}")
        chart.line([(box[2] - 2, at), (box[2] + 4, label)], "lead")
        chart.text(box[2] + 7, label + 4, row.layer, f"label small t-{row.family}")
    return chart


def _table(comparison: TextComparison) -> str:
    best, body = comparison.front(), []
    ranked = comparison.ranked()
    for row in ranked:
        inside = "".join(
            f'<td data-value="{"".join(c for c in text.split(" ")[0] if c not in ",")}">{text}</td>'
            for text in cells(row)
        )
        name = escape(row.layer) + (" ●" if row.layer in best else "")
        body.append(f'<tr><th scope="row" data-value="{escape(row.layer)}">{name}</th>{inside}</tr>')
    for row in comparison.rows:
        if row not in ranked:
            reason = escape(f"{row.status}: {row.reason}")
            body.append(
                f'<tr><th scope="row">{escape(row.layer)}</th><td class="reason" colspan="6">{reason}</td></tr>'
            )
    top = "".join(
        f"<th scope=col><button>{name}</button><small>{unit or '&nbsp;'}</small></th>"
        for name, unit in (("layer", ""), *HEADS)
    )
    return f"""<h2 id="table">All figures</h2>
<p class="soft">● stands on the front. Means ± deviations over seeds. Click a heading to sort.</p>
<div class="card scroll"><table class="sortable"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>"""


def _reading(comparison: TextComparison) -> str:
    settings = comparison.info["settings"]
    context, depth = settings["context"], settings["depth"]
    return f"""<h2 id="reading">How to read it</h2>
<ul><li><b>Perplexity</b> is the exponential of the mean cross-entropy of a byte, given up to {context - 1} bytes before it: 1 is
certainty, {number(128)} is guessing. Per word it would be far larger.</li>
<li><b>Recall</b>: pairs of a key and a value are said once, then keys are asked in another order. Two blocks of attention can
learn to look it up; when they find out is partly chance, so mind the deviation. Recall has twice as many steps as text.</li>
<li><b>Training</b> is forward, backward and update on batches of {settings["batch_size"]} windows of {context} bytes.
<b>Decoding</b> adds one byte to one sequence of {context - 1} whose keys and values are cached; much of its time is the rest of
the decoder and the calls themselves, alike for all.</li>
<li><b>Cache</b>: bytes in float32 that one more token adds over all {depth} blocks; 0 where the state does not grow.</li>
<li>{settings["seeds"]} seeds and {settings["epochs"] * settings["steps"]} steps are few: differences smaller than the
deviations say nothing, and layers that learn slowly are not bad layers.</li></ul>"""


def _settings(comparison: TextComparison) -> str:
    info = comparison.info
    data, machine, settings = info["data"], info["machine"], info["settings"]
    rows = {
        "data": f"{data['name']}, {data['train']} + {data['test']} bytes, digest {data['sha256']}",
        "decoder": f"{settings['depth']} blocks, {settings['dim']} channels, {settings['num_heads']} heads, learned positions, "
        f"embedding tied to the head, {settings['context']} tokens of context",
        "training": f"AdamW, peak learning rate {settings['lr']:g}, weight decay {settings['weight_decay']:g}, batches of "
        f"{settings['batch_size']}, {settings['epochs']} epochs of {settings['steps']} steps, warm-up over "
        f"{100 * settings['warmup']:g} % of steps, then cosine to 0, gradients clipped at norm {settings['clip']:g}",
        "seeds": ", ".join(map(str, range(settings["seeds"]))),
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}",
        "software": f"Python {machine['python']}, torch {machine['torch']}",
        "workers": f"{settings['workers']} processes of one thread while training, one while measuring",
        "date": f"{info['date']}, {info['seconds']:.0f} seconds, {info['reused']} runs taken over from before",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return f'<h2 id="settings">What was run</h2><dl>{items}</dl>'
