"""The loop of an engine in a process of its own: requests as JSON lines on stdin, answers as JSON lines on stdout.

Imported by the programs beside it, which ``worker.Worker`` runs with any Python; it imports nothing of ruvllm.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from _quiet import wait_until_quiet  # type: ignore[import-not-found]  # beside this file, which is no part of a package


def serve(make: Callable[[], Any]) -> None:
    """Answer requests until stdin ends: {"do": method, ...} calls a method of what ``make`` gives at the first one.

    "settle" waits until no thread of this process spins any more.
    """
    # What the engine itself prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            engine = engine or make()
            answer = {"result": wait_until_quiet() if name == "settle" else getattr(engine, name)(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
