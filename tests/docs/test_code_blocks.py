"""Every Python block of the README and the guides runs, page by page, in one namespace."""

import re
from pathlib import Path

import pytest

from regard.train.pool import run_here
from regard.view import runs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run_calls", lambda calls, workers: run_here(calls))
    namespace: dict[str, object] = {"__name__": f"guide_{page.stem}"}
    blocks = BLOCK.findall(page.read_text())
    assert blocks or page.stem == "index", f"{page.name} has no code"
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_every_fence_is_one_that_is_run_or_shown() -> None:
    for page in PAGES:
        languages = set(re.findall(r"^```(\S+)", page.read_text(), re.M))
        assert languages <= {"python", "console"}, f"{page.name}: {languages}"
