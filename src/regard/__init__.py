"""regard: one PyTorch toolkit for attention.

The verbs load what they need when they are first used, so that ``import regard`` is instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "create": "regard.catalog.registry",
    "methods": "regard.catalog.registry",
    "method": "regard.catalog.registry",
    "Tags": "regard.catalog.registry",
    "papers": "regard.catalog.papers",
    "sites": "regard.core.site",
    "capture": "regard.core.capture",
    "edit": "regard.core.edit",
    "Edit": "regard.core.edit",
    "tokens": "regard.core.tokens",
    "Tokens": "regard.core.tokens",
    "swap": "regard.core.swap",
    "apply": "regard.core.apply",
    "explain": "regard.core.explain",
    "compare": "regard.view.compare",
    "compare_text": "regard.view.text",
    "reproduce": "regard.claims.reproduce",
    "bench": "regard.bench.run",
    "check": "regard.checks.run",
    "probe": "regard.checks.probe",
    "pretrained": "regard.train.pretrained",
}
__all__ = [*_VERBS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        value = getattr(import_module(_VERBS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
