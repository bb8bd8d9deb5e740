"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from regard.view import charts
from regard.view.comparison import Comparison, Row, format_percent, gap
from regard.view.svg import Chart, number

ASSETS = Path(__file__).parent / "assets"
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
    sections += [_reading(comparison), _failures(comparison), _settings(comparison)]
    page = Template((ASSETS / "report.html").read_text())
    return page.substitute(
        title=f"Attention compared: {escape(comparison.info['data']['name'])}",
        style=(ASSETS / "report.css").read_text(),
        script=(ASSETS / "report.js").read_text(),
        body="\n".join(section for section in sections if section),
    )


def _both(draw: Callable[[float], Chart], wide: float) -> str:
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
    chance = f"Always naming the largest class would give {100 * data['largest']:.1f} %."
    spread = (
        f" Accuracies go from {100 * ranked[-1].accuracy:.1f} to {100 * ranked[0].accuracy:.1f} %." if ranked else ""
    )
    return f"""<h1>Which attention should I use?</h1>
<p class="lead">{len(comparison.rows)} token mixers in one identical network, trained alike on the same images and measured on one machine.</p>
<div class="advice"><p>{escape(comparison.advice())}</p><p>{spread} {chance} This holds for these data, this small network and
this short training; the sections below say how far to trust it.</p></div>
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
<p class="soft">Up is more accurate, left is faster. Small dots are single seeds, marks their mean; filled marks, joined by the dashed
line, are the front: no layer is both faster and more accurate. Point at anything for its figures.</p>
<div class="card">{_key(comparison.measured())}{_both(lambda width: charts.pareto(comparison, width), 1050.0)}</div>"""


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
<p class="soft">● stands on the front; bold is the advice. “Behind” is the distance to the most accurate, image by image on the same test
images. A step is forward, backward and update. Click a heading to sort.</p>
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
<p class="soft">Accuracy on the test images (%) after each epoch: mean over seeds, band from the worst to the best seed, all other layers
in grey. Accuracies are spaced by the logarithm of the error.</p><div class="panels">{panels}</div>"""


def _growth(comparison: Comparison) -> str:
    rows = [row for row in comparison.measured() if row.scaling and row.scaling.tokens]
    shown = {
        w: [r for r in rows if r.scaling and (w == "time" or min(r.scaling.memory) > 0)] for w in ("time", "memory")
    }
    cards = "".join(
        f'<div class="card"><h3>{name}</h3>{_both(lambda width, part=part, which=which: charts.growth(part, which, width), 540.0)}</div>'
        for which, name in (("time", "Time"), ("memory", "Memory"))
        if (part := shown[which])
    )
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
<p class="soft">The layer alone, one image, forward pass, {settings["dim"]} channels, {settings["num_heads"]} heads. Beside the name: the
exponent p of n<sup>p</sup> fitted from 196 tokens on, with its standard error; 1 is linear, 2 is quadratic. Where one fixed size of
grid ends and the next begins, padding makes lines uneven.</p><div class="pair">{cards}</div>{missing}"""


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
            tip = f"{found.layer}, test image {i}: from {min(values):.2f} to {max(values):.2f} times the even share"
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
<p class="soft">Attention that each token receives in the first block of the trained network, mean over queries and heads, with the test
image laid over it. 1 is a token's even share. <span class="ramp" style="background: linear-gradient(90deg, {stops})"></span> 0 to
{top:g} shares or more.{escape(rest)}</p>
<div class="card"><div class="maps" style="--samples: {len(pictures)}">{"".join(cells)}</div></div>"""


def _reading(comparison: Comparison) -> str:
    info = comparison.info
    settings, data = info["settings"], info["data"]
    missed: Counter[str] = Counter()
    for row in comparison.measured():
        if row.cost:
            missed.update(row.cost.flops.missed)
    names = ", ".join(name for name, _ in missed.most_common(12)) or "nothing"
    names += f" and {len(missed) - 12} rarer operators" if len(missed) > 12 else ""
    seeds = (
        "One seed says nothing about chance in training."
        if settings["seeds"] == 1
        else f"A deviation from {settings['seeds']} seeds is itself a rough figure; more seeds make it and the errors firmer."
    )
    close = ", ".join(row.layer for row in comparison.close())
    return f"""<h2 id="reading">How to read it, and what falls short</h2>
