"""Damage is where its mask says, of the kind it should be, and can be taken away one at a time."""

import numpy as np
import pytest
import torch

from regard.worlds.shapes.degraded import DEGRADATIONS, Degraded, DegradedSample


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_nothing_changes_outside_the_mask(kind: str) -> None:
    for i in range(6):
        sample = Degraded(kinds=(kind,))[i]
        changed = (sample.image - sample.clean).abs().amax(0) > 0.02
        assert changed.any()
        assert not (changed & ~sample.masks[kind]).any()
        assert torch.equal(sample.without[kind], sample.clean)
        assert sample.sentence == f"remove the {kind}"


def _kept(haze: DegradedSample) -> float:
    """The share of contrast left of the background, which is at depth 1."""
    far = haze.shapes.index == 0
    return (haze.image[:, far].std() / haze.clean[:, far].std()).item()


def test_each_kind_by_its_formula() -> None:
    for i in range(8):
        holes = Degraded(kinds=("holes",))[i]
        assert holes.image[:, holes.masks["holes"]].max() == 0
        assert 0.2 <= holes.masks["holes"].float().mean() < 0.6
        shadow = Degraded(kinds=("shadow",))[i]
        assert (shadow.image <= shadow.clean + 1e-6).all()
        bright = shadow.masks["shadow"] & (shadow.clean.amin(0) > 0.2)
        if bright.any():
            ratio = (shadow.image / shadow.clean)[:, bright].mean(1)
            assert ratio[0] < ratio[1] < ratio[2] < 1
        rain = Degraded(kinds=("rain",))[i]
        assert (rain.image >= rain.clean - 1e-6).all()
        haze = Degraded(kinds=("haze",))[i]
        assert np.exp(-1.61) < _kept(haze) < np.exp(-0.59)
        for depth in haze.shapes.depth.unique():
            here = haze.shapes.depth == depth
            kept = (haze.image[:, here].std() / haze.clean[:, here].std()).item()
            assert -np.log(kept) / depth == pytest.approx(-np.log(_kept(haze)), rel=0.02)
        low = Degraded(kinds=("low resolution",))[i].image
        assert torch.equal(low[:, ::2, ::2], low[:, 1::2, 1::2])
        noise = Degraded(kinds=("noise",))[i]
        middle = (noise.clean > 0.3) & (noise.clean < 0.7)
        sigma = (noise.image - noise.clean)[middle].std().item() * 255
        assert min(abs(sigma - s) for s in (15, 25, 50)) < 5


def test_two_at_once() -> None:
    sample = Degraded(kinds=("rain", "haze"), at_once=(2, 2))[1]
    assert set(sample.masks) == {"rain", "haze"}
    hazy = sample.without["rain"]
    assert not torch.equal(hazy, sample.image)
    dry = ~sample.masks["rain"]
    assert torch.equal(hazy[:, dry], sample.image[:, dry])
    assert (sample.without["haze"][:, dry] == sample.clean[:, dry]).all()
    assert sample.sentence == "remove the haze and the rain"
