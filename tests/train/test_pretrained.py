"""Models are trained by name, kept with their card, and loaded only if they are what was trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.train.pretrained import card, pretrained, train, trained
from regard.train.recipes import load, names, settings_of
from regard.worlds.digits import digits
from regard.worlds.images import Images

TINY: dict[str, dict[str, Any]] = {
    "digits-cnn": {"width": 2, "epochs": 1, "batch_size": 100},
    "digits-vit": {"dim": 8, "num_heads": 2, "depth": 1, "patch": 14, "epochs": 1, "batch_size": 100},
    "recall-lm": {"dim": 8, "num_heads": 2, "depth": 1, "pairs": 2, "steps": 2, "epochs": 2, "batch_size": 4},
    "shapes-clip": {
        "dim": 8,
        "text_depth": 1,
        "depth": 1,
        "size": 32,
        "patch": 16,
        "steps": 1,
        "epochs": 1,
        "batch_size": 4,
    },
    "shapes-cnn": {"width": 2, "count": 20, "tests": 20, "epochs": 1},
    "shapes-diffusion": {
        "narrow": 8,
        "wide": 16,
        "text_dim": 8,
        "steps": 2,
        "tests": 2,
        "epochs": 1,
        "batch_size": 4,
    },
    "shapes-vit": {"dim": 8, "num_heads": 2, "depth": 1, "patch": 16, "count": 20, "tests": 20, "epochs": 1},
    "shapes-vlm": {
        "dim": 16,
        "depth": 2,
        "tower": "",
        "tower_dim": 8,
        "tower_depth": 1,
        "size": 32,
        "patch": 16,
        "steps": 2,
        "tests": 3,
        "suspects": 4,
        "epochs": 1,
        "batch_size": 4,
    },
    "text-lm": {"dim": 12, "num_heads": 2, "num_kv_heads": 1, "depth": 1, "context": 16, "steps": 2, "epochs": 2},
}


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(split: Literal["train", "test"]) -> Images:
        every = digits(split)
        return replace(every, pixels=every.pixels[:200], labels=every.labels[:200])

    for recipe in ("digits_cnn", "digits_vit"):
        monkeypatch.setattr(f"regard.train.recipes.{recipe}.digits", some)


@pytest.mark.parametrize("name", names())
def test_trained_and_loaded(name: str, tmp_path: Path, few_digits: None) -> None:
    path = train(name, TINY[name], out=tmp_path, name="mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.safetensors"]
    assert trained(tmp_path) == ["mine"]
    facts = card("mine", tmp_path)
    assert facts["settings"] == settings_of(load(name, TINY[name]))
    assert facts["about"].endswith(".")
    assert "Raises" not in facts["about"]
    chosen = [f"--set {key}={value}" for key, value in TINY[name].items()]
    assert facts["command"] == " ".join([f"regard train {name}", *chosen, "--name mine"])
    model = pretrained("mine", tmp_path)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    again = load(name, facts["settings"]).task().measure(model)
    for key, value in again.items():
        assert value == pytest.approx(facts["figures"][key], rel=1e-5)
    assert path.stat().st_size < 20e6


@pytest.mark.parametrize("name", names())
def test_every_weight_learns_without_which_it_does_not_train_in_several_processes(name: str, few_digits: None) -> None:
    trainable = load(name, TINY[name])
    model, task = trainable.start(), trainable.task()
    task.loss(model.train(), task.batch(0, 0)).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_resume_gives_what_was_not_interrupted(tmp_path: Path) -> None:
    train("recall-lm", TINY["recall-lm"], out=tmp_path / "whole")

    def stop(facts: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("recall-lm", TINY["recall-lm"], out=tmp_path / "halves", report=stop)
    assert trained(tmp_path / "halves") == []
    train("recall-lm", TINY["recall-lm"], out=tmp_path / "halves", resume=True)
    first, second = (card("recall-lm", tmp_path / part) for part in ("whole", "halves"))
    assert first["sha256"] == second["sha256"]
    assert first["figures"] == second["figures"]


def test_an_altered_or_cut_file_is_refused(tmp_path: Path) -> None:
    path = train("recall-lm", TINY["recall-lm"], out=tmp_path)
    data = path.read_bytes()
    for bad in (data[:-1], data[:-4] + b"\0\0\0\1"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"has the digest .*: it was cut off or altered"):
            pretrained("recall-lm", tmp_path)


def test_weights_of_another_recipe_are_refused(tmp_path: Path) -> None:
    path = train("recall-lm", TINY["recall-lm"], out=tmp_path)
    facts = json.loads(path.with_suffix(".json").read_text())
    facts["settings"]["depth"] = 2
    path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="does not fit its recipe"):
        pretrained("recall-lm", tmp_path)


def test_names_and_settings() -> None:
    with pytest.raises(ValueError, match="recipe='text' is not known; nearest: text-lm"):
        load("text")
    with pytest.raises(ValueError, match=r"'width' is no setting of text-lm; there are dim, .*lr"):
        load("text-lm", {"width": 3})
    with pytest.raises(ValueError, match="dim='wide' is not of type int"):
        load("text-lm", {"dim": "wide"})
    with pytest.raises(ValueError, match=r"lr=-1\.0 must be positive"):
        load("text-lm", {"lr": "-1"})
    found = load("text-lm", {"lr": "0.01", "dim": "24"})
    assert (settings_of(found)["lr"], settings_of(found)["dim"]) == (0.01, 24)
    with pytest.raises(ValueError, match="name='nobody' is no trained model; there are none"):
        card("nobody", "/nowhere")


def test_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["train"]).stdout.split() == names()
    tiny = [part for key, value in TINY["recall-lm"].items() for part in ("--set", f"{key}={value}")]
    done = run(app, ["train", "recall-lm", *tiny, "--out", str(tmp_path), "--logs", str(tmp_path / "logs")])
    assert done.exit_code == 0, done.output
    assert "recall-lm.safetensors: loss" in done.stdout
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    assert "recall" in log.read_text().splitlines()[0]
    for wrong, said in ((["nothing"], "is not known"), (["text-lm", "--set", "dim"], "is not KEY=VALUE")):
        refused = run(app, ["train", *wrong, "--out", str(tmp_path)])
        assert refused.exit_code == 2
        assert said in refused.stderr


# Painting 200 pictures takes minutes, answering 900 questions half of one: test_weights.py asks for less.
@pytest.mark.parametrize("name", [n for n in trained() if not n.startswith(("shapes-diffusion", "shapes-vlm"))])
def test_those_that_come_along(name: str) -> None:
    model, facts = regard.pretrained(name), card(name)
    # What is measured on does not depend on how much is learned from.
    few = {"count": 1} if "count" in facts["settings"] else {}
    measured = load(facts["recipe"], {**facts["settings"], **few}).task().measure(model)
    for key, value in measured.items():
        assert value == pytest.approx(facts["figures"][key], rel=1e-3)


def test_images_are_moved_and_not_mixed() -> None:
    from regard.train.classify import shifted

    x = torch.arange(2 * 2 * 5 * 6, dtype=torch.float32).view(2, 2, 5, 6)
    assert torch.equal(shifted(x, 0, torch.Generator()), x)
    moved = shifted(x, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (1,) * 4, mode="replicate")
    for got, source in zip(moved, padded):
        places = [source[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3)]
        assert sum(torch.equal(got, place) for place in places) == 1


def test_training_goes_on_from_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.train.pretrained.folder", lambda: tmp_path)
    train("shapes-diffusion", TINY["shapes-diffusion"], out=tmp_path)
    again = load("shapes-diffusion", {**TINY["shapes-diffusion"], "begin": "shapes-diffusion", "seed": 1})
    first, second, fresh = (
        pretrained("shapes-diffusion").state_dict(),
        again.start().state_dict(),
        again.network().state_dict(),
    )
    assert all(torch.equal(second[key], value) for key, value in first.items())
    assert not all(torch.equal(second[key], value) for key, value in fresh.items())


def test_patches_are_matched_within_the_tower() -> None:
    with pytest.raises(ValueError, match="over=2 must lie between 0 and depth=1"):
        load("shapes-clip", {**TINY["shapes-clip"], "over": 2}).task()


def test_the_tower_of_a_vision_language_model_is_that_of_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.train.pretrained.folder", lambda: tmp_path)
    train("shapes-clip", TINY["shapes-clip"], out=tmp_path)
    encoder = pretrained("shapes-clip").get_submodule("vision_model").state_dict()
    for depth in (1, 0):
        model = load("shapes-vlm", {**TINY["shapes-vlm"], "tower": "shapes-clip", "tower_depth": depth}).start()
        tower = model.get_submodule("model.vision_tower").state_dict()
        assert all(torch.equal(value, encoder[key]) for key, value in tower.items())
    with pytest.raises(
        ValueError, match="tower='shapes-clip' does not fit tower_dim=8, tower_depth=2, size=32, patch=16"
    ):
        load("shapes-vlm", {**TINY["shapes-vlm"], "tower": "shapes-clip", "tower_depth": 2}).start()
