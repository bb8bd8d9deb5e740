"""The trained models that come along are whole and do what their cards say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from regard.train.pretrained import card, folder, pretrained, trained
from regard.train.recipes import load
from regard.worlds.shapes.world import Shapes


@pytest.mark.parametrize("name", trained())
def test_small_and_loadable(name: str) -> None:
    assert (folder() / f"{name}.safetensors").stat().st_size < 20e6
    assert sum(p.numel() for p in pretrained(name).parameters()) == card(name)["parameters"]


def test_painting() -> None:
    task: Any = load("shapes-diffusion", {"tests": 6}).task()
    good, leaky = (task.verdicts(pretrained(f"shapes-diffusion{kind}"), 2, steps=12) for kind in ("", "-leaky"))
    assert sum(map(bool, good)) >= 5
    assert sum(one.score for one in leaky) < sum(one.score for one in good)


def test_inverted_pictures_are_painted_again() -> None:
    model: Any = pretrained("shapes-diffusion")
    world = Shapes(size=32, things=(1, 1), sizes=(0.33, 0.46), tilt=0.0, split="test")
    sample = world[3]
    prompt = f"a {sample.scene.things[0].kind} on a {sample.scene.background.tone} background"
    latents = model.invert(sample.image[None], [prompt], steps=40)
    again = model.sample([prompt], latents=latents, steps=40, guidance=1.0)[0]
    other = model.sample([prompt], seed=1, steps=10, guidance=1.0)[0]
    error, apart = ((image - sample.image).abs().mean() for image in (again, other))
    assert error < 0.5 * apart


def test_answering() -> None:
    facts = card("shapes-vlm")
    task: Any = load("shapes-vlm", facts["settings"]).task()
    figures = replace(task, tests=12, suspects=20).measure(pretrained("shapes-vlm"))
    assert figures["accuracy"] == pytest.approx(facts["figures"]["accuracy"], abs=0.1)
    assert figures["accuracy"] > 0.8
    assert figures["shape"] > 0.9
