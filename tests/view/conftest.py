"""One small comparison, run once, that several tests look at."""

from pathlib import Path

import pytest

from regard.view.compare import compare
from regard.view.comparison import Comparison


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(
        ["attention", "convolution"],
        "small-digits",
        out=tmp_path_factory.mktemp("compare") / "out",
        seeds=2,
        epochs=1,
        dim=8,
        depth=(1,),
        patch=2,
        sides=(14, 15, 16),
        workers=1,
        progress=False,
    )


@pytest.fixture(scope="session")
def out(comparison: Comparison) -> Path:
    return Path(comparison.info["out"])
