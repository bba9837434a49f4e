"""Language model engines on one model file: ruvllm, llama.cpp and ik_llama.cpp, timed through one interface."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import ruvllm
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.measure.workers import Worker, last_words
from ruvllm.spinning import environment_of_others


class Engine(Protocol):
    """A language model engine with one sequence in its KV cache."""

    name: str
    about: str
    weight_bytes: int  # read for each token, in the engine's own layout

    def load(self, path: Path, threads: int, context: int) -> None:
        """Replace the model; the new one's KV cache holds ``context`` tokens."""
        ...

    def unload(self) -> None:
        """Free the model."""
        ...

    def append(self, ids: list[int]) -> None:
        """Append tokens to the KV cache, untimed."""
        ...

    def seconds(self, kind: str, ids: list[int], cached: int) -> float:
        """Seconds to append ids to the first ``cached`` tokens, at once ("prefill") or one by one ("decode").

        Ends with logits; leaves the KV cache as it was.
        """
        ...


class Ruvllm:
    """This library, in this process."""

    name = "ruvllm"
    about = f"ruvllm {ruvllm.__version__}"

    def __init__(self, weights: str = "auto", kv: str | None = None) -> None:
        self.weights = weights
        self.kv = {} if kv is None else {"kv": kv}
        self.weight_bytes = 0
        self.llm: ruvllm.LLM | None = None
        self.cache: Any = None
        self._logits = np.empty(0, np.float32)

    def load(self, path: Path, threads: int, context: int) -> None:
        """See Engine."""
        self.unload()
        self.llm = ruvllm.load(path, weights=self.weights, threads=threads)
        model, config = self.llm.model, self.llm.config
        unread = 0 if config.tie_word_embeddings else model.decoder.embed.nbytes  # except for one row
        self.weight_bytes = model.nbytes - unread
        self.cache = self.llm.new_cache(context, **self.kv)
        self._logits = np.empty(config.vocab_size, np.float32)

    def unload(self) -> None:
        """See Engine."""
        self.llm = self.cache = None

    def append(self, ids: list[int]) -> None:
        """See Engine."""
        self._seconds([np.array(ids)])

    def seconds(self, kind: str, ids: list[int], cached: int) -> float:
        """See Engine."""
        self.append(ids[:1])  # wakes threads, and reloads what the last engine evicted from the caches
        self.cache.truncate(cached)
        seconds = self._seconds([np.array(ids)] if kind == "prefill" else list(np.array(ids)[:, None]))
        self.cache.truncate(cached)
        return seconds

    def _seconds(self, parts: list[np.ndarray]) -> float:
        assert self.llm is not None
        start = time.perf_counter()
        for part in parts:
            self.llm.model.forward(part, self.cache, last_only=True, out=self._logits)
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp through llama-cpp-python, in a process of its own (see ``workers``). Raises what ``Worker`` does."""

    name = "llama.cpp"

    def __init__(self, python: str | None = None) -> None:
        self.weight_bytes = 0
        self.worker = Worker("llama", python)
        self.call, self.close = self.worker.call, self.worker.close
        features = re.findall(r"(\w+) = 1", self.worker.hello["system"])
        self.about = f"llama-cpp-python {self.worker.hello['version']} ({', '.join(features)})"

    def load(self, path: Path, threads: int, context: int) -> None:
        """See Engine."""
        self.call("load", path=str(path), threads=threads, context=context)
        self.weight_bytes = file_bytes_per_token(path)

    def unload(self) -> None:
        """See Engine."""
        self.call("unload")

    def append(self, ids: list[int]) -> None:
        """See Engine."""
        self.call("prefill", ids=ids)

    def seconds(self, kind: str, ids: list[int], cached: int) -> float:
        """See Engine."""
        self.append(ids[:1])  # as Ruvllm does
        self.call("truncate", length=cached)
        seconds = float(self.call(kind, ids=ids))
        self.call("truncate", length=cached)
        return seconds


class IkLlamaCpp:
    """ik_llama.cpp through its program ``llama-bench``: each turn is a new process, on random tokens.

    Raises:
        OSError: the program cannot be run.
        RuntimeError: it failed, or its output is not the JSON of llama-bench.
    """

    name = "ik_llama.cpp"

    def __init__(self, program: str) -> None:
        self.about, self._program = program, program
        self.weight_bytes = 0
        self._options: list[str] = []

    def load(self, path: Path, threads: int, context: int) -> None:
        """See Engine; the program loads the model in each turn and sizes its own KV cache."""
        # As llama.cpp runs here: on the CPU, batches of 2048 split into 512, flash attention; and weights repacked.
        self._options = [
            "-m", str(path), "-t", str(threads), "-ngl", "0", "-b", "2048", "-ub", "512", "-fa", "1", "-rtr", "1",
        ]  # fmt: skip
        self.weight_bytes = file_bytes_per_token(path)

    def unload(self) -> None:
        """See Engine."""

    def append(self, ids: list[int]) -> None:
        """See Engine; the program fills its KV cache in each turn."""

    def seconds(self, kind: str, ids: list[int], cached: int) -> float:
        """See Engine."""
        count = str(len(ids))
        # -gp P,G: G tokens generated after a prompt of P, and only those are timed.
        test = ["-p", count, "-n", "0"] if kind == "prefill" else ["-p", "0", "-n", "0", "-gp", f"{cached},{count}"]
        command = [self._program, *self._options, *test, "-r", "1", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment_of_others(), check=False)
        try:
            if done.returncode:
                raise ValueError(f"exit code {done.returncode}")
            (found,) = json.loads(done.stdout)
            seconds = found["samples_ns"][0] / 1e9
            self.about = f"{found['build_commit']} ({found['build_number']}), {self._program}"
        except (ValueError, LookupError, TypeError) as error:
            raise RuntimeError(
                f"{self.name}: {self._program}: expected the JSON of one test, found {error!r}: "
                f"{last_words(done.stderr.splitlines())}"
            ) from None
        return float(seconds)


def file_bytes_per_token(path: Path) -> int:
    """Bytes of the file's tensors read for each token: all, except the embedding if the head is a tensor of its own."""
    with GGUFFile(path) as file:
        sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
