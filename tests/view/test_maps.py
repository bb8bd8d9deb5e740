"""Where layers look: the weights are right, or not shown."""

import pytest
import torch
from torch import Tensor, nn

from regard.models import slot
from regard.models.slot import SlotNetwork
from regard.nn import Attention
from regard.view.maps import received, weights


def test_weights_of_attention() -> None:
    layer, x = Attention(8, 2).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    found = weights(layer, x, (2, 3))
    assert found is not None
    assert found.shape == (2, 2, 6, 6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 6, dtype=torch.float64))
    values = layer.project(x, x)[2]
    torch.testing.assert_close(layer.merge(found @ values), layer(x))


def test_weights_that_do_not_make_the_output_are_refused() -> None:
    class Odd(Attention):
        def forward(self, x: Tensor, *arguments: object, **options: object) -> Tensor:
            return super().forward(x.flip(1))

    assert weights(Odd(8, 2), torch.randn(1, 6, 8), (2, 3)) is None
    assert weights(nn.Linear(8, 8), torch.randn(1, 6, 8), (2, 3)) is None


def test_a_layer_may_say_its_weights_itself() -> None:
    class Says(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

        def weights(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
            return torch.full((1, 1, 4, 4), float(grid[1]))

    found = weights(Says(), torch.randn(1, 4, 8), (2, 2))
    assert found is not None
    assert (found == 2).all()


def test_received_attention_finds_the_token_all_look_at() -> None:
    network = SlotNetwork(slot.mixer("attention"), 3, (4, 6), dim=8, num_heads=2, depth=(1,), patch=2).eval()
    block = network.stages[0][0]
    with torch.no_grad():
        block.mixer.layer.q.weight.zero_()
        block.mixer.layer.q.bias.fill_(1.0)
        block.mixer.layer.k.weight.zero_()
        block.mixer.layer.k.weight[:, 0] = 4.0
    images = torch.randn(2, 1, 4, 6)
    hooks = len(block.mixer._forward_pre_hooks)
    found = received("attention", network, images)
    assert len(block.mixer._forward_pre_hooks) == hooks
    assert found is not None
    assert found.grid == (2, 3)
    x = block.norm1(network.stem(images).flatten(2).transpose(1, 2) + network.position)
    for values, tokens in zip(found.received, x):
        assert sum(values) / 6 == pytest.approx(1)
        assert values.index(max(values)) == tokens[:, 0].argmax().item()


@pytest.mark.parametrize("name", ["identity", "convolution"])
def test_without_weights(name: str) -> None:
    network = SlotNetwork(slot.mixer(name), 3, (4, 6), dim=8, num_heads=2, depth=(1,), patch=2).eval()
    assert received(name, network, torch.randn(1, 1, 4, 6)) is None
