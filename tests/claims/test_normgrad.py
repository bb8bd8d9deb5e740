"""The claim runs, its images are what they say, and its measures are right."""

import torch

from regard.claims import normgrad as claim
from regard.worlds.digits import digits


def test_smoke() -> None:
    assert len(claim.run("smoke", 1)) == 6


def test_pairs() -> None:
    world, index = digits("test"), torch.arange(0, 1000, 25)
    images, masks = claim.pairs(world, index, torch.Generator().manual_seed(0))
    assert images.shape == (20, 1, 28, 56)
    for item, (left, right) in enumerate(zip(world.labels[index[:20]], world.labels[index[20:]], strict=True)):
        assert masks[item, left, :, :28].any()
        assert masks[item, right, :, 28:].any()
        shown = masks[item].flatten(1).any(1).nonzero()[:, 0]
        assert set(shown.tolist()) == {int(left), int(right)}
    assert images[:, 0][masks.any(1)].mean() > 1.4


def test_overlap_takes_the_fewest_pixels_that_hold_half_of_the_sum() -> None:
    saliency = torch.tensor([[5.0, 3.0], [1.0, 1.0]])
    assert claim.overlap(saliency, torch.tensor([[True, False], [False, False]])) == 1.0
    assert claim.overlap(saliency, torch.tensor([[True, True], [False, False]])) == 0.5
    assert claim.overlap(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]])) == 0.0


def test_the_gradient_at_the_last_block_differs_between_places() -> None:
    torch.manual_seed(0)
    model, kept = claim.network().eval(), []
    model[4].register_forward_hook(lambda module, args, out: kept.append(out))
    score = model(torch.randn(1, 1, 28, 56))[0, 3]
    (gradient,) = torch.autograd.grad(score, kept)
    assert gradient.flatten(2).std(2).max() > 1e-6
