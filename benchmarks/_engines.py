"""The engines that are compared, behind the same few calls: load, prefill, decode, truncate."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import ruvllm
from ruvllm.report import worker

NOT_INSTALLED = "not installed"
WORKER = Path(worker.__file__).with_name("_llama_worker.py")


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
        unread = 0 if config.tie_word_embeddings else model.decoder.embed.nbytes  # one row of it is, which is nothing
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
        """Start the worker; raises what ``worker.Worker`` does."""
        self.weight_bytes = 0
        self._worker = worker.Worker(self.name, python, WORKER)
        self.call, self.close = self._worker.call, self._worker.close
        self.version, self.system = self._worker.hello["version"], self._worker.hello["system"]

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


def file_bytes_per_token(path: Path) -> int:
    """Bytes of the file's tensors that one token reads: all, but for the embedding where the head is another tensor."""
    from ruvllm.checkpoint.gguf import GGUFFile

    with GGUFFile(path) as file:
        sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - unread
