"""Shapes in signatures are checked while the tests run, and only then."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

TYPECHECKED = ["regard.ops", "regard.nn", "regard.layers", "regard.models"]
if os.environ.get("REGARD_TYPECHECK", "1") == "1":
    install_import_hook(TYPECHECKED, "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
