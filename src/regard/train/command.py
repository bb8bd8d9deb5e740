"""``regard train`` on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def train_command(
    recipe: Annotated[str | None, typer.Argument(help="What to train; without it, the recipes are listed.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Again for more.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the weights and their card.")] = Path("weights"),
    name: Annotated[str | None, typer.Option(help="Of the model; default the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    devices: Annotated[int, typer.Option(help="Processes on this machine, started by torchrun.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines, with torchrun on each.")] = 1,
    logs: Annotated[Path | None, typer.Option(help="Folder for a CSV of the figures.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
) -> None:
    """Train one of the small models, and keep its weights with a card that says how it was made."""
    from rich.console import Console
    from rich.progress import Progress

    from regard.train.recipes import names

    if recipe is None:
        typer.echo("\n".join(names()))
        return
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    # torchrun numbers its processes; the first speaks for all.
    follows = devices * nodes > 1 and int(os.environ.get("RANK", 0)) > 0
    from regard.train.pretrained import card, train

    try:
        chosen = dict(_pair(text) for text in settings or [])
        with Progress(console=Console(stderr=True), disable=follows) as progress:
            bar = progress.add_task(recipe, total=None)

            def report(facts: dict[str, Any]) -> None:
                figures = ", ".join(f"{k} {v:.4g}" for k, v in facts.items() if k not in ("epoch", "epochs"))
                progress.update(
                    bar, completed=facts["epoch"], total=facts["epochs"], description=f"{recipe}: {figures}"
                )

            path = train(
                recipe,
                chosen,
                out=out,
                name=name,
                resume=resume,
                device=device,
                devices=devices,
                nodes=nodes,
                logger=_loggers(logs, tensorboard),
                report=report,
            )
    except KeyboardInterrupt:
        errors.print(f"Interrupted: the epochs that were finished are kept in {out}; go on with --resume")
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        errors.print(
            f"regard: {recipe} needs a package that is not installed ({error.name}): pip install 'regard[all]'"
        )
        raise typer.Exit(2) from None
    except ValueError as error:
        errors.print(f"regard: {error}")
        raise typer.Exit(2) from None
    if follows:
        return
    figures = card(path.stem, out)["figures"]
    typer.echo(f"{path}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not KEY=VALUE")
    return key.strip(), value.strip()


def _loggers(logs: Path | None, tensorboard: Path | None) -> list[Any]:
    found: list[Any] = []
    if logs is not None:
        from lightning_fabric.loggers import CSVLogger

        found.append(CSVLogger(str(logs), name="", flush_logs_every_n_steps=1))
    if tensorboard is not None:
        from lightning_fabric.loggers import TensorBoardLogger

        found.append(TensorBoardLogger(str(tensorboard), name=""))
    return found
