"""The claim runs, and usage counts picks."""

import torch

from regard.claims import moh as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 6
    assert sum(row.passed is not None for row in rows) == 4


def test_usage() -> None:
    model, pixels = claim.Reader(2), torch.randn(4, 1, 8, 8)
    router = model.blocks[0].attention.router
    router.weight.data.zero_()
    # Equal shares go to the first two of six heads: 64 picks each, none of the others.
    assert claim.usage(model, pixels) == 64.0
    assert claim.usage(claim.Reader(None), pixels) == 1.0
    assert not model.blocks[0].attention._forward_pre_hooks


def test_forms_differ_in_attention_alone() -> None:
    names = [{n for n, _ in claim.Reader(form.active).named_parameters()} for form in claim.FORMS.values()]
    routers = {f"blocks.{i}.attention.{n}.weight" for i in range(2) for n in ("router", "share", "balance")}
    assert names[1] - names[0] == routers
    assert names[1] == names[2] == names[3]
