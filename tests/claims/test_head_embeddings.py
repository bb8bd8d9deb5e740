"""The claim runs, and its single head is one."""

import torch

from regard.claims import head_embeddings as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 7
    assert sum(row.passed is not None for row in rows) == 3


def test_the_single_head_stays_one() -> None:
    layer = claim.single_head()
    x = torch.randn(1, 5, claim.DIM)
    q, k, v = layer.project(x, x)
    heads = layer.attend(q, k, v, None)
    torch.testing.assert_close(heads, heads[:, :1].expand_as(heads))
    layer(x).sum().backward()
    assert layer.q_embed.grad is None
    assert {"q.weight", "k.weight", "v.weight"} <= {n for n, p in layer.named_parameters() if p.grad is not None}


def test_weights_are_those_of_the_layers() -> None:
    counts = {
        form: sum(p.numel() for n, p in claim.FORMS[form]().named_parameters() if n[0] in "qkv" and p.ndim == 2)
        for form in ("multi-head", "multiplied")
    }
    assert counts["multiplied"] / counts["multi-head"] == claim.run("smoke", 1)[-1].ours
