"""What is compared, as files: a table, all facts, and a page that opens offline."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regard.train.files import write_whole


@dataclass
class Saved(ABC):
    """A comparison; ``info`` says what was run, on what, and in ``out`` where."""

    info: dict[str, Any]

    @abstractmethod
    def summary(self) -> list[dict[str, Any]]:
        """One record a layer."""

    @abstractmethod
    def page(self) -> str:
        """HTML."""

    def save(self, out: str | Path | None = None) -> Path:
        """Write ``table.csv``, ``compare.json`` and ``report.html`` into ``out``; returns the report's path.

        Args:
            out: a folder; default the one it was run in.

        Raises:
            OSError: a file could not be written; what was there before is still whole.
        """
        folder = Path(self.info["out"] if out is None else out)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "table.csv", self.csv())
        write_whole(folder / "compare.json", json.dumps(asdict(self), indent=1, allow_nan=False))
        write_whole(folder / "report.html", self.page())
        return folder / "report.html"

    def csv(self) -> str:
        """The records as a table; the figures of single seeds stand in one cell."""
        text = io.StringIO()
        records = [
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in record.items()}
            for record in self.summary()
        ]
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()
