"""Rotary positions on a layer that has none of its own."""

import torch

from regard.nn import Attention, Rotary
from regard.ops.positions import rotary_angles


def layer(**more: object) -> Attention:
    torch.manual_seed(0)
    made = Attention(dim=24, num_heads=3, **more).double()  # type: ignore[arg-type]
    made.rotary = Rotary(rotary_angles(torch.ones((), dtype=torch.float64), 8))
    return made


def test_scores_depend_on_distance_only() -> None:
    turn = Rotary(rotary_angles(torch.ones((), dtype=torch.float64), 8))
    q, k = torch.randn(2, 1, 3, 5, 8, dtype=torch.float64)
    here = turn(q) @ turn(k).mT
    there = turn(q, 91) @ turn(k, 91).mT
    assert torch.allclose(here, there, atol=1e-12)
    assert not torch.allclose(here, q @ k.mT, atol=1e-3)


def test_decoding_with_a_cache_equals_the_whole() -> None:
    causal = layer(causal=True)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    cache = causal.new_cache(2, 9, dtype=torch.float64)
    steps = torch.cat([causal(part, cache=cache) for part in x.split([4, 1, 3, 1], 1)], 1)
    assert torch.allclose(steps, causal(x), atol=1e-12)


def test_order_matters_with_it_and_not_without() -> None:
    turned = layer()
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.allclose(turned(x)[:, order], turned(x[:, order]), atol=1e-4)
    turned.rotary = None
    assert torch.allclose(turned(x)[:, order], turned(x[:, order]), atol=1e-12)
