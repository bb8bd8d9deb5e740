"""The report: one file, offline, complete, escaped, and no wider than the screen."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from regard.view.comparison import Comparison, Row
from regard.view.report import html

VOID = {"meta", "img", "br", "link", "input", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Every tag closed in order, every address and text collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                self.addresses.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_needs_no_network(comparison: Comparison) -> None:
    text = html(comparison)
    bare = re.sub(r"data:image/png;base64,[\w+/=]+", "data:", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest", bare)
    page = Page(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(text) < 1_500_000


def test_holds_every_layer_and_what_was_run(comparison: Comparison) -> None:
    words = " ".join(Page(html(comparison)).words)
    for row in comparison.rows:
        assert words.count(row.layer) >= 3
    for fact in ("small-digits", "Which attention should I use?", "peak learning rate 0.003", "torch 2.", "seeds"):
        assert fact in words
    assert comparison.advice() in "".join(Page(html(comparison)).words)


def test_names_are_escaped(comparison: Comparison) -> None:
    evil = Row("<img src=x onerror=alert(1)>", "own", "failed", "</script><b>&")
    info = {
        **comparison.info,
        "data": {**comparison.info["data"], "name": "<i>data</i>", "skipped": [["<a>.png", "<bad>"]]},
    }
    failure = {"layer": "<u>", "seed": "0", "reason": "<s>", "traceback": "<pre>"}
    told = replace(comparison, info=info, rows=[*comparison.rows, evil], failures=[failure])
    text = html(told)
    Page(text)
    for raw in ("<img src=x", "<i>data", "<a>.png", "<bad>", "<u>", "<s>", "</script><b>"):
        assert raw not in text


def test_without_a_single_result(comparison: Comparison) -> None:
    rows = [Row("attention", "baseline", "failed", "power cut")]
    words = " ".join(Page(html(replace(comparison, rows=rows, maps=[]))).words)
    assert "No layer finished a run." in words
    assert "power cut" in words


def test_with_one_seed_one_layer_and_perfect_accuracy(comparison: Comparison) -> None:
    row = comparison.rows[0]
    run = {**row.runs[0], "accuracy": [1.0], "correct": "1" * len(row.runs[0]["correct"])}
    words = " ".join(Page(html(replace(comparison, rows=[replace(row, runs=[run])]))).words)
    assert "100.0" in words
    assert "nan" not in words


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [1366, 390])
def test_no_wider_than_the_screen(comparison: Comparison, tmp_path: Path, width: int) -> None:
    measure = (
        "<script>const room = document.documentElement.clientWidth;"
        "const wide = [...document.querySelectorAll('main *')].filter("
        "e => !e.closest('.scroll, pre') && e.getBoundingClientRect().right > room + 1);"
        "document.title = JSON.stringify([document.documentElement.scrollWidth - room,"
        " wide.map(e => e.tagName + ' ' + e.textContent.slice(0, 40))]);</script>"
    )
    page = tmp_path / "report.html"
    page.write_text(html(comparison).replace("</body>", measure + "</body>"))
    # Chromium's own window is never narrower than 500 pixels: a frame is.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" style="border:0" width="{width}" height="900"></iframe><script>'
        "addEventListener('load', () => document.title = frames[0].document.title)</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1] == "[0,[]]"
