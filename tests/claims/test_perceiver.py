"""The claim runs, and a permuted image with its own positions is the same image to the Perceiver."""

import torch

from regard.claims import perceiver as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 8


def test_permuted_pixels_carry_their_positions() -> None:
    x = torch.randn(3, 1, 14, 14)
    order = torch.randperm(196)
    plain, permuted = claim.Pixels(torch.arange(196)), claim.Pixels(order)
    permuted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(permuted(claim.shuffle(x, order)), plain(x), atol=1e-5, rtol=1e-5)


def test_images_of_one_seed() -> None:
    (x, y), (test, truth) = (claim.images(split, 3) for split in ("train", "test"))
    assert x.shape == (4000, 1, 14, 14)
    assert (len(y), len(test), len(truth)) == (4000, 1000, 1000)
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.2
