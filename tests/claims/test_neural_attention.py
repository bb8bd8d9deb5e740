"""The claim runs."""

from regard.claims import neural_attention


def test_smoke() -> None:
    rows = neural_attention.run("smoke", 1)
    assert len(rows) == 3
    assert all(row.passed is not None for row in rows)
    assert 0.9 < rows[2].ours <= 1.0
