"""``python -m regard.train.worker``: reads calls as lines of JSON, answers with lines of JSON; see :mod:`regard.train.pool`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal


def perform(
    function: str, arguments: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> tuple[Literal["done", "failed"], dict[str, Any]]:
    """Call ``module:name``; its result as JSON would give it back, or the reason why there is none."""
    module, name = function.split(":")
    try:
        result = getattr(import_module(module), name)(report, **arguments)
        return "done", {"result": json.loads(json.dumps(result))}
    except Exception as error:
        return "failed", {"reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a layer prints must not end up among the answers

    def tell(kind: str, facts: dict[str, Any]) -> None:
        answers.write(json.dumps({"kind": kind, **facts}) + "\n")

    for line in sys.stdin:
        call = json.loads(line)
        tell(*perform(call["function"], call["arguments"], lambda facts: tell("progress", facts)))


if __name__ == "__main__":
    main()
