"""The claim runs, and compares networks of one size."""

from regard.claims import multi_query_attention as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 3
    assert all(row.passed is not None for row in rows)


def test_networks_have_nearly_one_size() -> None:
    sizes = [sum(p.numel() for p in claim.network(*form).parameters() if p.ndim > 1) for form in claim.FORMS.values()]
    assert len(set(sizes)) == 1
