"""Averaged weights, logs, and two processes that learn what one does."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from regard.train.classify import Classify
from regard.train.loop import Curve, Recipe, fit, measured
from regard.train.pretrained import card, train
from regard.worlds.images import Images

RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-2)
LAUNCH = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def world(n: int) -> Images:
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 90, (n, 1, 6, 5), generator=generator)
    pixels[torch.arange(n), 0, labels] += 150
    return Images(pixels.to(torch.uint8), labels, ("a", "b", "c"), (70.0,), (60.0,))


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 3))


def task(recipe: Recipe = RECIPE) -> Classify:
    return Classify(world(42), world(30), recipe, seed=3)


def test_figures_are_measured_by_the_threads_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Counted(Classify):
        def measure(self, model: nn.Module) -> dict[str, float]:
            threads.append(torch.get_num_threads())
            return super().measure(model)

    counted, model, before = Counted(world(42), world(30), RECIPE, 3), network(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for devices, cores in ((1, 64), (4, 64), (4, 6), (4, 1)):
            monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
            measured(counted, model.train(), devices)
        assert threads == [2, 8, 6, 2]
        assert torch.get_num_threads() == 2
        assert model.training
    finally:
        torch.set_num_threads(before)


def test_averaged_weights_are_measured_and_kept(tmp_path: Path) -> None:
    """Fed back by hand: a' = e a + (1 - e) w after every step, the first step starting it."""
    recipe = Recipe(epochs=2, batch_size=8, lr=1e-2, ema=0.9)
    seen: list[dict[str, torch.Tensor]] = []

    class Spy(Classify):
        def batch(self, epoch: int, step: int) -> tuple[torch.Tensor, ...]:
            seen.append({key: value.clone() for key, value in plain.state_dict().items()})
            return super().batch(epoch, step)

    plain = network()
    fit(plain, Spy(world(42), world(30), RECIPE, 3), Recipe(epochs=2, batch_size=8, lr=1e-2))
    seen.append(plain.state_dict())
    expected = dict(seen[1])
    for weights in seen[2:]:
        expected = {key: 0.9 * value + 0.1 * weights[key] for key, value in expected.items()}
    averaged = network()
    curve = fit(averaged, task(recipe), recipe)
    torch.testing.assert_close(dict(averaged.state_dict()), expected, rtol=1e-5, atol=1e-6)
    assert curve["test_loss"][-1] == pytest.approx(task(recipe).measure(averaged)["test_loss"])

    def stop(facts: dict[str, float]) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(network(), task(recipe), recipe, checkpoint=tmp_path / "c", report=stop)
    resumed = network()
    assert fit(resumed, task(recipe), recipe, checkpoint=tmp_path / "c") == curve
    torch.testing.assert_close(resumed.state_dict(), averaged.state_dict(), rtol=0, atol=0)


def test_figures_are_logged(tmp_path: Path) -> None:
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path), "run")
    curve = fit(network(), task(), RECIPE, logger=logger)
    logger.finalize("success")
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [6, 12, 18]
    assert [float(row["loss"]) for row in rows] == pytest.approx(curve["loss"])


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    program = tmp_path / "spread.py"
    program.write_text(
        f"import sys, importlib.util; sys.path[:0] = {sys.path!r}\n"
        f"spec = importlib.util.spec_from_file_location('this', {__file__!r})\n"
        "this = importlib.util.module_from_spec(spec); spec.loader.exec_module(this)\n"
        "import json, torch; from safetensors.torch import save_file\n"
        "class Says(this.Classify):\n"
        "    def measure(self, model):\n"
        "        print('measured by', torch.distributed.get_rank()); return super().measure(model)\n"
        "torch.set_num_threads(1); model = this.network()\n"
        "curve = this.fit(model, Says(this.world(42), this.world(30), this.RECIPE, seed=3), this.RECIPE, devices=2)\n"
        "assert len(curve['accuracy']) == this.RECIPE.epochs\n"
        "if torch.distributed.get_rank() == 0:\n"
        f"    save_file(model.state_dict(), {str(tmp_path / 'w.safetensors')!r})\n"
        f"    open({str(tmp_path / 'curve.json')!r}, 'w').write(json.dumps(curve))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    done = subprocess.run([*LAUNCH, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("measured by 0") == RECIPE.epochs
    assert "measured by 1" not in done.stdout
    alone = network()
    curve = fit(alone, task(), RECIPE)
    got = load_file(tmp_path / "w.safetensors")
    torch.testing.assert_close(got, dict(alone.state_dict()), rtol=1e-4, atol=1e-6)
    import json

    assert json.loads((tmp_path / "curve.json").read_text()) == {
        name: pytest.approx(values, rel=1e-4) for name, values in curve.items()
    }


def test_a_recipe_trains_in_two_processes_of_which_one_speaks(tmp_path: Path) -> None:
    tiny = {"dim": 8, "num_heads": 2, "depth": 1, "pairs": 2, "steps": 2, "epochs": 1, "batch_size": 4}
    command = ["regard", "train", "recall-lm", *(part for k, v in tiny.items() for part in ("--set", f"{k}={v}"))]
    done = subprocess.run(
        [*LAUNCH, "-m", *command, "--devices", "2", "--out", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recall-lm.safetensors: loss") == 1
    launched = "torchrun --nnodes 1 --nproc-per-node 2 -m regard train recall-lm --nodes 1 --devices 2 --set dim=8"
    assert card("recall-lm", tmp_path)["command"].startswith(launched)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("ours", [True, False])
def test_a_group_of_processes_is_closed_by_who_opened_it(
    ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather() -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)

    def spread(*args: Any, **options: Any) -> Curve:
        if ours:
            gather()
        return fit(*args, **options)

    monkeypatch.setattr("regard.train.pretrained.fit", spread)
    if not ours:
        gather()
    tiny = {"dim": 8, "num_heads": 2, "depth": 1, "pairs": 2, "steps": 1, "epochs": 1, "batch_size": 2}
    try:
        train("recall-lm", tiny, out=tmp_path / "out")
        assert torch.distributed.is_initialized() is not ours
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
