"""``regard compare`` on the command line."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from regard.view.comparison import Comparison
    from regard.view.text_comparison import TextComparison


class Task(StrEnum):
    """What the layers are trained for."""

    images = "images"
    text = "text"


def compare_command(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits (default), small-digits, or a folder of images with one sub-folder a class; "
            "for text: english (default) or a text file"
        ),
    ] = None,
    task: Annotated[Task, typer.Option(help="images: classify them; text: predict and recall")] = Task.images,
    layers: Annotated[
        str | None, typer.Option(help="names with commas between; also module:Class; default: about a dozen")
    ] = None,
    seeds: Annotated[int, typer.Option(help="runs of each layer")] = 2,
    epochs: Annotated[int | None, typer.Option(help="passes over the data; default: by the size of the data")] = None,
    size: Annotated[int, typer.Option(help="side in pixels to which images of a folder are brought")] = 64,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="run on a Ray cluster: auto, local, or host:port")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the table, compare.json and report.html")] = Path("compare"),
    resume: Annotated[bool, typer.Option("--resume", help="go on in --out; finished runs are not repeated")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the table as JSON and nothing else")] = False,
) -> None:
    """Train layers in one identical network on your data and measure them: which attention should I use?"""
    import json

    from rich.console import Console

    from regard.view.compare import compare
    from regard.view.text import compare_text

    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    names = None if layers is None else [name.strip() for name in layers.split(",") if name.strip()]
    same: dict[str, Any] = {"seeds": seeds, "workers": workers, "ray": ray, "out": out, "resume": resume}
    same["progress"] = not as_json
    if epochs is not None:
        same["epochs"] = epochs
    found: Comparison | TextComparison
    try:
        if task is Task.text:
            found = compare_text(names, data or "english", **same)
        else:
            found = compare(names, data or "digits", size=size, **same)
    except KeyboardInterrupt as stop:
        errors.print(f"Interrupted: {stop}: add --resume" if str(stop) else "Interrupted.")
        raise typer.Exit(130) from None
    except (ValueError, ModuleNotFoundError) as error:
        errors.print(f"regard: {error}")
        raise typer.Exit(2) from None
    except OSError as error:
        errors.print(f"regard: {error}")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(
            json.dumps(
                {"report": str(out / "report.html"), "advice": found.advice(), "rows": found.summary()}, indent=1
            )
        )
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 120
        console.print(found)
        for failure in found.failures:
            errors.print(f"Failed: {failure['layer']} seed {failure['seed']}: {failure['reason']}")
        for row in found.rows:
            if row.status == "not applicable":
                errors.print(f"Not applicable: {row.layer}: {row.reason}")
        if skipped := found.info["data"].get("skipped"):
            errors.print(f"Skipped: {len(skipped)} images that could not be read, first {skipped[0][0]}")
        console.print(f"report: {out / 'report.html'}")
    if not found.ranked():
        raise typer.Exit(1)
