"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from html import escape
from string import Template
from typing import Any

from regard.view import charts, notes
from regard.view.comparison import Comparison, Row, format_percent, gap
from regard.view.svg import Chart, number

FAMILIES = {
    "baseline": "baselines",
    "vision": "vision layers",
    "cnn": "gates on a convolution",
    "sequence": "sequence layers",
    "sparse": "sparse layers",
    "geometry": "geometry layers",
    "own": "your own",
}


def html(comparison: Comparison) -> str:
    """The report of ``comparison``: charts, figures, what was run, how to read it and what falls short."""
    sections = [_head(comparison)]
    if comparison.measured():
        sections += [
            _pareto(comparison),
            _table(comparison),
            _curves(comparison),
            _growth(comparison),
            _maps(comparison),
        ]
    else:
        sections += [_table(comparison), _curves(comparison)]
    sections += [notes.reading(comparison), notes.failures(comparison), notes.settings(comparison)]
    page = Template((notes.ASSETS / "report.html").read_text())
    return page.substitute(
        title=f"Attention compared: {escape(comparison.info['data']['name'])}",
        style=(notes.ASSETS / "report.css").read_text(),
        script=(notes.ASSETS / "report.js").read_text(),
        body="\n".join(section for section in sections if section),
    )


def both(draw: Callable[[float], Chart], wide: float) -> str:
    """A chart drawn twice, for wide and for narrow screens: text keeps its size, the style sheet shows one of them."""
    return f'<div class="wide">{draw(wide)}</div><div class="narrow">{draw(350.0)}</div>'


def _head(comparison: Comparison) -> str:
    info = comparison.info
    data, machine, settings = info["data"], info["machine"], info["settings"]
    done, wanted = sum(len(row.runs) for row in comparison.rows), settings["seeds"] * len(comparison.rows)
    c, h, w = data["image"]
    facts = [
        (data["name"], f"data: {len(data['classes'])} classes, {h}x{w}{', grey' if c == 1 else ''}"),
        (f"{number(data['train'])} + {number(data['test'])}", "images to learn from + to test on"),
        (f"{len(comparison.rows)} x {settings['seeds']}", f"layers x seeds; {done} of {wanted} runs finished"),
        (f"{settings['epochs']} epochs", f"{info['seconds'] / 60:.1f} minutes in all"),
        (machine["processor"], f"{machine['cores']} cores; one thread a run"),
        (f"torch {machine['torch']}", f"regard compare, {info['date']}"),
    ]
    cells = "".join(f"<div><b>{escape(str(value))}</b><span>{escape(name)}</span></div>" for value, name in facts)
    ranked = comparison.ranked()
    advice, choice = escape(comparison.advice()), comparison.choice()
    if choice is not None:
        name = escape(choice.layer)
        advice = advice.replace(f"Use {name}", f"Use <b>{name}</b>", 1)
    chance = f"Always naming the largest class would give {100 * data['largest']:.1f} %."
    spread = (
        f" Accuracies go from {100 * ranked[-1].accuracy:.1f} to {100 * ranked[0].accuracy:.1f} %." if ranked else ""
    )
    return f"""<h1>Which attention should I use?</h1>
<p class="lead">{len(comparison.rows)} token mixers in one identical network, trained alike on the same images and measured
on one machine.</p>
<div class="advice"><p>{advice}</p><p>{spread} {chance} This holds for these data, this small network and this short
training; the sections below say how far to trust it.</p></div>
<div class="facts">{cells}</div>
<nav><a href="#table">All figures</a><a href="#curves">Learning curves</a><a href="#growth">Growth with tokens</a>
<a href="#maps">Where layers look</a><a href="#reading">How to read it</a><a href="#settings">What was run</a></nav>"""


def _key(rows: list[Row]) -> str:
    items = []
    for family in dict.fromkeys(row.family for row in rows):
        chart = Chart(14, 14, family)
        chart.mark(7, 7, 5, charts.shape(family), f"mark best f-{family}")
        items.append(f"<span>{chart}{FAMILIES.get(family, family)}</span>")
    return f'<div class="key">{"".join(items)}</div>'


def _pareto(comparison: Comparison) -> str:
    return f"""<h2 id="pareto">Accuracy against time</h2>
<p class="soft">Up is more accurate (spaced by the logarithm of the error), left is faster. Small dots are single seeds, marks
their mean; filled marks, joined by the dashed line, are the front: no layer is both faster and more accurate. Point at anything
for its figures.</p>
<div class="card">{_key(comparison.measured())}{both(lambda width: charts.pareto(comparison, width), 1050.0)}</div>"""


