"""Contracts of objectives, studies and explainers, each on a healthy stand-in and on broken ones."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.checks.contract import CHECKS


class Loss(nn.Module):
    """Squared distance after a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def toy(self, seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(2, 5, 3, generator=generator)
        return ({"x": draw[0].clone().requires_grad_(), "y": draw[1]},)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": batch["x"] + 0.1, "y": batch["y"]}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return ((self.scale * batch["x"] - batch["y"]) ** 2).mean()


class NotScalar(Loss):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] - batch["y"]) ** 2


class InfiniteLoss(Loss):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (0.0 * batch["x"]).sum().log() + self.scale.sum()


class Flat(Loss):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch).detach() + 0.0 * batch["x"].sum()


class WrongWay(Loss):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().forward(batch)
        return 2 * loss.detach() - loss


class DropsInBoth(Loss):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward({**batch, "x": nn.functional.dropout(batch["x"])})


class WritesToBatch(Loss):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().forward(batch)
        batch["y"].zero_()
        return loss


class PreparesInPlace(Loss):
    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch["y"].add_(1.0)
        return batch


class Study:
    claims: ClassVar[dict[str, Any]] = {"deeper is larger": lambda table: table[1]["loss"] > table[0]["loss"]}

    def run(self, scale: str) -> list[dict[str, Any]]:
        assert scale == "toy"
        return [{"layer": "a", "depth": 1, "loss": 0.5}, {"layer": "b", "depth": 2, "loss": 0.7}]

    def plot(self, table: list[dict[str, Any]]) -> Any:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot([row["loss"] for row in table])
        return figure

    def finding(self, table: list[dict[str, Any]]) -> str:
        return f"Depth 2 has a loss of {table[1]['loss']}."


class DrawsNothing(Study):
    def plot(self, table: list[dict[str, Any]]) -> Any:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots()
        return figure


class SaysNothing(Study):
    def finding(self, table: list[dict[str, Any]]) -> str:
        return "Deeper is larger."


class Untyped(Study):
    def run(self, scale: str) -> list[dict[str, Any]]:
        return [{"loss": 0.5}, {"loss": "0.7"}]


class Ragged(Study):
    def run(self, scale: str) -> list[dict[str, Any]]:
        return [{"loss": 0.5}, {"lost": 0.7}]


class NotANumber(Study):
    def run(self, scale: str) -> list[dict[str, Any]]:
        return [{"loss": 0.5}, {"loss": float("nan")}]


class NoRows(Study):
    def run(self, scale: str) -> list[dict[str, Any]]:
        return []


class Untrue(Study):
    claims: ClassVar[dict[str, Any]] = {"smaller": lambda table: table[1]["loss"] < table[0]["loss"]}


class ClaimsNothing(Study):
    claims: ClassVar[dict[str, Any]] = {}


class Looks:
    """Where the class token looks in the last block."""

    claims = frozenset({"non-negative", "uniform"})
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def explain(self, evidence: Any) -> Tensor:
        row = list(evidence.items())[-1][1].weights().mean(1)[:, 0]
        return self.change(row)

    def change(self, row: Tensor) -> Tensor:
        return row


class NoGrid(Looks):
    def change(self, row: Tensor) -> Tensor:
        return row[:, 1:]


class Centred(Looks):
    def change(self, row: Tensor) -> Tensor:
        return row - row.mean()


class Ramp(Looks):
    def change(self, row: Tensor) -> Tensor:
        return row * torch.arange(13.0)


class OneGrid(Looks):
    def change(self, row: Tensor) -> Tensor:
        return row[:, 1:].unflatten(1, (3, 4))


class FirstItem(Looks):
    def change(self, row: Tensor) -> Tensor:
        return row[:1].expand_as(row)


class AlwaysTheCentre(Looks):
    def change(self, row: Tensor) -> Tensor:
        return 1.0 * (torch.arange(13) == 6)[None]


class Restless(Looks):
    calls = 0

    def change(self, row: Tensor) -> Tensor:
        Restless.calls += 1
        return row * Restless.calls


class Visits(Looks):
    """Does something to the model before the map is made."""

    needs = frozenset({"features"})

    def layers(self, model: Any) -> dict[str, nn.Module]:
        self.visit(model)
        return {"head": model.head}

    def visit(self, model: Any) -> None: ...

    def explain(self, evidence: Any) -> Tensor:
        return torch.zeros(1, 3, 4)


