"""A peer in a process of its own: requests as JSON lines on its stdin, answers as JSON lines on its stdout.

The other interpreter need not have ruvllm, nor this one the peer. A worker computes only while a request is open, so
that two engines never compute at the same time. The programs in this directory import nothing of ruvllm.
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

from ruvllm.spinning import environment_of_others

_PYTHONS = {"torch": "RUVLLM_TORCH_PYTHON", "peft": "RUVLLM_TORCH_PYTHON", "llama": "RUVLLM_LLAMA_PYTHON"}
_PROGRAMS = Path(__file__).parent


def python_for(peer: str) -> str:
    """The interpreter that has a peer, "torch", "peft" or "llama": named by an environment variable, or this one."""
    return os.environ.get(_PYTHONS[peer], sys.executable)


def last_words(lines: list[str]) -> str:
    """The last line that a program wrote before it failed."""
    written = [line.strip() for line in lines if line.strip()]
    return written[-1] if written else "no output"


class Worker:
    """A running ``{peer}_worker.py``; ``hello`` is what it reports: "version", "system".

    Raises:
        ModuleNotFoundError: that Python lacks the peer.
        OSError: that Python cannot be run.
        RuntimeError: the program failed.
    """

    def __init__(self, peer: str, python: str | None = None) -> None:
        self.peer = peer
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [python or python_for(peer), str(_PROGRAMS / f"{peer}_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment_of_others(),
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
            self._log.seek(0)
            raise RuntimeError(f"{self.peer}: its process ended during {do!r}: {last_words(self._log.readlines())}")
        answer = json.loads(line)
        if "error" in answer:
            kind = ModuleNotFoundError if answer["missing"] else RuntimeError
            raise kind(f"{self.peer}: {do}: {answer['error']}")
        return answer["result"]

    def settle(self) -> None:
        """Return when no thread of the worker spins any more."""
        self.call("settle")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended by itself
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
