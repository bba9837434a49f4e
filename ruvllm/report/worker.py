"""A peer in a process of its own: requests as JSON lines on its stdin, answers as JSON lines on its stdout.

The other interpreter need not have ruvllm, nor this one the peer. A worker computes only while a request is open, so
that two engines never compute at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruvllm._spinning import environment_of_others

PYTHONS = {"torch": "RUVLLM_TORCH_PYTHON", "llama.cpp": "RUVLLM_LLAMA_PYTHON"}


def python_for(peer: str) -> str:
    """The interpreter that has a peer: what RUVLLM_TORCH_PYTHON or RUVLLM_LLAMA_PYTHON names, else this one."""
    return os.environ.get(PYTHONS[peer], sys.executable)


class Worker:
    """A running worker script; ``hello`` is what it said of itself.

    Raises:
        ModuleNotFoundError: that Python does not have the peer.
        OSError: that Python cannot be run.
        RuntimeError: the script failed.
    """

    def __init__(self, name: str, python: str, script: Path) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment_of_others(),
        )  # fmt: skip
        try:
            self.hello: dict[str, str] = self.call("hello")
        except BaseException:
            self.close()
            raise

    def call(self, do: str, **arguments: Any) -> Any:
        """One request and its answer.

        Raises:
            ModuleNotFoundError: the peer is missing there.
            RuntimeError: the request failed, or the worker ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: its process ended during {do!r}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = ModuleNotFoundError if answer["missing"] else RuntimeError
            raise kind(f"{self.name}: {do}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended by itself
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
