"""What every objective must hold.

``objective.toy(seed)`` gives the arguments of one call: a small batch, and a capture where it needs one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import Method
from regard.checks.contract import Skip, contract
from regard.checks.samples import descends, finite, same, tensors_in


def _made(method: Method) -> Any:
    torch.manual_seed(0)
    objective = method.create(**method.example)
    assert isinstance(objective, nn.Module), f"create returned {type(objective).__name__}, expected a torch.nn.Module"
    return objective


def _value(objective: nn.Module, given: Any) -> Tensor:
    torch.manual_seed(0)
    return objective(*given)


def _leaves(objective: nn.Module, given: Any) -> list[Tensor]:
    return [t for t in (*objective.parameters(), *tensors_in(given)) if t.requires_grad and t.is_leaf]


@contract("objective")
def check_objective_is_a_finite_scalar(method: Method) -> None:
    """One finite number, whose gradient reaches something and is finite, on three random batches."""
    objective = _made(method)
    for seed in range(3):
        given = objective.toy(seed)
        value, leaves = _value(objective, given), _leaves(objective, given)
        assert value.shape == (), f"shape {tuple(value.shape)}, expected a scalar"
        finite(value, "objective")
        assert leaves, "nothing in the batch and no parameter of the objective requires a gradient"
        grads = [g for g in torch.autograd.grad(value, leaves, allow_unused=True) if g is not None]
        for g in grads:
            finite(g, "gradient")
        assert any(g.any() for g in grads), "the gradient is zero everywhere"


@contract("objective")
def check_objective_falls_along_its_gradient(method: Method) -> None:
    """Some small step against the gradient lowers it."""
    objective = _made(method)
    given = objective.toy(0)
    descends(lambda: _value(objective, given), _leaves(objective, given))


@contract("objective", random=False)
def check_objective_is_a_function(method: Method) -> None:
    """``train`` and ``eval`` give one value, twice, and leave the batch alone."""
    objective = _made(method)
    given = objective.toy(0)
    before = [t.detach().clone() for t in tensors_in(given)]
    values = [objective.train(mode)(*given) for mode in (True, False, True)]
    for old, new in zip(before, tensors_in(given)):
        assert torch.equal(old, new), "the batch was written to"
    for value in values[1:]:
        same(value, values[0], "value in train and eval", 0.0)


@contract("objective")
def check_objective_prepare(method: Method) -> None:
    """``prepare`` makes a batch that the objective takes, and leaves the one it got alone."""
    objective = _made(method)
    if not hasattr(objective, "prepare"):
        raise Skip("has no prepare")
    batch, *rest = objective.toy(0)
    before = [t.detach().clone() for t in tensors_in(batch)]
    torch.manual_seed(0)
    finite(_value(objective, (objective.prepare(batch), *rest)), "objective of the prepared batch")
    for old, new in zip(before, tensors_in(batch)):
        assert torch.equal(old, new), "prepare wrote to the batch"
