"""Studies are drawn into a file and summed up in a sentence."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from regard.claims import plot as module
from regard.claims.plot import plot
from regard.cli import app


def test_a_picture_and_a_sentence(tmp_path: Path) -> None:
    path, said = plot("layernorm-expressivity", tmp_path / "out", scale="toy")
    assert path == tmp_path / "out" / "layernorm-expressivity.png"
    assert Image.open(path).getextrema() != ((255, 255),) * 4
    assert said == "Of 64 random keys in 4 dimensions no query selects 48 %; after layer norm 0 %."


def test_a_paper_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slug='rela' has no study to draw; there are attention-rank"):
        plot("rela", tmp_path)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plot", lambda slug, out: (Path(out) / f"{slug}.png", "It shows 1."))
    result = CliRunner().invoke(app, ["reproduce", "attention-rank", "--plot", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.strip().endswith("attention-rank.png: It shows 1.")
