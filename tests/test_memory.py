"""Memory: what does not fit is refused with the numbers before anything is taken, and nothing more is taken than said.

Run as a program, ``python -m tests.test_memory FILE WEIGHTS`` loads a model within a limit that the system keeps.
"""

from __future__ import annotations

import gc
import resource
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import ruvllm
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.errors import InsufficientMemoryError
from ruvllm.loading import weight_bytes
from ruvllm.model import KVCache, Llama
from ruvllm.model.kv_size import PREFILL_TOKENS, cache_bytes
from ruvllm.model.ops.recording import Pass
from ruvllm.model.presets import PRESETS
from ruvllm.model.replay import Working, working_bytes
from tests import llm_cases
from tests.model import tiny, tiny_checkpoints
from tests.model.model_cases import SMALL, small_model
from tests.processes import python

SLACK = 32 << 20  # bytes: stacks of threads, tokenizers, what Python itself takes


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """free(n): the system now says that n bytes are free."""

    def say(nbytes: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=nbytes))

    return say


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf")
    model = ruvllm.load(path, weights="f32").model
    cache, work = cache_bytes(model.config, 256), working_bytes(model.config, PREFILL_TOKENS)
    weights = model.nbytes
    free(weights + cache + work)
    ruvllm.load(path, weights="f32")
    free(weights + cache + work - 1)
    monkeypatch.setattr("ruvllm.loading.Llama", None)  # nothing gets that far
    with pytest.raises(InsufficientMemoryError) as caught:
        ruvllm.load(path, weights="f32")
    message = r"tiny\.gguf: weights='f32' and a KV cache of 256 tokens: \d+\.\d GB needed, \d+\.\d GB free$"
    assert caught.match(message)
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("weights", ["auto", "f32", "int8"])
def test_what_is_said_of_a_file_is_what_it_takes(smollm2_path: Path, weights: str) -> None:
    """As `ruvllm info` shows it, to the byte."""
    with open_checkpoint(smollm2_path) as checkpoint:
        said = weight_bytes(checkpoint, weights)
    assert said == ruvllm.load(smollm2_path, weights=weights).model.nbytes


@pytest.mark.parametrize("variant", ["gemma3", "gpt_oss_mxfp4", "mixtral", "phi4_mini", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_what_is_said_of_each_family_is_what_it_takes(tmp_path: Path, variant: str, weights: str) -> None:
    """Tied heads, biases, norms of q and k, sinks, experts; windows: caches that are rings."""
    path = tiny_checkpoints.write_checkpoint(tmp_path / variant, tiny_checkpoints.read(variant))
    with open_checkpoint(path) as checkpoint:
        said, model = weight_bytes(checkpoint, weights), Llama(checkpoint.config, checkpoint, weights, threads=1)
    assert said == model.nbytes
    for kv in ("f32", "f16", "int8"):
        for tokens in (1, 100, 500):
            assert cache_bytes(model.config, tokens, kv) == KVCache(model.config, tokens, kv).nbytes


def test_a_cache_that_does_not_fit_is_refused(free: Any) -> None:
    needed = KVCache(SMALL, 1000).nbytes
    assert cache_bytes(SMALL, 1000) == needed
    assert cache_bytes(SMALL, 1000, "f16") == KVCache(SMALL, 1000, "f16").nbytes == needed // 2
    free(needed - 1)
    with pytest.raises(InsufficientMemoryError, match=r"^KV cache of 1000 tokens: 0\.0 GB needed, 0\.0 GB free$"):
        KVCache(SMALL, 1000)
    KVCache(SMALL, 1000, "f16")


def test_numbers_beyond_any_memory_are_refused_too() -> None:
    for tokens in (1 << 40, 1 << 62):
        with pytest.raises(InsufficientMemoryError, match=f"^KV cache of {tokens} tokens: "):
            KVCache(PRESETS["llama3-8b"], tokens)


def test_working_memory_is_what_is_said() -> None:
    model = small_model("int8", threads=1)
    working = Working(model, model.new_cache(16), 128, 1)
    working._use(model.tapes.tape(Pass.PROMPT, "f32"))
    assert working.shared.nbytes == working_bytes(SMALL, 128)


def status(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS is what it holds, mapped files too, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main(path: str, weights: str) -> None:
    """Load with room for 1.15 times the weights, cache and scratch, and no page more; print what was held at most."""
    llm = ruvllm.load(path, weights=weights, progress=False)  # once without a limit: compiled code and threads stay
    expected = llm.generate("Hello", max_tokens=5).ids
    needed = llm.model.nbytes + llm.new_cache(300).nbytes + working_bytes(llm.config, PREFILL_TOKENS)
    del llm
    gc.collect()
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit = data + int(1.15 * needed) + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    llm = ruvllm.load(path, weights=weights, progress=False)
    assert llm.generate("Hello", max_tokens=5, cache=llm.new_cache(300)).ids == expected
    print(status("VmHWM") - before, needed)


@pytest.mark.parametrize("weights", ["auto", "f16"])
def test_loading_takes_little_more_than_the_model(weights: str, smollm2_path: Path, tmp_path: Path) -> None:
    """No second copy of the model, whether its blocks are kept or converted; the system refuses what is beyond.

    Pages of the mapped file are no copy, but count as held as long as they are mapped: they go with each matrix. A file
    written in one piece lies in huge pages, so that reading one norm maps 2 MB around it.
    """
    if not Path("/proc/self/statm").exists():  # only Linux limits what a process may take
        return
    path = tmp_path / "model.gguf"
    path.write_bytes(smollm2_path.read_bytes())
    shown = python("-m", "tests.test_memory", path, weights, MALLOC_TRIM_THRESHOLD_="0")
    held, needed = map(int, shown.split())
    assert held <= 1.15 * needed


def test_generations_leave_nothing_behind(tmp_path: Path) -> None:
    llm = llm_cases.byte_llm(tmp_path, threads=1)

    def talk(times: int) -> None:
        for seed in range(times):
            llm.generate("again", max_tokens=4, temperature=1.0, seed=seed)
            next(llm.stream("left alone", max_tokens=4, seed=seed))
            with pytest.raises(ValueError, match="token ids"):
                llm.logits([999])

    talk(5)
    tracemalloc.start()
    try:
        talk(15)  # the texts of tokens are kept once they were asked for
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        talk(15)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 15 * 2048  # bytes: far less than the cache and the buffers that each of them had


if __name__ == "__main__":
    main(*sys.argv[1:])
