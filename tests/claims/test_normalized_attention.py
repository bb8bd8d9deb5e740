"""The claim runs, and its networks see what they should."""

import torch

from regard.claims import normalized_attention as claim
from regard.studies.normalized_attention import BLOCKS


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 2 * 8 + 6
    assert sum(row.passed is not None for row in rows) == 2 * 2 + 6
    assert all(row.passed for row in rows[-6:])


def test_only_the_cases_know_of_places() -> None:
    torch.manual_seed(1)
    tokens = torch.randint(10, (1, claim.LENGTH))
    turned = tokens[:, [0, *range(15, 0, -1)]]
    for task, same in (("mode", True), ("cases", False)):
        network = claim.Network(task, BLOCKS["normalized"], 32, 4)
        with torch.no_grad():
            for p in network.parameters():
                p += 0.1 * torch.randn_like(p)
            assert torch.allclose(network(turned)[:, 0], network(tokens)[:, 0], atol=1e-6) == same