class LeavesHooks(Visits):
    def visit(self, model: Any) -> None:
        model.head.register_forward_hook(lambda *_: None)


class LeavesGradients(Visits):
    def visit(self, model: Any) -> None:
        model.head.bias.grad = torch.ones(5)


class LeavesHooksOnFailure(Visits):
    """Takes its hook away when the map is made, which a failure prevents."""

    def visit(self, model: Any) -> None:
        self.hook = model.head.register_forward_hook(lambda *_: None)

    def explain(self, evidence: Any) -> Tensor:
        self.hook.remove()
        return super().explain(evidence)


class LeavesTraining(Visits):
    def visit(self, model: Any) -> None:
        model.train()


class Steps(Visits):
    def visit(self, model: Any) -> None:
        model.head.bias.data += 0.1


@pytest.mark.parametrize(("kind", "target"), [("objective", Loss), ("study", Study), ("explainer", Looks)])
def test_healthy_ones_pass(kind: Any, target: Any) -> None:
    report = regard.check(target, kind=kind)
    report.raise_for_failures()
    own = {name for name, c in CHECKS.items() if c.kinds == (kind,)}
    assert own <= {r.check for r in report if r.outcome == "passed"}


BROKEN: list[tuple[Any, Any, str, str]] = [
    ("objective", NotScalar, "objective_is_a_finite_scalar", "expected a scalar"),
    ("objective", InfiniteLoss, "objective_is_a_finite_scalar", "not finite"),
    ("objective", Flat, "objective_is_a_finite_scalar", "zero everywhere"),
    ("objective", WrongWay, "objective_falls_along_its_gradient", "after steps"),
    ("objective", DropsInBoth, "objective_is_a_function", "train and eval"),
    ("objective", WritesToBatch, "objective_is_a_function", "written to"),
    ("objective", PreparesInPlace, "objective_prepare", "prepare wrote"),
    ("study", Untyped, "study_table_is_typed", "is str, row 0 has float"),
    ("study", Ragged, "study_table_is_typed", "columns ['lost']"),
    ("study", NotANumber, "study_table_is_typed", "is nan"),
    ("study", NoRows, "study_table_is_typed", "empty"),
    ("study", Untrue, "study_claims_hold", "['smaller']"),
    ("study", DrawsNothing, "is_drawn_and_said", "drew nothing"),
    ("study", SaysNothing, "is_drawn_and_said", "expected figures"),
    ("study", ClaimsNothing, "study_claims_hold", "claims nothing"),
    ("explainer", NoGrid, "map_is_on_the_grid", "expected (..., 3, 4)"),
    ("explainer", Restless, "map_is_on_the_grid", "gives another map"),
    ("explainer", Centred, "map_is_not_negative", "lowest value is -"),
    ("explainer", AlwaysTheCentre, "map_depends_on_the_parameters", "same map"),
    ("explainer", Ramp, "uniform_weights_give_a_uniform_map", "varies by"),
    (
        "explainer",
        OneGrid,
        "map_on_other_hosts",
        "torch's transformer encoder: map of shape (2, 3, 4), expected (2, 2, 6)",
    ),
    ("explainer", FirstItem, "map_on_other_hosts", "two images, one map"),
    ("explainer", LeavesHooks, "explainer_leaves_nothing_behind", "head: hooks"),
    ("explainer", LeavesHooksOnFailure, "explainer_leaves_nothing_behind", "a model that failed"),
    ("explainer", LeavesGradients, "explainer_leaves_nothing_behind", "head.bias: gradient"),
    ("explainer", LeavesTraining, "explainer_leaves_nothing_behind", "head: training"),
    ("explainer", Steps, "explainer_leaves_nothing_behind", "head.bias: sum"),
]


@pytest.mark.parametrize(("kind", "target", "check", "says"), BROKEN)
def test_broken_ones_are_rejected(kind: Any, target: Any, check: str, says: str) -> None:
    (result,) = regard.check(target, kind=kind, only=check)
    assert result.outcome == "failed", result
    assert says in result.reason


def test_slow_studies_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.checks.study.SECONDS", -1.0)
    (result,) = regard.check(Study, kind="study", only="study_is_quick")
    assert "allowed -1" in result.reason


def test_every_check_of_these_kinds_rejects_something() -> None:
    own = {
        name for name, c in CHECKS.items() if len(c.kinds) == 1 and c.kinds[0] in ("objective", "study", "explainer")
    }
    assert {check for _, _, check, _ in BROKEN} | {"study_is_quick"} == own
