"""What can be trained by name: one file a recipe, named after it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

if TYPE_CHECKING:
    from torch import nn

    from regard.train.loop import Recipe, Task


class Trainable(Protocol):
    """A frozen dataclass of settings, ``recipe`` and ``seed`` among them; its docstring says data and limits."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def seed(self) -> int: ...

    def network(self) -> nn.Module:
        """The untrained model, its initial values drawn from ``seed``."""
        ...

    def start(self) -> nn.Module:
        """The model that training starts from: the trained one called ``begin``, where a recipe has that setting, or none."""
        from regard.train.pretrained import pretrained

        begin = getattr(self, "begin", "")
        return pretrained(begin) if begin else self.network()

    def task(self) -> Task: ...


def names() -> list[str]:
    """All recipes."""
    folder = Path(__file__).parent
    return sorted(p.stem.replace("_", "-") for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load(name: str, settings: Mapping[str, Any] | None = None) -> Trainable:
    """The recipe called ``name``, with ``settings`` in the place of its defaults.

    Args:
        name: one of :func:`names`.
        settings: fields of the recipe or of its optimiser's :class:`Recipe`, as values or as text.

    Raises:
        ValueError: an unknown recipe or setting (with those that there are), a text that is no such value.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise ValueError(f"recipe={name!r} is not known; nearest: {', '.join(near)}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    trainable = module.RECIPE()
    own = [f.name for f in fields(trainable) if f.name != "recipe"]
    shared = [f.name for f in fields(trainable.recipe)]
    for key, value in (settings or {}).items():
        if key in own:
            trainable = replace(trainable, **{key: _read(trainable, key, value)})
        elif key in shared:
            trainable = replace(
                trainable, recipe=replace(trainable.recipe, **{key: _read(trainable.recipe, key, value)})
            )
        else:
            raise ValueError(f"{key!r} is no setting of {name}; there are {', '.join([*own, *shared])}")
    return trainable


def settings_of(trainable: Trainable) -> dict[str, Any]:
    """All settings, flat, as :func:`load` takes them."""
    facts = asdict(trainable)  # type: ignore[call-overload]
    return facts | facts.pop("recipe")


def _read(owner: Any, key: str, value: Any) -> Any:
    kind = get_type_hints(type(owner))[key]
    if not isinstance(value, str) or kind is str:
        return value
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{key}={value!r} is not of type {kind.__name__}") from None
