"""Local attention against a loop, and the study's table."""

from __future__ import annotations

import math

import pytest
import torch

from regard.studies.attention_survey import TOY, AttentionSurvey, local_weights
from regard.studies.table import Table


def naive(scores: torch.Tensor, centre: torch.Tensor, half_width: int) -> torch.Tensor:
    out = torch.zeros_like(scores)
    for b in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            p = centre[b, i].item()
            window = [s for s in range(scores.shape[2]) if p - half_width <= s <= p + half_width]
            total = sum(math.exp(scores[b, i, s]) for s in window)
            for s in window:
                gauss = math.exp(-((s - p) ** 2) / (2 * (half_width / 2) ** 2))
                out[b, i, s] = math.exp(scores[b, i, s]) / total * gauss
    return out


@pytest.mark.parametrize("half_width", [1, 2, 5])
def test_local_attention_is_the_formula(half_width: int) -> None:
    scores, centre = torch.randn(2, 4, 9, dtype=torch.float64), 8 * torch.rand(2, 4, dtype=torch.float64)
    scores.requires_grad_()
    found = local_weights(scores, centre, half_width)
    torch.testing.assert_close(found, naive(scores.detach(), centre, half_width), rtol=0, atol=1e-12)
    assert (found.sum(-1) < 1).all()
    assert torch.autograd.gradcheck(lambda z, p: local_weights(z, p, half_width), (scores, centre.requires_grad_()))


def test_local_attention_in_the_limits() -> None:
    scores = torch.randn(1, 3, 7, dtype=torch.float64)
    centre = torch.tensor([[0.0, 3.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(local_weights(scores, centre, 10**6), scores.softmax(-1), rtol=0, atol=1e-10)
    narrow = local_weights(torch.zeros_like(scores), centre, 1)[0, 1]
    edge = math.exp(-2) / 3
    assert narrow.tolist() == pytest.approx([0, 0, edge, 1 / 3, edge, 0, 0])
    # Nothing stands in the window.
    assert not local_weights(scores, centre + 40, 2).any()


@pytest.mark.parametrize(
    ("centre", "half_width", "message"),
    [((1, 3), 0, "half_width=0 must be at least 1"), ((1, 4), 2, r"centre must be \(1, 3\), one place a query")],
)
def test_local_attention_refuses(centre: tuple[int, ...], half_width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_weights(torch.zeros(1, 3, 7), torch.zeros(centre), half_width)


@pytest.fixture(scope="module")
def table() -> Table:
    return AttentionSurvey().run()


def test_hand_labelled_papers_are_measured_as_labelled(table: Table) -> None:
    def measured(layer: str, facet: str) -> tuple[str, str]:
        (row,) = table.where(layer=layer, facet=facet)
        return str(row["declared"]), str(row["verdict"])

    assert measured("multi-query-attention", "distribution") == ("softmax", "agrees")
    assert measured("multi-query-attention", "cost") == ("N2", "agrees")
    assert measured("multi-query-attention", "state") == ("kv_reduced", "agrees")
    assert measured("moba", "support") == ("topk", "agrees")
    assert measured("moba", "positions") == ("hard", "agrees")
    assert measured("moba", "cost") == ("NK", "agrees")
    assert measured("cbam", "distribution") == ("sigmoid", "agrees")
    assert measured("cbam", "aggregate") == ("gated_elementwise", "agrees")
    assert measured("rela", "distribution") == ("relu", "agrees")
    (slots,) = table.where(layer="slot-attention", facet="distribution")
    assert str(slots["measured"]).startswith("sums to 1 over queries")


def test_the_table(table: Table) -> None:
    assert all(table.claims.values())
    assert tuple(dict.fromkeys(table.column("layer"))) == TOY
    assert len(table) == 10 * len(TOY)


def test_finding_counts(table: Table) -> None:
    rows = [
        {"layer": "a", "facet": f, "declared": "", "verdict": v, "measured": ""}
        for f, v in (("cost", "agrees"), ("state", "agrees"), ("support", "contradicts"), ("axis", "not measured"))
    ]
    said = AttentionSurvey().finding(Table.build("", rows))
    assert said == (
        "Of 4 facets of 1 layers, 2 agree with what is measured, 1 contradict it and 1 could not be measured."
    )
    assert "0 contradict it" in AttentionSurvey().finding(table)


def test_plot(table: Table) -> None:
    (axes,) = AttentionSurvey().plot(table).axes
    grid = axes.images[0].get_array()
    assert grid.shape == (len(set(table.column("layer"))), 10)
    assert (grid == 2).sum() == table.column("verdict").count("not measured")
    assert not (grid == 1).any()


def test_bad_scale() -> None:
    with pytest.raises(ValueError, match="scale='big' must be 'toy' or 'full'"):
        AttentionSurvey().run("big")
