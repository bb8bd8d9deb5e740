"""One small comparison, run once, that several tests look at."""

from pathlib import Path

import pytest

from regard.view.compare import compare
from regard.view.comparison import Comparison

LAYERS = ["attention", "convolution"]
SMALL = {"seeds": 2, "epochs": 1, "dim": 8, "depth": (1,), "patch": 2, "sides": (14, 15, 16), "workers": 2, "progress": False}


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("compare") / "out"
    return compare(LAYERS, "small-digits", out=out, **SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def out(comparison: Comparison) -> Path:
    return Path(comparison.info["out"])
