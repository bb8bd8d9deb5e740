"""The claim runs."""

from regard.claims import dynamic_convolution


def test_smoke() -> None:
    rows = dynamic_convolution.run("smoke", 1)
    assert len(rows) == 7
    assert all(row.passed is not None for row in rows)
    assert all(1.0 < row.ours < 9.0 for row in rows[:4])
