"""A study's table: typed columns, rows as mappings, claims tried on them."""

import json

import pytest

from regard.studies.table import Table

ROWS = [{"arm": "a", "n": 1, "share": 0.5, "ok": True}, {"arm": "b", "n": 2, "share": 0.25, "ok": False}]


def test_build_and_read() -> None:
    claims = {
        "shares fall": lambda t: t.column("share")[0] > t.column("share")[1],
        "all ok": lambda t: all(t.column("ok")),
    }
    table = Table.build("Shares", ROWS, claims)
    assert list(table) == ROWS
    assert len(table) == 2
    assert table.claims == {"shares fall": True, "all ok": False}
    assert table.where(arm="b").column("n") == [2]
    assert len(table.where(arm="b", n=1)) == 0
    again = json.loads(json.dumps(table.to_json()))
    assert again["rows"] == [["a", 1, 0.5, True], ["b", 2, 0.25, False]]
    assert again["claims"] == table.claims
    shown = repr(table)
    assert all(word in shown for word in ("Shares", "arm", "0.25", "holds: shares fall", "fails: all ok"))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: Table.build("t", []), "rows is empty"),
        (lambda: Table.build("t", [{"a": 1}, {"b": 1}]), r"rows\[1\] has columns"),
        (lambda: Table.build("t", [{"a": 1}, {"a": 1.0}]), "expected a int"),
        (lambda: Table.build("t", [{"a": None}]), "column 'a' is None"),
        (lambda: Table("t", ("a", "b"), ((1,),)), "1 values for 2 columns"),
        (lambda: Table.build("t", ROWS).column("m"), "column 'm'"),
        (lambda: Table.build("t", ROWS).where(m=1), r"columns \['m'\]"),
    ],
)
def test_refuses(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
