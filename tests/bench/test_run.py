"""The bench gives ratios of one run, refuses a layer whose checks fail, and keeps one row a subject."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from regard.bench import run as bench_run
from regard.bench.peers import FUSED, PEERS, Peer, peers_of
from regard.catalog import registry

TINY = [(1, (7, 7), 32, 4)]
QUICK = {"shapes": TINY, "rounds": 3, "budget": 0.0}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Green:
        ok = True

    monkeypatch.setattr(bench_run, "check", lambda record: Green())


@pytest.mark.usefixtures("unchecked")
def test_a_layer_beside_a_peer() -> None:
    found = bench_run.bench("hilo", "torchvision", **QUICK)
    assert [(r.subject, r.peer, r.mode) for r in found] == [
        ("hilo", "torchvision ShiftedWindowAttention", "forward"),
        ("hilo", "torchvision ShiftedWindowAttention", "forward+backward"),
    ]
    for row in found:
        assert row.ratio == pytest.approx(row.peer_milliseconds / row.milliseconds)
        assert min(row.milliseconds, row.mebibytes, row.peer_mebibytes) > 0
    layer = registry.create("hilo", dim=32, num_heads=4)
    window = PEERS["hilo"][1].build(32, 4, (7, 7))
    counts = [sum(p.numel() for p in m.parameters()) for m in (layer, window)]
    assert found[0].peer_parameters == pytest.approx(counts[1] / counts[0])


@pytest.mark.parametrize("name", sorted(PEERS))
def test_every_peer_takes_the_same_tokens(name: str) -> None:
    record = registry.get(name)
    assert record.kind == "layer"
    x = torch.randn(2, 49, 32)
    for peer in peers_of(record):
        if importlib.util.find_spec(peer.requires) is None:
            continue
        assert isinstance(peer.build(32, 4, (7, 7)).eval()(x), Tensor)


@pytest.mark.usefixtures("unchecked")
def test_a_sequence_layer_is_causal_and_has_a_cached_step() -> None:
    found = bench_run.bench("multi-query-attention", "causal", **{**QUICK, "shapes": [(2, (1, 9), 32, 4)]})
    assert [r.mode for r in found] == ["forward", "forward+backward", "cached step"]
    assert found[0].shape == "b=2 tokens=9 dim=32 heads=4"
    layer, x = registry.create("multi-query-attention", dim=32, num_heads=4, causal=True).eval(), torch.randn(2, 9, 32)
    call = bench_run.cached_step(layer, x)
    with torch.no_grad():
        expected = layer(torch.cat((x, x[:, -1:]), 1))[:, -1:]
    for _ in range(3):
        torch.testing.assert_close(call(), expected)


@pytest.mark.usefixtures("unchecked")
def test_a_layer_and_its_peer_are_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr("shutil.which", lambda command: command)
    shape = {**QUICK, "shapes": [(2, (1, 9), 32, 4)]}
    path = bench_run.bench("coca", "causal", **shape).save(tmp_path)
    assert not compiled
    found = bench_run.bench("coca", "causal", **shape, compiled=True)
    assert [r.mode for r in found] == ["forward, compiled", "forward+backward, compiled"]
    assert len(compiled) == 2
    assert type(compiled[0]) is registry.get("coca").target
    assert found.save(tmp_path) == path
    modes = [row["mode"] for row in csv.DictReader(path.read_text().splitlines())]
    assert modes == ["forward", "forward+backward", "cached step", *(r.mode for r in found)]
    with pytest.raises(ValueError, match="compiled=True"):
        bench_run.bench("capture", compiled=True)
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(ValueError, match=r"compiled=True: .* needs a C\+\+ compiler, and there is no"):
        bench_run.bench("coca", "causal", **shape, compiled=True)


@pytest.mark.parametrize("record", registry.methods("layer"), ids=lambda m: m.name)
def test_every_layer_is_built_at_the_width_measured(record: registry.Method) -> None:
    layer = bench_run.subject_layer(record, 32, 4, 64)
    grid = (8, 8)
    args, kwargs = bench_run.arguments(record, torch.randn(1, 64, 32), grid)
    assert isinstance(layer(*args, **kwargs), Tensor)
    if record.tags.causal:
        assert layer.causal


def test_no_number_while_a_check_fails() -> None:
    @registry.method("broken-for-bench", kind="layer", example={"dim": 8, "num_heads": 2})
    class Broken(nn.Module):
        def __init__(self, dim: int, num_heads: int = 2) -> None:
            super().__init__()
            self.unused = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            return x.flip(0)

    try:
        with pytest.raises(ValueError, match="no number for broken-for-bench while checks fail"):
            bench_run.bench("broken-for-bench", **QUICK)
    finally:
        registry._METHODS.pop("broken-for-bench")


@pytest.mark.usefixtures("unchecked")
def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Peer("nobody's layer", FUSED.build, "no-such-distribution")
    monkeypatch.setattr(bench_run, "peers_of", lambda name: (absent,))
    found = bench_run.bench("hilo", **QUICK)
    assert found == []
    assert found.missing == ["nobody's layer: no-such-distribution is not installed"]
    with pytest.raises(ValueError, match="nothing was measured"):
        found.save()


@pytest.mark.usefixtures("unchecked")
def test_saving_replaces_earlier_rows_of_the_same_measurement_only(tmp_path: Path) -> None:
    first = bench_run.bench("hilo", "torchvision", shapes=TINY, rounds=3, budget=0.0)
    path = first.save(tmp_path)
    bench_run.bench("hilo", "torchvision", shapes=[(1, (7, 7), 16, 4)], rounds=3, budget=0.0).save(tmp_path)
    bench_run.bench("flatten", "torchvision", **QUICK).save(tmp_path)
    bench_run.bench("hilo", "torchvision", **QUICK).save(tmp_path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(r["subject"], r["shape"]) for r in rows] == [
        *[("flatten", "b=1 grid=7x7 dim=32 heads=4")] * 2,
        *[("hilo", "b=1 grid=7x7 dim=16 heads=4")] * 2,
        *[("hilo", "b=1 grid=7x7 dim=32 heads=4")] * 2,
    ]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_shapes_are_read() -> None:
    assert bench_run.shape_of("1,1024,768,12") == (1, (1, 1024), 768, 12)
    assert bench_run.shape_of("4,14x7,192,6") == (4, (14, 7), 192, 6)
    for wrong in ("1024", "1,1024,768", "0,8,32,4", "1,8x8x8,32,4", "1,8,32,4,1"):
        with pytest.raises(ValueError, match=f"shape='{wrong}' is not BATCH,TOKENS,DIM,HEADS"):
            bench_run.shape_of(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hylo",), "nearest: hilo"),
        (("hilo", "flash"), "no peer of hilo"),
        (("fastv",), "accelerator"),
        (("capture", "torch"), "one model"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_run.bench(*arguments, **QUICK)


def test_reading_is_measured_beside_a_model_never_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.bench import capture

    monkeypatch.setattr(capture, "SHAPES", ((2, 9, 16, 2), (1, 1, 16, 2)))
    rows = list(capture.reading(rounds=3, budget=0.0))
    assert len(rows) == 4
    assert {r.mode for r in rows} == {"capture of 12 sites", "after a capture"}
    assert all(r.peer == "never watched" and r.ratio > 0 for r in rows)
