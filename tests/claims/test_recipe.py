"""The shared recipe: images are moved, not changed; rates rise and fall; a small network learns."""

import torch
from torch import nn

from regard.claims import _recipe as recipe


def test_shifted_images_are_the_images_moved() -> None:
    x = torch.zeros(200, 2, 7, 9)
    x[:, 0, 3, 4], x[:, 1, 2, 4] = 1.0, 2.0
    moved = recipe.shifted(x, 2, torch.Generator().manual_seed(0))
    places = (moved[:, 0] == 1).nonzero()[:, 1:] - torch.tensor([3, 4])
    assert len(places) == 200
    assert places.abs().max() == 2
    assert len(places.unique(dim=0)) == 25
    torch.testing.assert_close((moved[:, 1] == 2).nonzero()[:, 1:], places + torch.tensor([2, 4]))


def test_the_edge_is_repeated() -> None:
    x = torch.arange(5.0).expand(50, 1, 5, 5)
    rows = recipe.shifted(x, 1, torch.Generator().manual_seed(0))[:, 0, 0].unique(dim=0).tolist()
    assert rows == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 4]]


def test_an_epoch_sees_each_image_once() -> None:
    x, y = torch.zeros(300, 1, 2, 2), torch.arange(300)
    batches = recipe.epochs(x, y, torch.Generator().manual_seed(0))
    first, second = (torch.cat([next(batches)[1] for _ in range(3)]) for _ in range(2))
    assert torch.equal(first.sort().values, y)
    assert torch.equal(second.sort().values, y)
    assert not torch.equal(first, second)


def test_train() -> None:
    """Learns a linear rule, stops after the steps, leaves evaluation mode, and batch norms know the data's mean."""
    generator, taken = torch.Generator().manual_seed(0), []

    def batches():  # type: ignore[no-untyped-def]
        while True:
            x = 3 + torch.randn(64, 4, generator=generator)
            taken.append(len(x))
            yield x, (x[:, 0] > x[:, 1]).long()

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.001), nn.Linear(4, 2))
    recipe.train(model, batches(), 60, lr=0.1)
    assert len(taken) == 60 + recipe.SETTLING
    assert not model.training
    torch.testing.assert_close(model[0].running_mean, torch.full((4,), 3.0), atol=0.1, rtol=0)
    assert recipe.accuracy(model, *next(batches())) > 95


def test_a_loss_of_ones_own() -> None:
    model = nn.Linear(2, 1, bias=False)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (model(x)[:, 0] - y).square().mean()

    x, y = torch.eye(2), torch.tensor([1.0, -1.0])
    recipe.train(model, iter([(x, y)] * 200), 200, lr=0.1, loss=loss)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.0, -1.0]]), atol=0.05, rtol=0)


def test_accuracy() -> None:
    logits = torch.eye(4)[[0, 1, 1, 3]]
    assert recipe.accuracy(nn.Identity(), logits, torch.tensor([0, 1, 2, 3])) == 75.0
