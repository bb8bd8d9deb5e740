"""The claim runs, and its errors are those of the study."""

import pytest

from regard.claims import random_feature_attention_study as claim
from regard.studies import random_feature_attention_study as study


def test_smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TESTED", 50)
    rows = claim.run("smoke", 1)
    assert [row.passed is None for row in rows] == [False] * 7 + [True] * 2 + [False] * 2 + [True] * 9


def test_errors_are_those_of_the_study() -> None:
    table = study.RandomFeatureAttentionStudy().run()
    found = claim.errors(8, (200, 800), [0], tuple(study.TARGETS))
    assert len(found) == len(table)
    for row in table:
        assert found[row["target"], row["model"], row["samples"]] == [row["error"]]
