"""A text comparison from end to end: what it trains, writes and reuses, what it refuses."""

import csv
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from regard.models.language.slot import mixer, slot_decoder
from regard.nn import Attention
from regard.train.language import Answer, Predict
from regard.train.loop import Recipe, fit
from regard.train.pool import run_here
from regard.train.text_run import TextRun, split_text
from regard.view import runs
from regard.view import text as module
from regard.view.command import compare_command
from regard.view.text import LAYERS, compare_text
from regard.view.text_comparison import TextComparison, TextRow
from regard.view.text_measure import cache_bytes, decoding_step, filled
from regard.worlds.recall import IGNORE, Recall

SMALL: dict[str, Any] = {
    **{"seeds": 2, "epochs": 2, "steps": 2, "dim": 16, "num_heads": 2, "depth": 1, "context": 16, "batch_size": 4},
    **{"workers": 1, "progress": False},
}
NAMES = ["attention", "multi-query-attention", "dynamic-convolution"]
app = Typer()
app.command()(compare_command)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def comparison(out: Path) -> TextComparison:
    with pytest.MonkeyPatch.context() as here:
        here.setattr(runs, "run_calls", lambda calls, workers: run_here(calls))
        return compare_text(NAMES, out=out, **SMALL)


def test_rows_and_files(comparison: TextComparison, out: Path) -> None:
    assert not comparison.failures
    for row in comparison.rows:
        assert len(row.last("perplexity")) == len(row.last("recall")) == 2
        assert all(1 < p < 400 for p in row.last("perplexity"))
        assert all(0 <= r <= 1 for r in row.last("recall"))
        assert row.rate("training") > 0
        assert row.rate("decoding") > 0
    with open(out / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [record["layer"] for record in table] == [row.layer for row in comparison.ranked()]
    assert asdict(TextComparison.load(out)) == asdict(comparison)
    page = (out / "report.html").read_text()
    for name in NAMES:
        assert name in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_resume_repeats_nothing(comparison: TextComparison, out: Path) -> None:
    again = compare_text(NAMES, out=out, resume=True, **SMALL)
    assert again.info["reused"] == 12
    assert [asdict(row) for row in again.rows] == [asdict(row) for row in comparison.rows]


@pytest.mark.parametrize("name", LAYERS)
def test_every_default_layer_decodes_what_it_reads_at_once(name: str) -> None:
    torch.manual_seed(0)
    model = slot_decoder(name, 128, dim=32, num_heads=4, depth=2, context=24).double().eval()
    tokens = torch.randint(128, (1, 24))
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(1, 24, dtype=torch.float64)
        got = torch.cat([model(part, cache=cache) for part in tokens.split([9, 1, 5, 9], 1)], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_everything_outside_the_slot_starts_alike() -> None:
    states = []
    for name in ("attention", "rela", "dynamic-convolution"):
        torch.manual_seed(3)
        state = slot_decoder(name, 50, dim=16, num_heads=2).state_dict()
        states.append({key: value for key, value in state.items() if ".attn." not in key})
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())


def test_cache_bytes_by_hand() -> None:
    """Two blocks, keys and values of 32 channels in float32; a shared head has a quarter; a convolution does not grow."""
    sizes = {"dim": 32, "num_heads": 4, "depth": 2, "context": 32}
    assert cache_bytes(slot_decoder("attention", 9, **sizes), 32) == 2 * 2 * 32 * 4
    assert cache_bytes(slot_decoder("multi-query-attention", 9, **sizes), 32) == 2 * 2 * 8 * 4
    assert cache_bytes(slot_decoder("dynamic-convolution", 9, **sizes), 32) == 0


def test_a_decoding_step_says_what_the_model_says() -> None:
    torch.manual_seed(0)
    model = slot_decoder("attention", 128, dim=16, num_heads=2, context=12).eval()
    tokens = torch.randint(128, (1, 12))
    cache = filled(model, tokens[:, :-1])
    assert cache is not None
    step = decoding_step(model, cache, tokens[:, -1:])
    for _ in range(3):
        torch.testing.assert_close(step(), model(tokens)[:, -1:], rtol=1e-4, atol=1e-5)


def test_perplexity_of_a_known_model() -> None:
    class Guess(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.scale * torch.zeros(*tokens.shape, 7)

    data = torch.randint(7, (500,))
    task = Predict(data, data[:100], Recipe(batch_size=3), context=10, steps=4)
    assert task.measure(Guess())["perplexity"] == pytest.approx(7)
    assert task.batch(0, 1)[0].shape == (3, 11)
    assert torch.equal(task.batch(1, 2)[0], task.batch(1, 2)[0])
    assert not torch.equal(task.batch(0, 2)[0], task.batch(1, 2)[0])


def test_recall_counts_what_is_asked_of_sequences_not_learned_from() -> None:
    world = Recall(vocab=16, length=16, pairs=4, power=1.0, count=64)
    task = Answer(world, Recipe(batch_size=4), steps=3, tests=20)
    tests = replace(world, split="test").batch(range(20))

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(*tokens.shape, 16)
            for b, row in enumerate(tokens.tolist()):
                known: dict[int, int] = {}
                for i, token in enumerate(row):
                    if i < 8 and i % 2 == 0:
                        known[token] = row[i + 1]
                    elif i >= 8 and token in known and token % 2:
                        out[b, i, known[token]] = 1.0
            return self.scale * out

    asked = tests.targets != IGNORE
    odd = (tests.tokens[asked] % 2 == 1).double().mean().item()
    assert task.measure(Oracle())["recall"] == pytest.approx(odd)
    assert [tuple(t.shape) for t in task.batch(1, 2)] == [(4, 16), (4, 16)]


def test_a_decoder_learns_to_predict() -> None:
    data = torch.tensor([1, 2, 3, 4]).repeat(100)
    torch.manual_seed(0)
    model = slot_decoder("attention", 5, dim=16, num_heads=2, depth=1, context=8)
    recipe = Recipe(epochs=3, batch_size=8, lr=1e-2)
    task = Predict(data, data[:80], recipe, context=8, steps=20)
    before = task.measure(model)["perplexity"]
    assert fit(model, task, recipe)["perplexity"][-1] < 1.2 < 3 < before


def test_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "run_calls", lambda calls, workers: run_here(calls))
    train, test = split_text("ab é" * 100)
    assert len(train) + len(test) == 400
    assert int(torch.cat((train, test)).max()) < 128
    (tmp_path / "mine.txt").write_text("To be, or not to be. " * 40)
    found = compare_text(["attention"], tmp_path / "mine.txt", out=tmp_path / "out", **{**SMALL, "seeds": 1})
    assert found.info["data"]["name"] == "mine.txt"
    assert found.rows[0].last("perplexity")


def test_advice_prefers_the_faster_of_those_alike() -> None:
    def row(name: str, values: list[float], rate: float) -> TextRow:
        runs: list[dict[str, Any]] = [{"perplexity": [9.0, v]} for v in values] + [{"recall": [0.1, 0.5]}]
        cost = {"decoding": {"median": rate}, "training": {"median": 1.0}, "parameters": 1, "cache_bytes": 8.0}
        return TextRow(name, "sequence", runs=runs, cost=cost)

    rows = [row("slow", [5.0, 5.4], 10.0), row("fast", [5.1, 5.5], 30.0), row("poor", [7.0, 7.1], 40.0)]
    found = TextComparison({}, rows)
    assert [r.layer for r in found.close()] == ["slow", "fast"]
    assert found.advice().startswith("Use fast: perplexity 5.30 a byte, within the spread over seeds of slow (5.20)")
    assert found.advice().endswith("recalls 50 %.")
    for better in rows[0], rows[2]:
        better.runs[-1]["recall"] = [0.1, 0.9]
    assert found.advice().endswith("recalls 50 %; most is recalled by poor, 90 %.")
    assert found.front() == {"slow", "fast", "poor"}
    found.rows += [row("steady", [5.5, 5.5], 50.0), row("wide", [5.0, 6.2], 20.0)]
    assert [r.layer for r in found.close()] == ["slow", "fast", "steady", "wide"]
    assert "Use steady: perplexity 5.50 a byte, better than wide, which is within the spread" in found.advice()
    assert math.isnan(TextRow("none", "own").mean("recall"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["hilo"]}, "cannot be causal"),
        ({"layers": ["multi-query"]}, "nearest: .*multi-query-attention"),
        ({"layers": []}, "layers is empty"),
        ({"seeds": 0}, "seeds=0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare_text(**{"out": tmp_path, **SMALL, **arguments})
    assert not list(tmp_path.iterdir())


def test_text_too_short(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("short")
    with pytest.raises(ValueError, match=r"has 5 bytes; \d+ or more"):
        compare_text(["attention"], tmp_path / "mine.txt", out=tmp_path / "out", **SMALL)


def test_command(comparison: TextComparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare_text", lambda *_, **__: comparison)
    result = CliRunner().invoke(app, ["--task", "text", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [row["layer"] for row in said["rows"]] == [row.layer for row in comparison.ranked()]
    assert CliRunner().invoke(app, ["--task", "sound"]).exit_code == 2


def test_a_class_fits_too() -> None:
    assert isinstance(mixer("regard.nn:Attention")(8, 2), Attention)
    run = TextRun("attention", "english", 0, "data", "code")
    assert TextRun.read(json.loads(json.dumps(asdict(run)))) == run
    assert run.key != replace(run, task="recall").key
