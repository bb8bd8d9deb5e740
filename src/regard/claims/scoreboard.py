"""Claims while they run, and what became of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from regard.claims.claim import ClaimResult
from regard.train.pool import Event

if TYPE_CHECKING:
    from rich.console import Console


class Scoreboard:
    """The outcome of each of the claims ``slugs``, filled as events come in: ``results``, and ``failures`` with the reason."""

    def __init__(self, slugs: Sequence[str]) -> None:
        self.slugs = list(slugs)
        self.results: dict[str, ClaimResult] = {}
        self.failures: dict[str, str] = {}

    @property
    def met(self) -> bool:
        """Every claim was run and met."""
        return all(slug in self.results and self.results[slug].passed for slug in self.slugs)

    def follow(self, events: Generator[Event, None, None], console: Console) -> None:
        """Take in all ``events``; show what runs, each result as it comes and, of several claims, the table in the end.

        Leaving early, as Ctrl-C does, stops the events and shows the table of what is done.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
        running: dict[str, str] = {}
        try:
            with Progress(*columns, console=console, transient=True) as bar, closing(events):
                task = bar.add_task("", total=len(self.slugs))
                for event in events:
                    self._take(event, running, console)
                    done = len(self.results) + len(self.failures)
                    bar.update(task, completed=done, description=", ".join(running.values()))
        finally:
            if len(self.slugs) != 1:
                console.print(self)

    def _take(self, event: Event, running: dict[str, str], console: Console) -> None:
        if event.kind == "started":
            again = event.facts["attempt"] > 1
            running[event.key] = event.key + (" (again)" if again else "")
            if again:
                console.print(f"{event.key}: its worker was lost; started again", highlight=False)
        elif event.last:
            running.pop(event.key, None)
            if event.kind == "done":
                self.results[event.key] = event.facts["result"]
                console.print(event.facts["result"])
            else:
                self.failures[event.key] = event.facts["reason"]
                console.print(f"{event.key}: failed: {event.facts['reason']}", markup=False, highlight=False)
                console.print(event.facts["traceback"], end="", markup=False, highlight=False)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table

        table = Table("claim", "", "bars met", "seeds", "seconds", title=str(self), title_justify="left")
        for slug in sorted(self.failures):
            table.add_row(slug, "failed")
        for slug, result in sorted(self.results.items(), key=lambda item: (item[1].passed, item[0])):
            barred = [row.passed for row in result.rows if row.passed is not None]
            state = "met" if result.passed else "NOT met"
            table.add_row(slug, state, f"{sum(barred)} of {len(barred)}", str(result.seeds), f"{result.seconds:.0f}")
        yield table

    def __str__(self) -> str:
        met = sum(result.passed for result in self.results.values())
        counts = {"met": met, "NOT met": len(self.results) - met, "failed": len(self.failures)}
        counts["not run"] = len(self.slugs) - sum(counts.values())
        said = ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "met")
        return f"{len(self.slugs)} claims: {said}"

    def to_json(self) -> list[dict[str, Any]]:
        """In the order in which they came; of one that failed the slug and the reason."""
        failed = [{"slug": slug, "failed": reason} for slug, reason in self.failures.items()]
        return [result.to_json() for result in self.results.values()] + failed
