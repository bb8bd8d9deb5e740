"""Blocks and tasks of the study against their definitions, and the study itself."""

import pytest
import torch
import torch.nn.functional as F

from regard.nn import Attention
from regard.studies.normalized_attention import (
    BLOCKS,
    MaxPooling,
    NormalizedAttentionGeometry,
    SumPooling,
    cases,
    initialise,
    mode,
    slope,
)


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_changes_no_block(name: str) -> None:
    block = initialise(BLOCKS[name](12, 3), 0.3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    padded = torch.cat([x, 9 * torch.randn(2, 3, 12, dtype=torch.float64)], 1)
    mask = (torch.arange(8) < 5).expand(2, -1)
    if name == "none":
        # Its scale is the number of keys, masked or not, as in the official code.
        assert not torch.allclose(block(padded, mask)[:, :5], block(x))
    else:
        torch.testing.assert_close(block(padded, mask)[:, :5], block(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["normalized", "softmax", "sum"])
def test_the_papers_block(name: str) -> None:
    block = initialise(BLOCKS[name](12, 3), 0.3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    first, second = block.mlp[0], block.mlp[-1]
    middle = x + F.layer_norm(block.pooling(x), (12,), eps=1e-3)
    hidden = F.gelu(F.layer_norm(first(middle), (first.out_features,), eps=1e-3), approximate="tanh")
    torch.testing.assert_close(block(x), middle + F.layer_norm(second(hidden), (12,), eps=1e-3), rtol=0, atol=1e-12)


def test_attentions_in_the_block() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    softmax, raw = (BLOCKS[name](12, 3).double().pooling for name in ("softmax", "none"))
    q, k, v = softmax.project(x, x)
    heads = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    hidden = F.gelu(F.layer_norm(heads, (12,), eps=1e-3), approximate="tanh")
    torch.testing.assert_close(softmax(x), softmax.out[-1](hidden), rtol=0, atol=1e-12)
    q, k, v = raw.project(x, x)
    heads = (q @ k.transpose(-1, -2) / 2 @ v / 5**0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(raw(x), raw.out[-1](F.gelu(heads, approximate="tanh")), rtol=0, atol=1e-12)


def test_pooling_over_all_tokens() -> None:
    x = torch.tensor([[[1.0, -5.0], [2.0, -7.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    assert SumPooling()(x, mask=mask).tolist() == [[[3.0, -12.0]]]
    assert MaxPooling()(x, mask=mask).tolist() == [[[2.0, -5.0]]]
    sizes = {name: sum(p.numel() for p in block(128, 4).parameters()) for name, block in BLOCKS.items()}
    assert sizes["sum"] == sizes["max"] == pytest.approx(sizes["normalized"], rel=0.01)
    assert isinstance(BLOCKS["bert"](128, 4).pooling, Attention)


def test_mode() -> None:
    tokens, label = mode(300, 9, torch.Generator().manual_seed(0), vocabulary=4)
    for row, want in zip(tokens.tolist(), label.tolist()):
        assert want == min(range(4), key=lambda t: (-row.count(t), t))


def test_cases() -> None:
    tokens, target, case = cases(500, 40, torch.Generator().manual_seed(0), vocabulary=70)
    assert case.unique().tolist() == [0, 1, 2]
    for row, at, which in zip(tokens.tolist(), target.tolist(), case.tolist()):
        if 64 in row:
            assert (which, at) == (0, row.index(min(row)))
        elif 50 in row:
            assert (which, at) == (1, 0)
        else:
            assert (which, at) == (2, row.index(max(row)))


def test_study() -> None:
    study = NormalizedAttentionGeometry()
    table = study.run()
    assert table.claims == dict.fromkeys(study.claims, True)
    # 1 / sqrt(n) and sqrt(n) are what random numbers of this width give, measured apart from this code.
    bert, ours = table.where(block="bert"), table.where(block="normalized")
    assert bert.column("aggregate") == pytest.approx([0.483, 0.278, 0.140, 0.072], rel=0.05)
    assert [s / n**0.5 for s, n in zip(ours.column("aggregate"), ours.column("tokens"))] == pytest.approx(
        [0.99] * 4, abs=0.02
    )
    flat = table.build("broken", [{**row, "aggregate": 1.0} for row in table])
    assert [holds(flat) for holds in study.claims.values()] == [False, False, True, True, True]


def test_slope() -> None:
    assert slope([2, 4, 16], [6.0, 12.0, 48.0]) == pytest.approx(1.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="vocabulary=64"):
        cases(1, 4, torch.Generator(), vocabulary=64)
    with pytest.raises(ValueError, match="scale='huge'"):
        NormalizedAttentionGeometry().run("huge")
