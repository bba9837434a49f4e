"""load: from a name, a GGUF file or a Hugging Face directory to an LLM; warmup: every kernel compiled beforehand."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ruvllm.checkpoint.dequant import dequantize_rows
from ruvllm.checkpoint.groups import decode_groups
from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import Checkpoint, open_checkpoint
from ruvllm.checkpoint.storage import BLOCKS, row_bytes
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.errors import InsufficientMemoryError
from ruvllm.kernels._cache import is_warm, mark_warm
from ruvllm.kernels._jit import DISABLE_JIT
from ruvllm.llm import LLM
from ruvllm.model.config import ModelConfig
from ruvllm.model.generate import Sampling, generate
from ruvllm.model.llama import WEIGHTS, Llama
from ruvllm.model.weights import bytes_per_weight, layout_for

_SLOW_LOAD_SECONDS = 1.0  # a progress bar appears when loading takes longer


def load(
    path: str | os.PathLike[str],
    weights: str = "auto",
    threads: int | None = None,
    mmap: bool = True,
    progress: bool | None = None,
) -> LLM:
    """Load a model.

    Args:
        path: a name known to ``ruvllm pull`` ("smollm2-135m"; fetched if need be), a .gguf file, or a Hugging Face
            directory with config.json, tokenizer.json and safetensors.
        weights: how weights are kept in memory: "auto" keeps the precision of the file, so that a 4-bit file runs on
            4-bit weights; "f32", "f16", "bf16", "int8", "int4" convert all matrices.
        threads: None uses the physical cores.
        mmap: map the file; False reads it, which survives a file that shrinks while it is being read.
        progress: show progress bars; None: where stderr is a terminal or a notebook.

    Returns:
        The model with its tokenizer, ready to generate; the file may go.

    Raises:
        FileNotFoundError: neither a known name nor an existing path.
        ModelFormatError: not a model that this library can run.
        InsufficientMemoryError: its weights do not fit into the memory that is free.
        DownloadError: a known name that could not be fetched.
        ValueError: unknown ``weights``, or threads < 1.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    quiet = None if progress is None else not progress
    where = resolve(path)
    with open_checkpoint(where, mmap=mmap) as checkpoint:
        _require_memory(checkpoint, weights)
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
        if not is_warm():
            warmup(progress=progress)
        with tqdm(
            total=checkpoint.config.parameter_count(), desc="loading", unit="", unit_scale=True, leave=False,
            delay=_SLOW_LOAD_SECONDS, disable=quiet,
        ) as bar:  # fmt: skip
            model = Llama(checkpoint.config, checkpoint, weights, threads, progress=bar.update)
    return LLM(model, tokenizer, Path(where))


def warmup(progress: bool | None = True) -> None:
    """Compile every kernel that generation needs into the user's compile cache, with a progress bar.

    Loading a model does this by itself the first time after an installation or an upgrade.
    """
    if DISABLE_JIT:
        return
    steps = _warmup_steps()
    quiet = None if progress is None else not progress
    with tqdm(total=len(steps), desc="compiling kernels, once", leave=False, disable=quiet) as bar:
        for step in steps:
            step()
            bar.update()
    mark_warm()


def _warmup_steps() -> list[Callable[[], object]]:
    """Small tasks that between them call every compiled function with the types that real models give them."""
    config = ModelConfig(
        vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    ids = np.arange(64) % config.vocab_size
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)

    def run(layout: str, kv: str, threads: int | None) -> None:
        model = Llama(config, layout=layout, threads=threads)
        cache = model.new_cache(80, kv)
        model.forward(ids, cache)
        list(generate(model, cache, ids[:1], sampling, max_tokens=2, logprobs=2))

    return [
        lambda: run("f32", "f32", 1),
        lambda: run("f32", "f32", None),
        lambda: run("f16", "f16", None),
        lambda: run("bf16", "f32", None),
        lambda: run("int8", "f16", None),
        lambda: run("int4", "f32", None),
        *(partial(_decode_type, dtype) for dtype in BLOCKS),
    ]


def _decode_type(dtype: str) -> None:
    """Rows of one storage type, as float32 and as groups."""
    columns = 256
    raw = np.zeros((16, row_bytes(dtype, columns)), np.uint8)
    raw.flags.writeable = False  # as rows of a mapped file are
    dequantize_rows(dtype, raw, columns, np.empty((16, columns), np.float32))
    if BLOCKS[dtype][0] > 1:
        decode_groups(dtype, raw, columns)


def _require_memory(checkpoint: Checkpoint, weights: str) -> None:
    """Refuse a model whose weights do not fit, before anything is allocated."""
    import psutil

    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    needed = sum(math.prod(t.shape) * bytes_per_weight(layout_for(weights, t.dtype)) for t in tensors)
    free = psutil.virtual_memory().available
    if needed > free:
        raise InsufficientMemoryError(
            f"{checkpoint.path}: {needed / 1e9:.1f} GB needed for weights={weights!r}, {free / 1e9:.1f} GB free"
        )
