"""Shapes in signatures are checked while the tests run, and only then."""

import gc
import os
import sys
from types import ModuleType

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

TYPECHECKED = [
    *("regard.ops", "regard.nn", "regard.layers", "regard.models", "regard.hosts.painter"),
    *("regard.worlds.shapes", "regard.worlds.rooms"),
]
if os.environ.get("REGARD_TYPECHECK", "1") == "1":
    from beartype import BeartypeConf, beartype

    # The hook takes its decorator by name. An int is a float here, as it is for type checkers.
    tower = ModuleType("tower")
    tower.checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
    sys.modules["tower"] = tower
    install_import_hook(TYPECHECKED, "tower.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

# ``torch.manual_seed`` would note down the whole stack, each time, for accelerators that are not there.
for absent in (torch.cuda, torch.mtia, torch.xpu):
    absent.manual_seed_all = lambda seed: None


def pytest_collection_finish() -> None:
    """What stays until the end is not looked through again whenever garbage is collected."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
