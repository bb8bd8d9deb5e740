"""The command line: one command for each verb."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.train.command import train_command
from regard.view.command import compare_command

if TYPE_CHECKING:
    from regard.catalog.papers import Paper

app = typer.Typer(help="One PyTorch toolkit for attention.", no_args_is_help=True, add_completion=False)

app.command("compare")(compare_command)
app.command("train")(train_command)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.callback()
def _regard() -> None:
    """One PyTorch toolkit for attention."""


@contextmanager
def _bad_input() -> Iterator[None]:
    """A ValueError is what the user typed: one line on stderr and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"regard: {error}", err=True)
        raise typer.Exit(2) from None


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _read_facets(pairs: list[str]) -> dict[str, list[Any]]:
    """``["axis=token", "causal_ok=true"]`` as filters; the same name twice means either value."""
    facets: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--facet {pair!r} must be name=value, for example distribution=relu")
        facets.setdefault(name, []).append({"true": True, "false": False}.get(value, value))
    return facets


@app.command()
def papers(
    text: Annotated[str | None, typer.Argument(help="Part of a title or slug.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="layer, model, explainer, ...; again for either.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help="vision, diffusion, vlm, ...; again for either.")] = None,
    year: Annotated[list[int] | None, typer.Option(help="Again for either.")] = None,
    facet: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Such as distribution=relu.")] = None,
    built: Annotated[bool | None, typer.Option("--built/--not-built", help="With code here, or without.")] = None,
    as_json: Json = False,
) -> None:
    """List the catalogue. In a pipe: slug, year, kind, domain, built or empty, title; one line each, split by tabs."""
    import sys

    from regard.catalog import papers as catalogue

    given = {"kind": kind, "domain": domain, "year": year}
    with _bad_input():
        filters = {name: value for name, value in given.items() if value} | _read_facets(facet or [])
        found = catalogue.papers(text, built=built, **filters)
    if as_json:
        _print_json([paper.as_dict() for paper in found])
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(found.table())
    else:
        for p in found:
            typer.echo(f"{p.slug}\t{p.year}\t{p.kind}\t{p.domain}\t{'built' if p.built else ''}\t{p.title}")


def _describe(paper: Paper, nearest: list[Paper]) -> Iterator[str]:
    from dataclasses import asdict

    yield f"{paper.slug}: {paper.title}"
    facts = {
        "authors": ", ".join(paper.authors),
        "year": str(paper.year),
        "arXiv": paper.arxiv,
        "kind": paper.kind,
        "domain": paper.domain,
        "official code": paper.official,
        "builds on": ", ".join(paper.depends_on),
        "code": paper.module or "not built yet",
    }
    for name, value in facts.items():
        if value:
            yield f"  {name:<16} {value}"
    yield "facets"
    for name, value in asdict(paper.facets).items():
        shown = ", ".join(value) if isinstance(value, tuple) else {True: "yes", False: "no"}.get(value, value)
        if shown:
            yield f"  {name:<16} {shown}"
    yield "nearest by facets"
    width = max(len(other.slug) for other in nearest)
    for other in nearest:
        yield f"  {other.slug:<{width}} {other.title}"


@app.command()
def show(slug: str, as_json: Json = False) -> None:
    """Show one paper: bibliography, code, facets, and the papers that do most alike."""
    from regard.catalog.papers import get, neighbours

    with _bad_input():
        paper = get(slug)
    nearest = neighbours(paper.slug)
    if as_json:
        _print_json({**paper.as_dict(), "neighbours": [other.slug for other in nearest]})
    else:
        typer.echo("\n".join(_describe(paper, nearest)))


@app.command()
def cite(slugs: Annotated[list[str], typer.Argument(metavar="SLUG...")]) -> None:
    """Print BibTeX entries."""
    from regard.catalog.cite import bibtex
    from regard.catalog.papers import get

    with _bad_input():
        found = [get(slug) for slug in slugs]
    typer.echo("\n\n".join(map(bibtex, found)))


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="timm name, torchvision:NAME, or transformers:FOLDER.")],
    where: Annotated[str, typer.Option(help="Names with *, or self, cross, joint, pool, channel.")] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Fetch the library's weights; default random.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List every attention site of a model, verified or refused with the reason."""
    from dataclasses import asdict

    from rich.console import Console

    from regard.core.site import Sites
    from regard.core.site import sites as find
    from regard.hosts.open import open_model

    with _bad_input():
        opened = open_model(model, pretrained=pretrained)
        found = find(opened.model, run=lambda: opened.model(**opened.inputs))
        if where != "*":
            try:
                picked = found[where]
            except KeyError as error:
                raise ValueError(error.args[0]) from None
            found = picked if isinstance(picked, Sites) else Sites([picked])
    if as_json:
        _print_json([{**asdict(s), "tokens_q": str(s.tokens_q), "tokens_k": str(s.tokens_k)} for s in found])
    else:
        Console().print(found)


