"""The claim runs."""

from regard.claims import rela


def test_smoke() -> None:
    rows = rela.run("smoke", 1)
    assert len(rows) == 10
    assert all(row.passed is not None for row in rows)
    assert rows[6].ours == 0.0
