"""The loop of an adapter in Python: one line of JSON in, one out (PROTOCOL.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]


def serve(about: Json, handlers: dict[str, Callable[[Json], Json]]) -> None:
    """Answers start with `about` and other commands by their handlers, until stop or the end of the input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between the answers
    started = {"status": "results", "protocol": 1, "operations": list(handlers), **about}
    handlers = {"start": lambda _: started, **handlers}
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "stop":
            return
        try:
            answer = handlers[request["command"]](request)
        except Exception as error:
            answer = {"status": "errored", "message": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
