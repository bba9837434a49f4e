"""llama.cpp as a worker (see ``workers``), run with any Python that has llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from importlib import import_module
from typing import Any

from serve import serve  # type: ignore[import-not-found]  # in this program's directory, not in a package

BATCH = 2048  # tokens per call, llama-bench's default; the engine splits them into UBATCH
UBATCH = 512


class Worker:
    """One loaded model and the tokens in its KV cache."""

    def __init__(self) -> None:
        self.api: Any = import_module("llama_cpp")
        self.llm: Any = None

    def hello(self) -> dict[str, str]:
        """Version of the binding, and the instruction sets the engine was built for."""
        info = self.api.llama_print_system_info().decode()
        return {"version": self.api.__version__, "system": info.strip()}

    def quantize(self, source: str, target: str, ftype: int, threads: int) -> None:
        """Convert ``source`` to another file type (an llama_ftype)."""
        parameters = self.api.llama_model_quantize_default_params()
        parameters.ftype = ftype
        parameters.nthread = threads
        parameters.allow_requantize = True
        if self.api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not quantize {source}")

    def load(self, path: str, threads: int, context: int) -> dict[str, int]:
        """Replace the model, with the engine's fastest settings: flash attention, repacking."""
        self.unload()
        self.llm = self.api.Llama(
            path, n_ctx=context, n_batch=min(BATCH, context), n_ubatch=UBATCH, n_threads=threads,
            n_threads_batch=threads, flash_attn=True, use_mmap=True, verbose=False,
        )  # fmt: skip
        return {"vocabulary": self.llm.n_vocab()}

    def unload(self) -> None:
        """Free the model."""
        if self.llm is not None:
            self.llm.close()
            self.llm = None

    def truncate(self, length: int) -> None:
        """Drop the positions from ``length`` on."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.llm.ctx), -1, length, -1)

    def prefill(self, ids: list[int]) -> float:
        """Seconds to append tokens, up to the logits after the last."""
        parts = [(self.api.llama_token * len(part))(*part) for part in _cut(ids, BATCH)]
        start = time.perf_counter()
        for part in parts:
            self._decode(part)
        return time.perf_counter() - start

    def decode(self, ids: list[int]) -> float:
        """Seconds to append tokens one by one, with the logits after each."""
        parts = [(self.api.llama_token * 1)(token) for token in ids]
        start = time.perf_counter()
        for part in parts:
            self._decode(part)
        return time.perf_counter() - start

    def load_many(self, path: str, threads: int, context: int, sequences: int) -> None:
        """Replace the model by one for several sequences, each of up to ``context`` positions."""
        self.unload()
        api = self.api
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = context * sequences, sequences
        parameters.n_batch, parameters.n_ubatch = BATCH, UBATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type, parameters.no_perf = 1, True
        self.llm = _Sequences(api, model, api.llama_init_from_model(model, parameters))

    def decode_many(self, ids: list[list[int]]) -> float:
        """Seconds to append tokens to empty sequences, one to each at a time, with the logits after each.

        ids: for each step the token of each sequence.
        """
        api, count = self.api, len(ids[0])
        api.llama_memory_clear(api.llama_get_memory(self.llm.ctx), True)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        start = time.perf_counter()
        for position, tokens in enumerate(ids):
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, True
                batch.seq_id[i][0] = i
            status = api.llama_decode(self.llm.ctx, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            api.llama_get_logits_ith(self.llm.ctx, count - 1)
        seconds = time.perf_counter() - start
        api.llama_batch_free(batch)
        return seconds

    def _decode(self, tokens: Any) -> None:
        status = self.api.llama_decode(self.llm.ctx, self.api.llama_batch_get_one(tokens, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.api.llama_get_logits_ith(self.llm.ctx, -1)  # waits for them

    def last_logits(self) -> list[float]:
        """Logits after the last token appended."""
        return self.api.llama_get_logits_ith(self.llm.ctx, -1)[: self.llm.n_vocab()]

    def losses(self, path: str, threads: int, windows: list[list[int]], first: int, bos: int | None, f32: bool) -> Any:
        """Negative log-likelihood of tokens first + 1: of each window, in nats; windows share no context.

        ``f32``: without rounding: float32 KV cache, plain attention.
        """
        import numpy as np

        self.unload()
        context = len(windows[0])
        kinds = {"type_k": 0, "type_v": 0} if f32 else {}  # GGML_TYPE_F32
        self.llm = self.api.Llama(
            path, n_ctx=context, n_batch=context, n_ubatch=UBATCH, n_threads=threads, n_threads_batch=threads,
            logits_all=True, flash_attn=not f32, verbose=False, **kinds,
        )  # fmt: skip
        found = []
        for window in windows:
            self.llm.reset()
            self.llm.eval(window if bos is None else [bos, *window[1:]])
            logits = self.llm.scores[first : context - 1].astype(np.float64)
            top = logits.max(axis=1)
            total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
            found.append((total - logits[np.arange(len(total)), window[first + 1 :]]).tolist())
        self.unload()
        return found


class _Sequences:
    """A model whose context holds several sequences: what the binding's own class does not offer."""

    def __init__(self, api: Any, model: Any, ctx: Any) -> None:
        self.api, self.model, self.ctx = api, model, ctx

    def close(self) -> None:
        """Free both."""
        self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)


def _cut(ids: list[int], size: int) -> list[list[int]]:
    return [ids[lo : lo + size] for lo in range(0, len(ids), size)]


if __name__ == "__main__":
    serve(Worker)
