"""The contract of models, on healthy stand-ins and on broken ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard as rg
from regard.checks.contract import CHECKS

SMALL = {"dim": 8}


class Net(nn.Module):
    """Two convolutions and a mean over places."""

    def __init__(self, dim: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.stem, self.conv = nn.Conv2d(3, dim, 4, 4), nn.Conv2d(dim, dim, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(dim), nn.Linear(dim, 5)

    def forward(self, image: Tensor) -> Any:
        x = self.norm(F.gelu(self.conv(self.stem(image))))
        return self.head(F.dropout(x.mean((2, 3)), self.dropout, self.training))


class Set(nn.Module):
    """Entries of a grid, with their row added; two outputs by name."""

    def __init__(self, input_dim: int, dim: int = 32) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(input_dim, dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> dict[str, Tensor]:
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"grid={grid} does not hold {x.shape[1]} entries")
        row = torch.arange(x.shape[1], dtype=x.dtype, device=x.device) // grid[1]
        features = (self.proj(x) + row[:, None]).tanh()
        return {"features": features, "logits": self.head(features.mean(1))}


class Words(nn.Module):
    """Token ids in, logits out: takes neither an image nor vectors."""

    def __init__(self, vocabulary: int = 50, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).cumsum(1))


def ids(batch: int, seed: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(9, (batch, 6), generator=torch.Generator().manual_seed(seed))}


class SquareOnly(Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2)
        side = int(x.shape[-1] ** 0.5)
        return self.head(x.view(*x.shape[:2], side, side).mean((2, 3)))


class GuessesGrid(Set):
    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> dict[str, Tensor]:
        return super().forward(x, grid=(1, x.shape[1]))


class Overflows(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) / (0.0 * image.sum())


class SumsTheBatch(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).sum(0)


class Float32Out(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).float()


class SaysNothing(Net):
    def forward(self, image: Tensor) -> None: ...


class DropsInEval(Net):
    def forward(self, image: Tensor) -> Tensor:
        return F.dropout(super().forward(image), self.dropout)


class BatchStatistics(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image - image.mean((0, 2, 3), keepdim=True))


class DeadParameter(Net):
    def __init__(self, dim: int = 64) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(()))


class HiddenProjection(Net):
    """A random matrix that no state dict holds."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__(dim)
        self.register_buffer("mixing", torch.randn(3, 3), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(torch.einsum("bchw,ck->bkhw", image, self.mixing))


class KeepsFeatures(Net):
    def forward(self, image: Tensor) -> Tensor:
        self.features = self.stem(image)
        return super().forward(image)


class NormalizesInPlace(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.sub_(0.5))


class TableOnCPU(Net):
    def __init__(self, dim: int = 64) -> None:
        super().__init__(dim)
        self.register_buffer("table", torch.zeros(dim, device="cpu"))


class SmallByDefault(Net):
    def __init__(self, dim: int = 4) -> None:
        super().__init__(dim)


# class, example, inputs
HEALTHY: list[tuple[Any, dict[str, Any], Any]] = [(Net, SMALL, None), (Set, {"input_dim": 3, "dim": 8}, None)]
HEALTHY += [(Words, {"vocabulary": 9, "dim": 8}, ids)]
BROKEN: list[tuple[Any, str, str]] = [
    (SquareOnly, "model_sizes_are_not_guessed", "RuntimeError"),
    (GuessesGrid, "model_sizes_are_not_guessed", "give one result"),
    (Overflows, "model_runs", "not finite"),
    (SumsTheBatch, "model_runs", "for a batch of 1"),
    (Float32Out, "model_runs", "float64 in, torch.float32 out"),
    (SaysNothing, "model_runs", "without a tensor"),
    (DropsInEval, "model_eval_is_deterministic", "second call"),
    (BatchStatistics, "model_rows_are_independent", "row 0 after row 1 was changed"),
    (DeadParameter, "model_parameters_have_gradients", "['scale']"),
    (HiddenProjection, "model_restored", "after state dict"),
    (KeepsFeatures, "model_leaves_nothing_behind", "features"),
    (NormalizesInPlace, "model_leaves_nothing_behind", "image was written to"),
    (TableOnCPU, "model_full_size", "table was made on cpu"),
    (SmallByDefault, "model_full_size", "the example"),
]


@pytest.mark.parametrize(("target", "example", "inputs"), HEALTHY)
def test_healthy_ones_pass(target: Any, example: dict[str, Any], inputs: Any) -> None:
    report = rg.check(target, kind="model", example=example, inputs=inputs)
    report.raise_for_failures()
    own = {name for name, c in CHECKS.items() if c.kinds == ("model",)}
    ran = {r.check for r in report if r.outcome == "passed"}
    assert own - ran == (set() if inputs is None else {"model_sizes_are_not_guessed"})


@pytest.mark.parametrize(("target", "check", "says"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_broken_ones_are_rejected(target: Any, check: str, says: str) -> None:
    example = {"input_dim": 3, "dim": 8} if issubclass(target, Set) else SMALL
    (result,) = rg.check(target, kind="model", example=example, only=check)
    assert result.outcome == "failed", result
    assert says in result.reason


def test_every_check_rejects_something() -> None:
    own = {name for name, c in CHECKS.items() if c.kinds == ("model",)}
    assert {check for _, check, _ in BROKEN} == own


def test_a_model_that_says_nothing_of_its_inputs_is_told_so() -> None:
    (result,) = rg.check(Words, kind="model", only="model_runs")
    assert "the record needs inputs=" in result.reason


def test_sides_are_multiples_where_that_is_tagged() -> None:
    class Strict(Net):
        def forward(self, image: Tensor) -> Tensor:
            if any(side % 32 for side in image.shape[2:]):
                raise ValueError(f"image must have sides that are multiples of 32; got {tuple(image.shape[2:])}")
            return super().forward(image)

    for multiple, outcome in ((1, "failed"), (32, "passed")):
        tags = rg.Tags(multiple=multiple)
        (result,) = rg.check(Strict, kind="model", example=SMALL, tags=tags, only="model_sizes_are_not_guessed")
        assert result.outcome == outcome
