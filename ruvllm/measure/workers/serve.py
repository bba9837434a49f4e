"""The loop of a worker program: requests as JSON lines on stdin, answers as JSON lines on stdout.

The programs in this directory import it; ``workers.Worker`` runs them with any Python. It imports nothing of ruvllm.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from quiet import wait_until_quiet  # type: ignore[import-not-found]  # in the program's directory, not in a package


def serve(make: Callable[[], Any]) -> None:
    """Answer requests until stdin ends: {"do": method, ...} calls a method of ``make()``, made at the first request.

    "settle" waits until no thread of this process spins any more.
    """
    # Output of the engine itself must not mix with the answers.
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
