"""The claim runs, and its strings are what they say."""

import torch

from regard.claims import attention_flow as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 5
    assert rows[-1].passed is None


def test_the_noun_after_the_marker_has_the_number() -> None:
    tokens, number = claim.strings(100, torch.Generator().manual_seed(0))
    assert tokens.shape == (100, 15)
    assert (tokens[:, 0] == claim.CLASS).all()
    assert ((tokens == claim.MARKER).sum(1) == 1).all()
    marked = tokens[torch.arange(100), (tokens == claim.MARKER).int().argmax(1) + 1]
    assert torch.equal((marked - claim.FIRST_NOUN) // claim.NOUNS, number)
    nouns = (tokens >= claim.FIRST_NOUN) & (tokens < claim.FIRST_FILLER)
    assert (nouns.sum(1) == 3).all()


def test_spearman() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert abs(claim.spearman(a, a.exp()) - 1) < 1e-12
    assert abs(claim.spearman(a, -a) + 1) < 1e-12
    assert abs(claim.spearman(a, torch.tensor([[2.0, 1.0, 3.0, 4.0]])) - 0.8) < 1e-12


def test_blank_out_of_a_word_that_is_unknown_already_moves_nothing() -> None:
    torch.manual_seed(0)
    model = claim.Encoder(layers=1)
    tokens, labels = claim.strings(30, torch.Generator().manual_seed(1))
    moved = claim.blank_out(model, tokens, labels)
    assert moved.shape == (30, 14)
    unknown = tokens[:, 1:] == claim.UNKNOWN
    assert moved[unknown].max() < 1e-6
    assert moved[~unknown].median() > 1e-5
