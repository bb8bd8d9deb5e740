"""``python -m regard.train.worker``: reads calls as lines of JSON, answers with lines of JSON; see :mod:`regard.train.pool`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a layer prints must not end up among the answers

    def tell(kind: str, **facts: Any) -> None:
        answers.write(json.dumps({"kind": kind, **facts}) + "\n")

    for line in sys.stdin:
        call = json.loads(line)
        module, name = call["function"].split(":")
        try:
            function = getattr(import_module(module), name)
            result = function(lambda facts: tell("progress", **facts), **call["arguments"])
            tell("done", result=result)
        except Exception as error:
            tell("failed", reason=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
