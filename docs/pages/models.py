"""The page of the small trained models: their cards."""

from __future__ import annotations

from regard.train.pretrained import card, trained


def page() -> str:
    lines = [
        "# Trained models",
        "",
        "Small models that come with the package, so that methods for trained models can be run and measured without a "
        "download. Each was made by the command on its card; the figures are of the weights as they are kept, on data that "
        "was not learned from.",
        "",
        "```python",
        "import regard as rg",
        "",
        *(f'model = rg.pretrained("{name}")' for name in trained()[:1]),
        "```",
    ]
    for name in trained():
        facts = card(name)
        lines += [
            *("", f"## {name}", "", facts["about"], ""),
            *("| | |", "| --- | --- |"),
            f"| parameters | {facts['parameters']:,} |",
            *(f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in facts["figures"].items()),
            f"| trained in | {facts['seconds'] / 60:.0f} min on {facts['machine']}, torch {facts['torch']}, {facts['date']} |",
            *("", f"```console\n$ {facts['command']}\n```"),
        ]
    return "\n".join(lines)