@app.command()
def explain(
    image: Annotated[str, typer.Argument(help="An image file.")],
    model: Annotated[
        str, typer.Option(help="timm name, torchvision:NAME, or transformers:FOLDER.")
    ] = "vit_tiny_patch16_224",
    method: Annotated[str, typer.Option(help="An explainer.")] = "generic-attribution",
    target: Annotated[int | None, typer.Option(help="Class to explain; default the predicted one.")] = None,
    weights: Annotated[str | None, typer.Option(help="A safetensors file with the model's state.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Fetch the library's weights; default random.")
    ] = False,
    out: Annotated[str, typer.Option(help="The picture to write.")] = "map.png",
) -> None:
    """Explain what in an image a prediction rests on, as a picture."""
    from regard.core.explain import explain as run
    from regard.hosts.open import open_model

    with _bad_input():
        opened = open_model(model, pretrained=pretrained, weights=weights)
        if weights is None and not pretrained:
            typer.echo("regard: the model has random weights: the map shows how it works, not what it knows", err=True)
        found = run(opened.model, opened.image(image), method, target=target)
        path = found.save(out)
    typer.echo(path)


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="Registry name.")],
    only: Annotated[list[str] | None, typer.Option(help="Run this check; again for more.")] = None,
) -> None:
    """Run the conformance checks of a method; exit code 1 when one fails."""
    from rich.console import Console

    from regard.checks.run import check as run

    with _bad_input():
        report = run(method, only=only)
    Console().print(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG...]")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every claim that is stale or was never run.")] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Every claim whose code has changed since it was run.")
    ] = False,
    kind: Annotated[list[str] | None, typer.Option(help="Only layer, model, ...; alone: all of them.")] = None,
    budget: Annotated[str, typer.Option(help="smoke, cpu or gpu.")] = "cpu",
    seeds: Annotated[int | None, typer.Option(help="Default the claim's own.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Claims at a time, in processes of one thread.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: auto, local, or host:port.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the results.")] = "results",
    draw: Annotated[bool, typer.Option("--plot", help="Draw the papers' studies into --out instead.")] = False,
    as_json: Json = False,
) -> None:
    """Re-run the central claim of papers and store what came out; exit code 1 when one is not met."""
    from rich.console import Console

    if draw:
        from regard.claims.plot import plot

        with _bad_input():
            for slug in slugs or []:
                path, said = plot(slug, out)
                typer.echo(f"{path}: {said}")
        return

    from regard.claims.reproduce import choose, claims, reproduce_many
    from regard.claims.scoreboard import Scoreboard

    with _bad_input():
        if not (slugs or every or stale or kind):
            raise ValueError(f"name a claim, or --all, --stale or --kind; there are {', '.join(claims())}")
        board = Scoreboard(choose(slugs or [], every=every, stale=stale, kinds=kind or [], out=out))
        events = reproduce_many(board.slugs, budget=budget, seeds=seeds, out=out, jobs=jobs, ray=ray)  # type: ignore[arg-type]
        try:
            board.follow(events, Console(stderr=as_json))
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from None
        except KeyboardInterrupt:
            typer.echo(f"regard: interrupted; {len(board.results)} of {len(board.slugs)} claims are done", err=True)
            raise typer.Exit(130) from None
    if as_json:
        _print_json(board.to_json())
    if not board.met:
        raise typer.Exit(1)


@app.command()
def bench(
    subject: Annotated[str, typer.Argument(help="A layer, or 'capture': what reading costs.")],
    against: Annotated[str | None, typer.Option(help="Part of one peer's name; default all peers.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="BATCH,TOKENS,DIM,HEADS", help="In place of the usual; again for more.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, at least.")] = 9,
    threads: Annotated[int | None, typer.Option(help="torch's threads; default as it finds them.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compiled", help="The layer and its peers under torch.compile.")] = False,
    out: Annotated[str | None, typer.Option(help="Folder for the CSV; default: print only.")] = None,
) -> None:
    """Time a layer beside what you would use instead, as ratios; no number while a check fails."""
    import torch
    from rich.console import Console

    from regard.bench.run import bench as run
    from regard.bench.run import shape_of

    if threads is not None:
        torch.set_num_threads(threads)
    with _bad_input():
        shapes = [shape_of(text) for text in shape] if shape else None
        found = run(subject, against, shapes=shapes, rounds=rounds, device=device, compiled=compiled)
        console = Console()
        if not console.is_terminal:
            console.width = 160
        console.print(found)
        if out is not None:
            typer.echo(found.save(out))
