"""The built documentation: a page for every method, and nothing that is fetched.

``REGARD_SITE`` names the folder of one just built; otherwise it is built here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regard.catalog.papers import papers

ROOT = Path(__file__).resolve().parents[2]
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"https?://[^\"]+\"[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    if built := os.environ.get("REGARD_SITE"):
        return Path(built)
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "REGARD_TYPECHECK": "0"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_built_paper_has_a_page(site: Path) -> None:
    for paper in papers(built=True):
        page = site / "methods" / f"{paper.slug}.html"
        assert page.exists(), paper.slug
        assert paper.slug in page.read_text()


def test_nothing_is_fetched(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = [tag for tag in FETCHED.findall(page.read_text()) if 'rel="canonical"' not in tag]
        assert not found, f"{page.relative_to(site)}: {found}"


def test_the_catalogue_lists_every_paper(site: Path) -> None:
    text = (site / "catalogue.html").read_text()
    assert len(re.findall(r"<tr data-kind", text)) == 231