def _table(comparison: Comparison) -> str:
    ranked, front, choice = comparison.ranked(), comparison.front(), comparison.choice()
    batch = min(comparison.info["settings"]["batch_size"], comparison.info["data"]["train"])
    heads = [
        ("layer", ""),
        ("accuracy", "% ± sd"),
        ("seeds", ""),
        ("behind", "points ± s.e."),
        ("params", "thousands"),
        ("FLOPs", "M an image"),
        ("forward", f"ms, {batch} images"),
        ("step", f"ms, {batch} images"),
        ("memory", "MB, one step"),
        ("time", "~ tokens"),
    ]
    low = min((a for row in ranked for a in row.accuracies), default=0.0)
    high = max((a for row in ranked for a in row.accuracies), default=1.0)
    body = []
    for row in ranked:
        behind, error = gap(ranked[0], row)
        cells: list[tuple[Any, str]] = [(row.accuracy, format_percent(row.accuracy, row.deviation))]
        cells.append((row.accuracy, str(charts.strip(row, low, high if high > low else low + 1e-6))))
        cells.append((behind, "" if row is ranked[0] else f"{100 * behind:.1f} ± {100 * error:.1f}"))
        if row.cost is not None:
            cost, fit = row.cost, row.scaling.time_fit if row.scaling else None
            cells.append((cost.parameters, f"{cost.parameters / 1e3:.1f}"))
            cells.append((cost.flops.total, f"{cost.flops.total / 1e6:.2f}"))
            cells += [
                (t.median, f'<span title="quartiles {t.low:.2f} and {t.high:.2f}">{t.median:.1f}</span>')
                for t in (cost.forward, cost.step)
            ]
            cells.append((cost.step_memory, f"{cost.step_memory / 1e6:.1f}"))
            cells.append(
                ("", "")
                if fit is None
                else (
                    fit.exponent,
                    f'<span title="standard error {fit.error:.2f}">n<sup>{fit.exponent:.2f}</sup></span>',
                )
            )
        else:
            cells += [("", "")] * 6
        inside = "".join(f'<td data-value="{value}">{text}</td>' for value, text in cells)
        name = escape(row.layer) + (" ●" if row.layer in front else "")
        body.append(
            f'<tr{" class=choice" * (row is choice)}><th scope="row" data-value="{escape(row.layer)}">{name}</th>{inside}</tr>'
        )
    for row in comparison.rows:
        if not row.runs:
            reason = f"{row.status}: {row.reason}"
            body.append(
                f'<tr><th scope="row">{escape(row.layer)}</th><td class="reason" colspan="9">{escape(reason)}</td></tr>'
            )
    top = "".join(
        f"<th scope=col><button>{name}</button><small>{unit or '&nbsp;'}</small></th>"
        if name != "seeds"
        else "<th scope=col>seeds<small>&nbsp;</small></th>"
        for name, unit in heads
    )
    return f"""<h2 id="table">All figures</h2>
<p class="soft">● stands on the front; bold is the advice. “Behind” is the distance to the most accurate, image by image on
the same test images. A step is forward, backward and update. Click a heading to sort.</p>
<div class="card scroll"><table class="sortable"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>"""


def _curves(comparison: Comparison) -> str:
    ranked = comparison.ranked()
    if not ranked:
        return ""
    panels = "".join(
        f'<div class="card"><h3>{escape(row.layer)}<span>{format_percent(row.accuracy, row.deviation)} %</span></h3>'
        f"{charts.curve(ranked, row)}</div>"
        for row in ranked
    )
    return f"""<h2 id="curves">Learning curves</h2>
<p class="soft">Accuracy on the test images (%) after each epoch: mean over seeds, band from the worst to the best seed, all
other layers in grey. Accuracies are spaced by the logarithm of the error.</p><div class="panels">{panels}</div>"""


def _growth(comparison: Comparison) -> str:
    rows = [row for row in comparison.measured() if row.scaling and row.scaling.tokens]
    shown = {
        w: [r for r in rows if r.scaling and (w == "time" or min(r.scaling.memory) > 0)] for w in ("time", "memory")
    }
    cards = ""
    for what, part in shown.items():
        if part:
            chart = both(partial(charts.growth, part, what), 540.0)
            cards += f'<div class="card"><h3>{what.capitalize()}</h3>{chart}</div>'
    if not cards:
        return ""
    left_out = [
        f"<li>{escape(row.layer)} at {n} tokens: {escape(reason)}</li>"
        for row in rows
        if row.scaling
        for n, reason in row.scaling.left_out
    ]
    missing = (
        f"<details><summary>Sizes that were left out</summary><ul>{''.join(left_out)}</ul></details>"
        if left_out
        else ""
    )
    settings = comparison.info["settings"]
    return f"""<h2 id="growth">Growth with tokens</h2>
<p class="soft">The layer alone, one image, forward pass, {settings["dim"]} channels, {settings["num_heads"]} heads. Beside
the name: the exponent p of n<sup>p</sup> fitted from 196 tokens on, with its standard error; 1 is linear, 2 is quadratic.
Layers that work on pieces of fixed size pad what does not fit, which makes their lines uneven.</p>
<div class="pair">{cards}</div>{missing}"""


def _maps(comparison: Comparison) -> str:
    if not comparison.maps:
        return ""
    shares = sorted(v for m in comparison.maps for sample in m.received for v in sample)
    top = max(2.0, math.ceil(shares[int(0.98 * len(shares))]))
    pictures = [charts.picture(pixels) for pixels in comparison.samples]
    cells = ["<span></span>", *(f'<img alt="test image {i}" src="{src}">' for i, src in enumerate(pictures))]
    for found in comparison.maps:
        cells.append(f"<span>{escape(found.layer)}</span>")
        for i, (values, src) in enumerate(zip(found.received, pictures)):
            tip = f"{found.layer}, test image {i}: from {min(values):.2f} to {max(values):.2f} times the mean"
            image = f'<img alt="{escape(tip)}" title="{escape(tip)}" src="{charts.heat(values, found.grid, top)}">'
            cells.append(f'<figure>{image}<img alt="" src="{src}"></figure>')
    stops = ", ".join("rgb({} {} {})".format(*colour) for colour in charts.RAMP)
    without = [row.layer for row in comparison.ranked() if row.layer not in {m.layer for m in comparison.maps}]
    rest = (
        f" Not shown, because no weights from token to token could be read and verified: {', '.join(without)}."
        if without
        else ""
    )
    return f"""<h2 id="maps">Where layers look</h2>
<p class="soft">Attention that each token receives in the first block of the trained network, mean over queries and heads,
with the test image laid over it. <span class="ramp" style="background: linear-gradient(90deg, {stops})"></span> 0 to {top:g}
times the mean over all tokens, or more.{escape(rest)}</p>
<div class="card"><div class="maps" style="--samples: {len(pictures)}">{"".join(cells)}</div></div>"""
