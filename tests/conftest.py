"""Shapes in signatures are checked while the tests run, and only then."""

import gc
import os
import sys
from types import ModuleType
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping

TYPECHECKED = [
    *("regard.ops", "regard.nn", "regard.layers", "regard.models", "regard.hosts.painter"),
    *("regard.worlds.shapes", "regard.worlds.rooms"),
]
# Called for every solid that a ray may meet, by functions that are checked.
INNERMOST = "regard.worlds.rooms.solids"


def names_a_shape(thing: Any) -> bool:
    """Whether an annotation of a function, or of a field of a class, says the shape of an array."""
    if thing.__module__ == INNERMOST:
        return False
    scope = getattr(thing, "__globals__", None) or vars(sys.modules[thing.__module__])
    for note in getattr(thing, "__annotations__", {}).values():
        try:
            found = repr(eval(note, scope) if isinstance(note, str) else note)
        except NameError:  # Imported for type checkers only.
            return True
        if "[Tensor," in found or "[ndarray," in found:
            return True
    return False


if os.environ.get("REGARD_TYPECHECK", "1") == "1":
    from beartype import BeartypeConf, beartype

    # The hook takes its decorator by name. An int is a float here, as it is for type checkers.
    tower = ModuleType("tower")
    tower.checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
    sys.modules["tower"] = tower
    # Types without shapes are the type checker's; looked at in every call they take a quarter of the time in `worlds.shapes`.
    jaxtyped = jaxtyping.jaxtyped
    jaxtyping.jaxtyped = lambda *, typechecker: (
        lambda thing: jaxtyped(thing, typechecker=typechecker) if names_a_shape(thing) else thing
    )
    jaxtyping.install_import_hook(TYPECHECKED, "tower.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

# ``torch.manual_seed`` would note down the whole stack, each time, for accelerators that are not there.
for absent in (torch.cuda, torch.mtia, torch.xpu):
    absent.manual_seed_all = lambda seed: None


# What is imported and collected stays until the end: it is not looked through whenever garbage is collected.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
