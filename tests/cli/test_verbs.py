"""The verbs on the command line: what they print, and what a mistake looks like."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from regard.cli import app

timm = pytest.importorskip("timm")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_sites_of_a_model() -> None:
    done = run("sites", "vit_tiny_patch16_224", "--where", "blocks.3.*", "--json")
    assert done.exit_code == 0, done.output
    (site,) = json.loads(done.stdout)
    assert (site["name"], site["heads"], site["verified"]) == ("blocks.3.attn", 3, True)
    assert site["tokens_k"] == "cls + image[14,14]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sites", "vit_tinny_patch16_224"), "nearest: vit_tiny"),
        (("sites", "keras:vit"), "not one of timm, torchvision, transformers"),
        (("sites", "vit_tiny_patch16_224", "--where", "block.0"), "nearest: blocks.0.attn"),
        (("reproduce", "relaa"), "nearest: rela"),
        (("reproduce",), "name a claim, or --all"),
        (("reproduce", "rela", "--budget", "huge"), "budget='huge'"),
        (("check", "hylo"), "nearest: hilo"),
        (("bench", "hylo"), "nearest: hilo"),
        (("bench", "hilo", "--shape", "8"), "is not BATCH,TOKENS,DIM,HEADS"),
        (("explain", "no-such.png"), "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert len([line for line in done.stderr.splitlines() if line.startswith("regard: ")]) >= 1


def test_explain_writes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    pixels = (torch.rand(40, 60, 3) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    done = run("explain", str(tmp_path / "in.png"), "--out", str(tmp_path / "map.png"), "--target", "7")
    assert done.exit_code == 0, done.output
    assert "random weights" in done.stderr
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size == (224, 224)


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from regard.hosts.open import open_model

    plain = open_model("timm:vit_tiny_patch16_224", img_size=32, depth=1)
    state = {n: x.clone() + 1 for n, x in plain.model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = open_model("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", img_size=32, depth=1)
    assert torch.equal(loaded.model.state_dict()["cls_token"], state["cls_token"])
    with pytest.raises(ValueError, match="do not fit"):
        open_model("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors")


def test_a_claim_that_fails_is_stored_and_exits_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.claims import reproduce
    from regard.claims.claim import Row

    class Claim:
        SEEDS = 2

        @staticmethod
        def run(budget: str, seeds: int) -> list[Row]:
            return [Row("accuracy", 0.4, 0.5, ">="), Row("seconds", 3.0)]

    monkeypatch.setattr(reproduce, "load", lambda slug: Claim)
    done = run("reproduce", "rela", "--out", str(tmp_path), "--json")
    assert done.exit_code == 1
    (result,) = json.loads(done.stdout)
    assert result["passed"] is False
    assert [row["passed"] for row in result["rows"]] == [False, None]
    kept = reproduce.stored("rela", tmp_path)
    assert kept is not None
    assert (kept["stale"], kept["seeds"], kept["passed"]) == (False, 2, False)
    monkeypatch.setattr(reproduce, "code_hash", lambda slug: "other code")
    assert reproduce.stored("rela", tmp_path)["stale"] is True
    assert run("reproduce", "rela", "--budget", "smoke", "--out", str(tmp_path / "none")).exit_code == 1
    assert not (tmp_path / "none").exists()
