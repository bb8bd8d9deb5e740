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
