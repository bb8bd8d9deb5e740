"""The training loop: what it does to the weights, and that stopping and going on changes nothing."""

import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.train.checkpoint import load_checkpoint, save_checkpoint
from regard.train.classify import Classify
from regard.train.loop import Recipe, fit
from regard.worlds.images import Images


def world(n: int = 45) -> Images:
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 90, (n, 1, 6, 5), generator=generator)
    pixels[torch.arange(n), 0, labels] += 150
    return Images(pixels.to(torch.uint8), labels, ("a", "b", "c"), (70.0,), (60.0,))


def network() -> nn.Module:
    """With dropout and batch statistics: random numbers and buffers must survive a stop too."""
    torch.manual_seed(5)
    layers = nn.Flatten(), nn.Linear(30, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    return nn.Sequential(*layers)


RECIPE = Recipe(epochs=5, batch_size=8, lr=1e-2)


def task(seed: int = 0, recipe: Recipe = RECIPE) -> Classify:
    return Classify(world(), world(30), recipe, seed)


def test_learns_and_reports() -> None:
    seen: list[dict[str, float]] = []
    model = network()
    curve = fit(model, task(), RECIPE, report=seen.append)
    assert curve["loss"][-1] < 0.5 * curve["loss"][0]
    assert curve["accuracy"][-1] > 0.9
    assert [facts["epoch"] for facts in seen] == [1, 2, 3, 4, 5]
    assert [facts["loss"] for facts in seen] == curve["loss"]
    assert sum(task().correct(model.eval())) / 30 == pytest.approx(curve["accuracy"][-1])


def test_against_a_loop_written_out() -> None:
    recipe = Recipe(epochs=2, batch_size=7, lr=3e-3, weight_decay=0.2, clip=0.05, label_smoothing=0.1, warmup=0.3)
    ours, theirs = (nn.Sequential(nn.Flatten(), nn.Linear(30, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    data = world(40)
    curve = fit(ours, Classify(data, data, recipe, seed=4), recipe)

    weight, bias = theirs[1].weight, theirs[1].bias
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.2}, {"params": [bias], "weight_decay": 0.0}], lr=3e-3
    )
    steps, step = 2 * math.ceil(40 / 7), 0
    losses = []
    for epoch in range(2):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(4 * 1_000_003 + epoch))
        total = 0.0
        for start in range(0, 40, 7):
            index = order[start : start + 7]
            warm = round(0.3 * steps)
            done = (step - warm) / (steps - warm)
            rate = 3e-3 * ((step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(
                theirs((data.pixels[index].float() - 70) / 60), data.labels[index], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([weight.grad.flatten(), bias.grad]).norm()  # type: ignore[union-attr,list-item]
            for p in (weight, bias):
                p.grad *= (0.05 / (norm + 1e-6)).clamp(max=1.0)
            optimizer.step()
            total += loss.item() * len(index)
            step += 1
        losses.append(total / 40)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-7)
    assert curve["loss"] == pytest.approx(losses, rel=1e-6)


def test_the_order_does_not_depend_on_the_model() -> None:
    class Spy(nn.Module):
        def __init__(self, extra: int) -> None:
            super().__init__()
            self.layer, self.extra = nn.Linear(30, 3), nn.Dropout(0.5) if extra else nn.Identity()
            self.seen: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.seen.append(x[:, 0, 0, 0].detach().clone())
            return self.layer(self.extra(x.flatten(1)))

    spies = Spy(0), Spy(1)
    for spy in spies:
        fit(spy, task(1), RECIPE, seed=1)
    first, second = (torch.cat(spy.seen) for spy in spies)
    assert torch.equal(first, second)
    epochs = first.view(5, -1)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)


def test_an_exception_in_mid_run_and_going_on(tmp_path: Path) -> None:
    whole = network()
    expected = fit(whole, task(2), RECIPE, seed=2)

    def stop(facts: dict[str, float]) -> None:
        if facts["epoch"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(network(), task(2), RECIPE, seed=2, checkpoint=tmp_path / "run.safetensors", report=stop)
    resumed = network()
    torch.manual_seed(777)
    seen: list[float] = []
    got = fit(
        resumed,
        task(2),
        RECIPE,
        seed=2,
        checkpoint=tmp_path / "run.safetensors",
        report=lambda facts: seen.append(facts["epoch"]),
    )
    assert seen == [4, 5]
    assert got == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_killed_in_mid_run_and_going_on(tmp_path: Path) -> None:
    expected = fit(network(), task(2), RECIPE, seed=2)
    checkpoint = tmp_path / "run.safetensors"
    program = (
        f"import sys, time, importlib.util, torch; sys.path[:0] = {sys.path!r}; torch.set_num_threads(1)\n"
        f"spec = importlib.util.spec_from_file_location('this', {__file__!r})\n"
        "this = importlib.util.module_from_spec(spec); spec.loader.exec_module(this)\n"
        "slow = lambda facts: (print(facts['epoch'], flush=True), time.sleep(60 if facts['epoch'] == 2 else 0))\n"
        f"this.fit(this.network(), this.task(2), this.RECIPE, seed=2, checkpoint={str(checkpoint)!r}, report=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert fit(network(), task(2), RECIPE, seed=2, checkpoint=checkpoint) == expected


def test_checkpoint_holds_modules_optimiser_and_counters(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 30)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", {"model": model}, optimizer, {"epoch": 3, "loss": [0.1, 1 / 3]})
    other = network()
    again = torch.optim.AdamW(other.parameters())
    assert load_checkpoint(tmp_path / "c", {"model": other}, again) == {"epoch": 3, "loss": [0.1, 1 / 3]}
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_measure_balances_classes() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(x), 3)

    labels = torch.tensor([0] * 8 + [1, 2])
    images = Images(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c"), (0.0,), (1.0,))
    given = Classify(images, images, RECIPE)
    found = given.measure(Always())
    assert given.logits(Always(), batch_size=3).shape == (10, 3)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["balanced"] == pytest.approx(1 / 3)
    assert given.correct(Always()) == [True] * 8 + [False] * 2
    log_sum = math.log(math.e + 2)
    assert found["test_loss"] == pytest.approx(0.8 * (log_sum - 1) + 0.2 * log_sum, rel=1e-6)


def test_a_loss_that_is_not_finite() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))  # type: ignore[index, operator]
    with pytest.raises(FloatingPointError, match="nan in epoch 1"):
        fit(model, task(), RECIPE)


def test_recipe() -> None:
    rates = [Recipe(lr=2.0, warmup=0.25).rate(step, 16) for step in range(16)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.05
    for wrong in ({"epochs": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"warmup": 1.0}, {"label_smoothing": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Recipe(**wrong)  # type: ignore[arg-type]
