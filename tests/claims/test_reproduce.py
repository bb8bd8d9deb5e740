"""Choosing, running and storing claims: many at a time, one that fails among them, and what counts as stale."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from regard.catalog.papers import papers
from regard.claims import reproduce as module
from regard.claims.claim import ClaimResult, Row
from regard.claims.reproduce import choose, claims, code_hash, reproduce_many, store, stored
from regard.claims.scoreboard import Scoreboard
from regard.cli import app
from regard.train.pool import Call, Event, run_here

RESULT = ClaimResult(
    slug="rela",
    rows=(Row("a", 0.1 + 0.2, 0.5, ">=", 0.4, (0.1, 0.2), "note"), Row("b", 7.0)),
    budget="cpu",
    seeds=2,
    seconds=3.5,
    commit="abc",
    machine="here",
    torch="2.9",
    code="0",
    date="2026-01-01",
)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reproduce", *arguments])


class Claim:
    """Met, unless the number of seeds is 13; fails at 14."""

    SEEDS = 3

    @staticmethod
    def run(budget: str, seeds: int) -> list[Row]:
        if seeds == 14:
            raise ArithmeticError("no such number")
        return [Row("luck", float(seeds != 13), 1.0, ">="), Row("seeds", float(seeds))]


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda slug: Claim)


def keep(folder: Path, slug: str, code: str) -> None:
    store(replace(RESULT, slug=slug, code=code), folder)


def test_a_claim_is_a_file_named_after_a_paper() -> None:
    assert set(claims()) <= {paper.slug for paper in papers()}
    files = {p.stem for p in Path(module.__file__).parent.glob("*.py")}
    assert {stem.replace("_", "-") for stem in files} - set(claims()) == {
        stem.replace("_", "-")
        for stem in files
        if stem.startswith("_") or stem in ("claim", "plot", "reproduce", "scoreboard")
    }


def test_a_result_goes_through_json_unchanged(tmp_path: Path) -> None:
    assert ClaimResult.from_json(json.loads(json.dumps(RESULT.to_json()))) == RESULT


def test_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, "rela", code_hash("rela"))
    keep(tmp_path, "cbam", "other code")
    others = [slug for slug in claims() if slug != "rela"]
    assert choose(every=True, out=tmp_path) == others
    assert choose(stale=True, out=tmp_path) == ["cbam"]
    assert choose(["rela"], stale=True, out=tmp_path) == ["rela", "cbam"]
    kinds = {slug: str(paper.kind) for slug in claims() for paper in papers() if paper.slug == slug}
    assert choose(kinds=["study"], out=tmp_path) == [slug for slug in claims() if kinds[slug] == "study"]
    assert choose(every=True, kinds=["layer", "model"], out=tmp_path) == [
        s for s in others if kinds[s] in ("layer", "model")
    ]
    assert choose(["rela", "attention-rank"], kinds=["study"], out=tmp_path) == ["attention-rank"]
    with pytest.raises(ValueError, match="kind='layr'"):
        choose(kinds=["layr"], out=tmp_path)
    with pytest.raises(ValueError, match="slug='relaa' has no claim; nearest: rela"):
        choose(["relaa"], out=tmp_path)


def test_code_that_a_claim_builds_on_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name, text in {
        "layers/rela.py": "",
        "claims/rela.py": "from regard.claims.cbam import resnet\nfrom regard.claims.claim import Row",
        "claims/cbam.py": "def late():\n    from regard.claims._recipe import train",
        "claims/_recipe.py": "from regard.claims import cbam",
        "claims/claim.py": "",
        "claims/nat.py": "# from regard.claims.cbam import resnet",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for file, changes in {
        "layers/rela.py": True,
        "claims/rela.py": True,
        "claims/cbam.py": True,
        "claims/_recipe.py": True,
        "claims/claim.py": False,
        "claims/nat.py": False,
    }.items():
        before = code_hash("rela")
        with (tmp_path / file).open("a") as text:
            text.write("\n# changed")
        assert (code_hash("rela") != before) is changes, file


def test_neither_docstrings_nor_blank_lines_make_a_result_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.claims.reproduce.ROOT", tmp_path)
    (tmp_path / "claims").mkdir()
    file = tmp_path / "claims" / "rela.py"
    hashes = []
    for text in (
        '"""What."""\nA = 1\n\ndef f():\n    """Why.\n\n    More.\n    """\n    return A\n',
        '"""What else."""\nA = 1\ndef f():\n    """Why not."""\n\n    return A\n',
        '"""What."""\nA = 1\ndef f():\n    return A\n',
        '"""What."""\nA = 2\ndef f():\n    return A\n',
    ):
        file.write_text(text)
        hashes.append(code_hash("rela"))
    assert len(set(hashes[:3])) == 1
    assert hashes[3] != hashes[0]


def test_another_trained_model_makes_a_result_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.claims.reproduce.ROOT", tmp_path)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "rela.py").write_text('model = pretrained("mine")\n')
    monkeypatch.setattr("regard.claims.reproduce.trained", lambda: ["mine"])
    hashes = []
    for digest in ("a", "a", "b"):
        monkeypatch.setattr("regard.claims.reproduce.card", lambda name: {"sha256": digest})  # noqa: B023
        hashes.append(code_hash("rela"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_each_result_is_stored_as_it_comes(easy: None, tmp_path: Path) -> None:
    with closing(reproduce_many(["rela", "cbam", "rela"], seeds=5, out=tmp_path)) as events:
        assert (next(events).kind, next(events).kind) == ("started", "done")
        kept = stored("rela", tmp_path)
        assert kept is not None
        assert (kept["seeds"], kept["stale"], stored("cbam", tmp_path)) == (5, False, None)
        rest = list(events)
    assert [(event.key, event.kind) for event in rest] == [("cbam", "started"), ("cbam", "done")]
    assert ClaimResult.from_json(stored("cbam", tmp_path) or {}) == rest[-1].facts["result"]


def test_in_workers_and_alone_it_is_the_same(tmp_path: Path) -> None:
    ours, theirs = (
        {
            e.key: e.facts["result"]
            for e in reproduce_many(["biformer"], budget="smoke", out=tmp_path, jobs=jobs)
            if e.last
        }
        for jobs in (1, None)
    )
    assert {slug: replace(result, seconds=0.0) for slug, result in ours.items()} == {
        slug: replace(result, seconds=0.0) for slug, result in theirs.items()
    }
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"budget": "huge"}, "budget='huge'"), ({"seeds": 0}, "seeds=0"), ({"jobs": 0}, "jobs=0 must be at least 1")],
)
def test_bad_settings_are_refused_before_anything_runs(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(reproduce_many(["rela"], **settings))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nearest: rela"):
        next(reproduce_many(["rela", "relaa"]))


def test_one_that_fails_is_told_and_the_others_go_on(
    easy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = {"rela": 14, "cbam": 13, "nat": 3}

    def run(calls: Sequence[Call], jobs: int) -> Iterator[Event]:
        return run_here([replace(c, arguments={**c.arguments, "seeds": seeds[c.key]}) for c in calls])

    monkeypatch.setattr(module, "run_calls", run)
    done = command("rela", "cbam", "nat", "--jobs", "2", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "rela: failed: ArithmeticError: no such number" in done.stdout
    assert "in run" in done.stdout
    assert "3 claims: 1 met, 1 NOT met, 1 failed" in done.stdout
    table = done.stdout[done.stdout.index("3 claims") :]
    assert table.index("rela") < table.index("cbam") < table.index("nat")
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == ["cbam", "nat"]
    printed = command("rela", "nat", "--jobs", "2", "--out", str(tmp_path), "--json")
    assert printed.exit_code == 1
    assert [(r["slug"], r.get("failed")) for r in json.loads(printed.stdout)] == [
        ("nat", None),
        ("rela", "ArithmeticError: no such number"),
    ]
    assert command("nat", "--jobs", "2", "--out", str(tmp_path)).exit_code == 0


def test_interrupted_it_keeps_what_is_done(easy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(calls: Sequence[Call]) -> Iterator[Event]:
        yield from run_here(calls[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_here", run)
    done = command("rela", "cbam", "--out", str(tmp_path))
    assert done.exit_code == 130
    assert "2 claims: 1 met, 1 not run" in done.stdout
    assert "1 of 2 claims are done" in done.stderr
    assert stored("rela", tmp_path) is not None


def test_a_cluster_is_handed_the_calls(easy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cluster(calls: Sequence[Call], address: str, workers: int | None) -> Iterator[Event]:
        assert ([call.gpu for call in calls], address, workers) == ([True], "there:6379", 4)
        yield Event("rela", "started", {"attempt": 2})
        yield from run_here(calls)

    monkeypatch.setattr(module, "run_on_ray", cluster)
    done = command("rela", "--ray", "there:6379", "--jobs", "4", "--budget", "gpu", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "rela: its worker was lost; started again" in done.stdout


def test_nothing_to_run_is_no_failure(tmp_path: Path) -> None:
    done = command("--stale", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "0 claims: 0 met" in done.stdout


def test_a_scoreboard_of_what_was_not_run_is_not_met() -> None:
    board = Scoreboard(["rela"])
    assert not board.met
    board.follow(iter_of(Event("rela", "done", {"result": RESULT})), Console(quiet=True))
    assert (board.met, str(board)) == (False, "1 claims: 0 met, 1 NOT met")


def iter_of(*events: Event):  # type: ignore[no-untyped-def]
    yield from events
