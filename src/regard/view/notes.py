"""The words of a comparison's report: how to read it, what failed, what was run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from regard.view.comparison import Comparison

ASSETS = Path(__file__).parent / "assets"


def reading(comparison: Comparison) -> str:
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
    words = Template((ASSETS / "reading.html").read_text())
    return words.substitute(
        close=escape(close), tests=data["test"], seeds=seeds, epochs=settings["epochs"], missed=escape(names)
    )


def failed(failures: Sequence[Mapping[str, str]]) -> str:
    """The runs that failed, with their tracebacks folded away; nothing if there are none."""
    items = "".join(
        f"<li><b>{escape(f['layer'])}</b>, seed {escape(f['seed'])}: {escape(f['reason'])}"
        f"<details><summary>traceback</summary><pre>{escape(f['traceback'])}</pre></details></li>"
        for f in failures
    )
    return f'<h2 id="failures">Runs that failed</h2><ul>{items}</ul>' if items else ""


def failures(comparison: Comparison) -> str:
    skipped = comparison.info["data"]["skipped"]
    parts = [failed(comparison.failures)]
    if skipped:
        items = "".join(f"<li>{escape(path)}: {escape(reason)}</li>" for path, reason in skipped[:50])
        more = f"<p>and {len(skipped) - 50} more</p>" if len(skipped) > 50 else ""
        parts.append(f'<h2 id="skipped">Images that could not be read ({len(skipped)})</h2><ul>{items}</ul>{more}')
    return "".join(parts)


def settings(comparison: Comparison) -> str:
    info = comparison.info
    data, machine, settings = info["data"], info["machine"], info["settings"]
    rows = {
        "data": f"{data['name']}, {data['train']} + {data['test']} images, classes: {', '.join(data['classes'])}",
        "network": f"{settings['patch']} pixels between tokens, blocks at each resolution {settings['depth']}, "
        f"{settings['dim']} channels and {settings['num_heads']} heads at first, doubled at each next resolution",
        "training": f"AdamW, peak learning rate {settings['lr']:g}, weight decay {settings['weight_decay']:g}, batches of "
        f"{settings['batch_size']}, {settings['epochs']} epochs, warm-up over {100 * settings['warmup']:g} % of steps, "
        "then cosine to 0, "
        f"gradients clipped at norm {settings['clip']:g}, label smoothing {settings['label_smoothing']:g}",
        "seeds": ", ".join(map(str, range(settings["seeds"]))),
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}",
        "software": f"Python {machine['python']}, torch {machine['torch']}",
        "workers": f"{settings['workers']} processes of one thread while training, one while measuring",
        "date": f"{info['date']}, {info['seconds']:.0f} seconds, {info['reused']} runs taken over from before",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return f'<h2 id="settings">What was run</h2><dl>{items}</dl>'
