"""Compiling beforehand, with progress: all kernels that a kind of model needs, or that any model needs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba.core import event
from tqdm.auto import tqdm

from ruvllm.checkpoint.dequant import dequantize_rows
from ruvllm.checkpoint.groups import decode_groups
from ruvllm.checkpoint.storage import BLOCKS, row_bytes
from ruvllm.kernels._cache import is_warm, mark_warm
from ruvllm.kernels._jit import DISABLE_JIT
from ruvllm.kernels._threads import limited_to, num_threads
from ruvllm.model.config import ModelConfig
from ruvllm.model.generate import Sampling, generate
from ruvllm.model.llama import Llama
from ruvllm.model.weights import FLOAT_LAYOUTS, INTEGER_LAYOUTS, LAYOUTS, layout_for

logger = logging.getLogger(__name__)

_FUNCTIONS = 75  # compiled for one kind of model: how long the progress bar is expected to become
_TRAINING_FUNCTIONS = 150  # and for training on it


def compile_for(dtypes: Iterable[str], weights: str, progress: bool | None = None) -> None:
    """Compile what a model needs whose file has these storage types and which is kept as ``weights``.

    Nothing is done where it was done before: the machine code is in the user's cache directory.
    progress: show a bar; None: where stderr is a terminal or a notebook. Where there is none, the log says it.
    """
    kinds = sorted({(dtype, layout_for(weights, dtype)) for dtype in dtypes})
    layouts = {layout for _, layout in kinds} | ({weights} & set(LAYOUTS))
    if len(layouts & FLOAT_LAYOUTS.keys()) > 1:  # as choose_layouts does
        layouts = (layouts - FLOAT_LAYOUTS.keys()) | {"f32"}
    what = f"{kinds} {sorted(layouts)}"
    if DISABLE_JIT or is_warm(what):
        return
    with _compile_bar(progress):
        for dtype, layout in kinds:
            _read_rows(dtype, layout)
        # One function multiplies by integers of all widths.
        for layout in sorted({"int8" if layout in INTEGER_LAYOUTS else layout for layout in layouts}):
            _run_tiny_model(layout)
    mark_warm(what)


def compile_training(layouts: Iterable[str], progress: bool | None = None) -> None:
    """Compile what training an adapter needs on weights of these layouts; see ``compile_for``."""
    # One function goes back through integers of all widths.
    for layout in sorted({"int8" if layout in INTEGER_LAYOUTS else layout for layout in layouts}):
        if DISABLE_JIT or is_warm(f"training {layout}"):
            continue
        with _compile_bar(progress, _TRAINING_FUNCTIONS):
            _train_tiny_model(layout)
        mark_warm(f"training {layout}")


def warmup(progress: bool | None = True) -> None:
    """Compile the kernels for every kind of weights and file into the user's compile cache, with a progress bar.

    Loading a model, or training on it, compiles what is needed by itself, the first time after an installation or an
    upgrade.
    """
    if DISABLE_JIT:
        return
    for layout in LAYOUTS:
        compile_for(["F32"], layout, progress)
    for dtype in BLOCKS:
        compile_for([dtype, "F32"], "auto", progress)
    compile_training(LAYOUTS, progress)


def _tiny_model(layout: str, threads: int | None = None) -> Llama:
    """One layer of random weights, large enough for kernels to use several threads."""
    config = ModelConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    return Llama(config, layout=layout, threads=threads)


def _run_tiny_model(layout: str) -> None:
    """Prefill, decode and sampling with random weights of one layout."""
    model = _tiny_model(layout)
    cache = model.new_cache(80)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    list(generate(model, cache, np.arange(64), sampling, max_tokens=2, logprobs=2))
    cache.clear()
    list(generate(model, cache, np.arange(4), Sampling(), max_tokens=2))


def _train_tiny_model(layout: str) -> None:
    """A step and an evaluation, with many tokens and with few."""
    from ruvllm.model.lora import TARGETS, LoraConfig, MicroLora
    from ruvllm.model.training import TrainingConfig
    from ruvllm.model.training_data import Example

    for threads, tokens in ((None, 80), (None, 3), (1, 3)):
        lora = MicroLora(_tiny_model(layout, threads))
        example = Example(np.arange(tokens), np.ones(tokens, bool))
        with limited_to(threads or num_threads()):
            config = TrainingConfig(steps=1, warmup=0, max_grad_norm=1e-3)
            lora.fit([example], config=LoraConfig(8, targets=TARGETS), training=config).evaluate()


def _read_rows(dtype: str, layout: str) -> None:
    """A few rows of one storage type, as they are read for one layout."""
    columns = 256
    raw = np.zeros((16, row_bytes(dtype, columns)), np.uint8)
    raw.flags.writeable = False  # as rows of a mapped file are
    if layout in FLOAT_LAYOUTS or BLOCKS[dtype][0] == 1:
        dequantize_rows(dtype, raw, columns, np.empty((16, columns), np.float32))
    else:
        decode_groups(dtype, raw, columns)


@contextmanager
def _compile_bar(progress: bool | None, functions: int = _FUNCTIONS) -> Iterator[None]:
    """A bar that advances with each function that numba has compiled meanwhile."""
    bar = tqdm(
        total=functions, desc="compiling kernels (first run only)", unit="function", leave=False,
        disable=None if progress is None else not progress,
    )  # fmt: skip
    if bar.disable:
        logger.info("compiling kernels for this processor: about 20 s, the first time only")

    class Counter(event.Listener):
        def on_start(self, event: Any) -> None:
            """A function begins."""

        def on_end(self, event: Any) -> None:
            """A function is ready."""
            bar.total = max(bar.total, bar.n + 1)
            bar.update()

    with bar, event.install_listener("numba:compile", Counter()):
        yield
