"""What a comparison shows while it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bars(AbstractContextManager["Bars"]):
    """Progress on the terminal: one bar for all training, one for measuring."""

    def __init__(self, show: bool, epochs: int) -> None:
        columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not show)
        self.training = self.progress.add_task("training", total=epochs)
        self.measuring = self.progress.add_task("measuring", total=None, start=False)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def trained(self, epochs: int, text: str = "training") -> None:
        self.progress.update(self.training, advance=epochs, description=text)

    def measured(self, facts: dict[str, int]) -> None:
        self.progress.update(self.measuring, completed=facts["done"], total=facts["of"])

    def measure(self) -> None:
        self.progress.update(self.training, description="training")
        self.progress.start_task(self.measuring)
