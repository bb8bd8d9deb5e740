"""A comparison from end to end: what it writes, what it reuses, what it refuses, and what survives an interruption."""

import csv
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from regard.catalog import registry
from regard.models import slot
from regard.train.loop import Recipe
from regard.train.pool import Call, Event, run_here
from regard.train.run import Run, train
from regard.view import compare as module
from regard.view import runs
from regard.view.command import compare_command
from regard.view.compare import LAYERS, compare
from regard.view.comparison import Comparison

SMALL: dict[str, Any] = {
    **{"seeds": 2, "epochs": 1, "dim": 8, "depth": (1,), "patch": 2},
    **{"sides": (14, 15, 16), "workers": 1, "progress": False},
}
app = Typer()
app.command()(compare_command)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls a worker here fails the test."""

    def refuse(calls: Sequence[Call], workers: int) -> Iterator[Event]:
        assert not calls, f"{[c.key for c in calls]} were to be run"
        yield from ()

    monkeypatch.setattr(runs, "run_calls", refuse)


def folder(root: Path, classes: int = 2, images: int = 3) -> Path:
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (12, 10), (90 * c, 20 * i, 60)).save(root / f"class{c}" / f"{i}.png")
    return root


def test_rows_and_files(comparison: Comparison, out: Path) -> None:
    assert {row.layer for row in comparison.rows} == {"attention", "convolution"}
    for row in comparison.rows:
        assert row.status == "done"
        assert [run["seed"] for run in row.runs] == [0, 1]
        assert all(0.05 < accuracy <= 1 for accuracy in row.accuracies)
        assert row.accuracies == pytest.approx([run["correct"].count("1") / len(run["correct"]) for run in row.runs])
        assert row.cost is not None
        assert row.cost.step.median > 0
        assert row.scaling is not None
        assert row.scaling.tokens == [196, 225, 256]
        assert row.scaling.time_fit is not None
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.json",
        "data.safetensors",
        "report.html",
        "runs",
        "table.csv",
    ]
    assert len(list((out / "runs").glob("*-[01]-*.json"))) == 4
    assert not list(out.rglob("*part*"))


def test_table_says_what_the_rows_say(comparison: Comparison, out: Path) -> None:
    with open(out / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [record["layer"] for record in table] == [row.layer for row in comparison.ranked()]
    for record, row in zip(table, comparison.ranked()):
        assert float(record["accuracy"]) == row.accuracy
        assert [float(value) for value in record["accuracies"].split()] == row.accuracies
    assert float(table[0]["behind"]) == 0 <= float(table[1]["behind"])


def test_loaded_again(comparison: Comparison, out: Path) -> None:
    again = Comparison.load(out)
    assert json.dumps(asdict(again)) == json.dumps(asdict(comparison))
    assert again.advice() == comparison.advice()
    assert again.front() == comparison.front()


def test_the_same_seed_gives_the_same_run_here_and_in_a_worker(
    comparison: Comparison, out: Path, tmp_path: Path
) -> None:
    (done,) = (run for row in comparison.rows for run in row.runs if (row.layer, run["seed"]) == ("attention", 1))
    run = Run.read({key: done[key] for key in asdict(Run("", 0, "", ""))})
    again = train(lambda _: None, run=asdict(run), data=str(out / "data.safetensors"), folder=str(tmp_path))
    for key in ("loss", "accuracy", "test_loss", "correct"):
        assert again[key] == done[key]


def test_resume_reuses_everything(comparison: Comparison, out: Path, tmp_path: Path, no_work: None) -> None:
    shutil.copytree(out, tmp_path / "out")
    again = compare(["attention", "convolution"], "small-digits", out=tmp_path / "out", resume=True, **SMALL)
    assert again.info["reused"] == 4
    assert (tmp_path / "out" / "table.csv").read_bytes() == (out / "table.csv").read_bytes()


def test_interrupted_and_resumed(
    comparison: Comparison, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(calls: Sequence[Call], workers: int) -> Iterator[Event]:
        for event in run_here(calls):
            yield event
            if event.kind == "done":
                raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_calls", interrupted)
    with pytest.raises(KeyboardInterrupt, match="1 of 4 runs are finished and kept in"):
        compare(["attention", "convolution"], "small-digits", out=tmp_path, **SMALL)
    (kept,) = (tmp_path / "runs").glob("*.json")
    assert not (tmp_path / "table.csv").exists()
    (cost,) = (out / "runs").glob("cost-*.json")
    shutil.copy(cost, tmp_path / "runs")

    ran: list[str] = []

    def watched(calls: Sequence[Call], workers: int) -> Iterator[Event]:
        ran.extend(c.key for c in calls)
        yield from run_here(calls)

    monkeypatch.setattr(runs, "run_calls", watched)
    resumed = compare(["attention", "convolution"], "small-digits", out=tmp_path, resume=True, **SMALL)
    assert len(ran) == 3
    assert kept.stem not in ran
    assert (tmp_path / "table.csv").read_bytes() == (out / "table.csv").read_bytes()
    assert [row.accuracies for row in resumed.rows] == [row.accuracies for row in comparison.rows]


def test_any_other_setting_is_another_run() -> None:
    run = Run("attention", 0, "data", "code")
    others = [
        replace(run, **change)
        for change in (
            {"layer": "hilo"},
            {"seed": 1},
            {"data": "other"},
            {"source": "edited"},
            {"dim": 64},
            {"num_heads": 4},
            {"depth": (2, 2)},
            {"patch": 2},
            {"recipe": Recipe(lr=1e-3)},
        )
    ]
    assert len({run.key, *(other.key for other in others)}) == 1 + len(others)
    assert Run.read(json.loads(json.dumps(asdict(run)))).key == run.key


def test_layers_that_cannot_or_fail_are_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.py").write_text(
        "import os, torch\n"
        "class Refuses(torch.nn.Module):\n"
        "    def __init__(self, dim, num_heads): super().__init__(); raise ValueError('not today')\n"
        "class Dies(torch.nn.Linear):\n"
        "    def __init__(self, dim): super().__init__(dim, dim)\n"
        "    def forward(self, x):\n"
        "        if len(x) > 2: os._exit(7)\n"
        "        return super().forward(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = str(folder(tmp_path / "data"))
    found = compare(
        ["identity", "odd:Refuses", "odd:Dies"], data, out=tmp_path / "out", size=8, **{**SMALL, "seeds": 1}
    )
    rows = {row.layer: row for row in found.rows}
    assert rows["identity"].status == "done"
    assert (rows["odd:Refuses"].status, rows["odd:Refuses"].reason) == ("not applicable", "ValueError: not today")
    assert rows["odd:Dies"].status == "failed"
    assert "ended with code 7" in rows["odd:Dies"].reason
    report = (tmp_path / "out" / "report.html").read_text()
    assert "not today" in report
    assert "ended with code 7" in report
    assert [record["status"] for record in found.summary()] == ["done", "not applicable", "failed"]


def test_broken_images_are_counted_and_named(tmp_path: Path, comparison: Comparison, no_work: None) -> None:
    (folder(tmp_path / "data") / "class1" / "torn.png").write_bytes(b"\x89PNG torn")
    title, train_images, test_images, skipped = module._open(tmp_path / "data", 8)
    assert title == "data"
    assert len(train_images) + len(test_images) == 6
    assert [name for name, _ in skipped] == ["class1/torn.png"]
    told = replace(comparison, info={**comparison.info, "data": {**comparison.info["data"], "skipped": skipped}})
    told.save(tmp_path)
    report = (tmp_path / "report.html").read_text()
    assert "could not be read (1)" in report
    assert "class1/torn.png" in report


def test_a_full_disk_leaves_the_old_files(
    comparison: Comparison, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out, tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    options = ("--data", "small-digits", "--layers", "attention", "--out", str(tmp_path / "out"), "--resume")
    result = call(*options)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "is left as it was" in result.stderr
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_command_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(calls: Sequence[Call], workers: int) -> Iterator[Event]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(runs, "run_calls", interrupted)
    result = call("--data", "small-digits", "--layers", "identity", "--epochs", "1", "--out", str(tmp_path), "--json")
    assert result.exit_code == 130
    assert "0 of 2 runs are finished" in result.stderr
    assert "--resume" in result.stderr


def test_command_prints_json_and_nothing_else(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare", lambda *_, **__: comparison)
    result = call("--json")
    assert result.exit_code == 0
    assert [row["layer"] for row in json.loads(result.stdout)["rows"]] == [row.layer for row in comparison.ranked()]


def test_command_prints_a_table(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare", lambda *_, **__: comparison)
    result = call()
    assert result.exit_code == 0
    for row in comparison.rows:
        assert row.layer in result.stdout
    assert "report.html" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "atention,convolution"), r"'atention' is not known; nearest: .*attention"),
        (("--layers", ","), "layers is empty"),
        (("--data", "nowhere"), "'nowhere' is not a folder"),
        (("--data", "empty"), "holds no images"),
        (("--data", "one"), "holds one class"),
        (("--data", "single"), r"too few in class0 \(1\), class1 \(1\)"),
        (("--seeds", "0"), "seeds=0"),
        (("--epochs", "0"), "epochs=0"),
    ],
)
def test_command_refuses(
    options: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_work: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    folder(Path("one"), classes=1)
    folder(Path("single"), images=1)
    result = call("--layers", "identity", "--data", "small-digits", *options)
    assert result.exit_code == 2
    assert re.search(said, " ".join(result.stderr.split()))
    assert not Path("compare").exists()


def test_a_class_in_the_script_itself_is_refused(tmp_path: Path) -> None:
    mine = type("Mine", (), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="put it into a module"):
        compare([mine], "small-digits", out=tmp_path)


def test_the_default_layers_exist() -> None:
    for name in LAYERS:
        assert name in slot.BASELINES or registry.get(name).kind == "layer"