<ul>
<li>The advice is the fastest layer that is no more than one standard error behind the most accurate. On these data that leaves:
{escape(close)}. The error is that of the difference on the same {data["test"]} test images, with the spread over seeds; only what is
behind by two errors or more is surely behind. {seeds}</li>
<li>The figure of a run is that of its last epoch, not of its best; no epoch or setting was chosen by the test images.</li>
<li>Under one seed all networks start from the same numbers outside the slot and see the images in the same order.</li>
<li>Every layer runs with its own default settings and the same recipe. A layer that wants another learning rate, longer training or a
larger network is at a disadvantage; {settings["epochs"]} epochs of a small network show how quickly a layer learns as much as how well.</li>
<li><b>identity</b> mixes nothing: what it reaches is the work of stem, downsampling and averaging. Gates for convolutional networks stand
behind the depthwise convolution of <b>convolution</b>, so their own effect is their distance from it.</li>
<li>Times are medians, layers taking turns, one thread, whole network. FLOPs are one image's matrix products, convolutions and fused
attention, a multiply-add counting as two. Not counted: {escape(names)}.</li>
<li>Peak memory is what one training step allocates beyond parameters and optimiser state, by replaying every allocation that torch's
profiler saw. It does not see what libraries take from the system by themselves.</li>
<li>Speed is that of plain PyTorch on this processor: a layer with a kernel of its own for another device may rank otherwise there.</li>
</ul>"""


def _failures(comparison: Comparison) -> str:
    skipped = comparison.info["data"]["skipped"]
    parts = []
    if comparison.failures:
        items = "".join(
            f"<li><b>{escape(f['layer'])}</b>, seed {escape(f['seed'])}: {escape(f['reason'])}<details><summary>traceback</summary>"
            f"<pre>{escape(f['traceback'])}</pre></details></li>"
            for f in comparison.failures
        )
        parts.append(f'<h2 id="failures">Runs that failed</h2><ul>{items}</ul>')
    if skipped:
        items = "".join(f"<li>{escape(path)}: {escape(reason)}</li>" for path, reason in skipped[:50])
        more = f"<p>and {len(skipped) - 50} more</p>" if len(skipped) > 50 else ""
        parts.append(f'<h2 id="skipped">Images that could not be read ({len(skipped)})</h2><ul>{items}</ul>{more}')
    return "".join(parts)


def _settings(comparison: Comparison) -> str:
    info = comparison.info
    data, machine, settings = info["data"], info["machine"], info["settings"]
    rows = {
        "data": f"{data['name']}, {data['train']} + {data['test']} images, classes: {', '.join(data['classes'])}",
        "network": f"{settings['patch']} pixels between tokens, blocks at each resolution {settings['depth']}, "
        f"{settings['dim']} channels and {settings['num_heads']} heads at first, doubled at each next resolution",
        "training": f"AdamW, peak learning rate {settings['lr']:g}, weight decay {settings['weight_decay']:g}, batches of "
        f"{settings['batch_size']}, {settings['epochs']} epochs, warm-up over {100 * settings['warmup']:g} % of steps, then cosine to 0, "
        f"gradients clipped at norm {settings['clip']:g}, label smoothing {settings['label_smoothing']:g}",
        "seeds": ", ".join(map(str, range(settings["seeds"]))),
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}",
        "software": f"Python {machine['python']}, torch {machine['torch']}",
        "workers": f"{settings['workers']} processes of one thread while training, one while measuring",
        "date": f"{info['date']}, {info['seconds']:.0f} seconds, {info['reused']} runs taken over from before",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return f'<h2 id="settings">What was run</h2><dl>{items}</dl>'
