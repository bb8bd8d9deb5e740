"""The claim runs, and its world is what it says."""

import torch

from regard.claims import moba


def test_smoke() -> None:
    rows = moba.run("smoke", 1)
    assert len(rows) == 4
    assert all(row.passed is not None for row in rows)


def test_sequences() -> None:
    tokens, wanted = moba.sequences(3, torch.Generator().manual_seed(0))
    assert tokens.shape == (3, moba.TOKENS)
    assert wanted.shape == (3, moba.TOKENS - 2 * moba.PAIRS)
    for row, answers in zip(tokens.tolist(), wanted.tolist()):
        keys, values = row[: 2 * moba.PAIRS : 2], row[1 : 2 * moba.PAIRS : 2]
        assert len(set(keys)) == len(set(values)) == moba.PAIRS
        known = dict(zip(keys, values))
        assert [known[key] - moba.SYMBOLS for key in row[2 * moba.PAIRS :]] == answers
