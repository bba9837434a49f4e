"""The engines that are compared, behind the same few calls: load, prefill, decode, truncate."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import ruvllm

NOT_INSTALLED = "not installed"
WORKER = Path(__file__).with_name("_llama_worker.py")


class Engine(Protocol):
    """A language model engine with one sequence in its KV cache."""

    name: str
    weight_bytes: int  # that one token reads, in the engine's own layout

    def load(self, path: Path, threads: int, context: int) -> None:
        """Load a model, in place of the one before, with room for ``context`` tokens."""
        ...

    def prefill(self, ids: list[int]) -> float:
        """Append tokens at once, logits after the last; seconds."""
        ...

    def decode(self, ids: list[int]) -> float:
        """Append tokens one by one, logits after each; seconds."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        ...

    def unload(self) -> None:
        """Free the model."""
        ...


class Ruvllm:
    """This library, in this process."""

    name = "ruvllm"

    def __init__(self, weights: str = "auto", kv: str | None = None) -> None:
        self.weights = weights
        self.kv = {} if kv is None else {"kv": kv}
        self.weight_bytes = 0
        self.llm: ruvllm.LLM | None = None
        self._cache: Any = None
        self._logits = np.empty(0, np.float32)

    def load(self, path: Path, threads: int, context: int) -> None:
        """See Engine."""
        self.unload()
        self.llm = ruvllm.load(path, weights=self.weights, threads=threads)
        model, config = self.llm.model, self.llm.config
        unread = 0 if config.tie_word_embeddings else model.embed.nbytes  # one row of it is, which is nothing
        self.weight_bytes = model.nbytes - unread
        self._cache = self.llm.new_cache(context, **self.kv)
        self._logits = np.empty(config.vocab_size, np.float32)

    def unload(self) -> None:
        """See Engine."""
        self.llm = self._cache = None

    def prefill(self, ids: list[int]) -> float:
        """See Engine."""
        assert self.llm is not None
        tokens = np.array(ids)
        start = time.perf_counter()
        self.llm.model.forward(tokens, self._cache, last_only=True, out=self._logits)
        return time.perf_counter() - start

    def decode(self, ids: list[int]) -> float:
        """See Engine."""
        assert self.llm is not None
        tokens = np.array(ids)[:, None]
        start = time.perf_counter()
        for token in tokens:
            self.llm.model.forward(token, self._cache, last_only=True, out=self._logits)
        return time.perf_counter() - start

    def truncate(self, length: int) -> None:
        """See Engine."""
        self._cache.truncate(min(length, self._cache.length))


class LlamaCpp:
    """llama.cpp through llama-cpp-python, in a process of its own (see ``_llama_worker``)."""

    name = "llama.cpp"

    def __init__(self, python: str = sys.executable) -> None:
        """Start the worker.

        Raises:
            ModuleNotFoundError: that Python has no llama-cpp-python.
            OSError: that Python cannot be run.
        """
        self.weight_bytes = 0
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        try:
            hello = self.call("hello")
        except BaseException:
            self.close()
            raise
        self.version, self.system = hello["version"], hello["system"]

    def call(self, do: str, **arguments: Any) -> Any:
        """One request to the worker.

        Raises:
            ModuleNotFoundError: llama-cpp-python is missing there.
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
            raise RuntimeError(f"llama.cpp: its process ended during {do!r}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = ModuleNotFoundError if answer["missing"] else RuntimeError
            raise kind(f"llama.cpp: {do}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def load(self, path: Path, threads: int, context: int) -> None:
        """See Engine."""
        self.call("load", path=str(path), threads=threads, context=context)
        self.weight_bytes = file_bytes_per_token(path)

    def unload(self) -> None:
        """See Engine."""
        self.call("unload")

    def prefill(self, ids: list[int]) -> float:
        """See Engine."""
        return float(self.call("prefill", ids=ids))

    def decode(self, ids: list[int]) -> float:
        """See Engine."""
        return float(self.call("decode", ids=ids))

    def truncate(self, length: int) -> None:
        """See Engine."""
        self.call("truncate", length=length)

    def close(self) -> None:
        """End the worker."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended by itself
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def file_bytes_per_token(path: Path) -> int:
    """Bytes of the file's tensors that one token reads: all, but for the embedding where the head is another tensor."""
    from ruvllm.checkpoint.gguf import GGUFFile

    with GGUFFile(path) as file:
        sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - unread
