"""Organs are apart and in their places, the target is known by its place only."""

import numpy as np

from regard.worlds.shapes.organs import PLACES, Organs

SAMPLES = [Organs()[i] for i in range(20)]


def test_four_organs_in_their_places() -> None:
    for sample in SAMPLES:
        assert set(sample.organs.unique().tolist()) == {0, 1, 2, 3, 4}
        for number, (x, y) in enumerate(PLACES, 1):
            where = (sample.organs == number).nonzero().float().mean(0) / 96
            assert abs(where[0] - y) < 0.1
            assert abs(where[1] - x) < 0.1
            assert 0.02 < (sample.organs == number).float().mean() < 0.08


def test_the_target_lies_between_organs_one_and_three_and_looks_like_its_likes() -> None:
    inside, beside = [], []
    for sample in SAMPLES:
        y, x = sample.target.nonzero().float().mean(0) / 96
        assert x < 0.42
        assert 0.42 < y < 0.62
        assert 0.004 < sample.target.float().mean() < 0.02
        assert not (sample.target & sample.lookalikes).any()
        inside.append(sample.image[0, sample.target].mean())
        beside.append(sample.image[0, sample.lookalikes].mean())
    assert abs(np.mean(inside) - np.mean(beside)) < 0.03


def test_contrast_is_low_but_there() -> None:
    gaps = [(s.image[0, s.organs > 0].mean() - s.image[0, 40:56, 46:50].mean()).item() for s in SAMPLES]
    assert 0.02 < np.mean(gaps) < 0.2
