"""Tables of the command line: what a model takes in memory, and what this machine is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm.machine import machine, size, threads, versions

if TYPE_CHECKING:
    from ruvllm.model.config import ModelConfig

KV_TOKENS = 1000


def show(content: Any, stderr: bool = False, **options: Any) -> None:
    """Print a table or text: colours on a terminal alone (NO_COLOR unset), no wrapping in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
    # Captured first: rich itself would end the program where the reader of a pipe has gone.
    with console.capture() as rendered:
        console.print(content, **options)
    print(rendered.get(), end="", file=stream, flush=True)


def show_memory(names: list[str]) -> None:
    """Print what models take: parameters, weights at FP16, INT8, INT4, and the KV cache of 1000 tokens."""
    from rich import box
    from rich.table import Table

    from ruvllm.model.presets import PRESETS

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "FP16", "INT8", "INT4", "KV cache per 1k tokens (FP16)", "(FP32)", "(INT8)"):
        table.add_column(heading, justify="right")
    for name in names or list(PRESETS):
        config = PRESETS[name.lower()] if name.lower() in PRESETS else _config_of(name)
        estimate = config.memory_estimate()
        table.add_row(
            config.name or Path(name).name,
            f"{estimate.parameters / 1e9:.2f} B"
            if estimate.parameters >= 1e9
            else f"{estimate.parameters / 1e6:.1f} M",
            *(size(n) for n in (estimate.fp16, estimate.int8, estimate.int4)),
            size(KV_TOKENS * estimate.kv_bytes_per_token_fp16),
            size(KV_TOKENS * estimate.kv_bytes_per_token_fp32),
            size(KV_TOKENS * estimate.kv_bytes_per_token_int8),
        )
    show(table)


def _config_of(name: str) -> ModelConfig:
    from ruvllm.checkpoint.hub import MODELS, resolve
    from ruvllm.model.presets import PRESETS

    if name not in MODELS and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"no configuration or file called {name!r}: known configurations are {', '.join(PRESETS)}"
        )
    from ruvllm.checkpoint.loader import open_checkpoint

    return open_checkpoint(resolve(name)).config


def show_info(model: str | None) -> None:
    """Print this machine as the library sees it, and the model where one is named."""
    sections = {"versions": versions(), "machine": machine(), "threads": threads(), "files": _files()}
    if model is not None:
        sections = {"model": _model(model)} | sections
    for title, rows in sections.items():
        show(_pairs(title, rows))


def _pairs(title: str, rows: dict[str, str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True, min_width=18)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _files() -> dict[str, str]:
    from ruvllm.checkpoint.hub import MODELS, cached_models
    from ruvllm.kernels.jit.cache import kernel_cache_directory
    from ruvllm.paths import cache_directory

    kernels = kernel_cache_directory()
    try:
        cached, rows = cached_models(), {"cache": str(cache_directory())}
    except FileNotFoundError as error:
        cached, rows = {}, {"cache": str(error)}
    if kernels is None:
        rows["compiled kernels"] = "not cached: no private directory can be had"
    else:
        entries = list(os.scandir(kernels))
        rows["compiled kernels"] = f"{kernels} ({len(entries)} files, {size(sum(e.stat().st_size for e in entries))})"
    for name in MODELS:
        rows[name] = str(cached[name]) if name in cached else f"not fetched: ruvllm pull {name}"
    return rows


def _model(name: str) -> dict[str, str]:
    from ruvllm.checkpoint.groups import ROUNDED
    from ruvllm.checkpoint.hub import resolve
    from ruvllm.checkpoint.loader import open_checkpoint
    from ruvllm.loading import weight_bytes

    checkpoint = open_checkpoint(resolve(name))
    config = checkpoint.config
    estimate = config.memory_estimate()
    rounded = [f"{ROUNDED[dtype]} ({dtype})" for dtype in checkpoint.weight_dtypes if dtype in ROUNDED]
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}"
    return {
        "name": config.name or Path(checkpoint.path).name,
        "file": f"{checkpoint.path} ({checkpoint.format})",
        "parameters": f"{estimate.parameters:,}",
        "weights": ", ".join(f"{count} {dtype}" for dtype, count in checkpoint.weight_dtypes.items()) + " tensors",
        "layers": f"{config.num_hidden_layers} of hidden size {config.hidden_size}, {config.intermediate_size} inside",
        "heads": heads,
        "vocabulary": f"{config.vocab_size:,} tokens",
        "context": f"{config.max_position_embeddings:,} tokens"
        + (f", sliding window {config.sliding_window:,}" if config.sliding_window else ""),
        "rope": f"base {config.rope.theta:g}, scaling {config.rope.scaling or 'none'}",
        "memory": f"{size(weight_bytes(checkpoint))} as it is loaded (--weights auto)",
        "rounded then": ", ".join(rounded) or "nothing",
        "if all were": f"FP16 {size(estimate.fp16)}, INT8 {size(estimate.int8)}, INT4 {size(estimate.int4)}",
        "KV cache": f"{size(KV_TOKENS * estimate.kv_bytes_per_token_fp32)} per 1k tokens in FP32, "
        f"{size(KV_TOKENS * estimate.kv_bytes_per_token_int8)} in INT8",
    }


def show_known_models() -> None:
    """Print the models that `pull` knows, and which of them are in the cache."""
    from rich import box
    from rich.table import Table

    from ruvllm.checkpoint.hub import MODELS, cached_models

    cached = cached_models()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "size", "licence", "what it is", "cached"):
        table.add_column(heading, no_wrap=heading in ("name", "size"))
    for name, model in MODELS.items():
        table.add_row(name, size(model.size), model.license, model.description, "yes" if name in cached else "no")
    show(table)
    for model in MODELS.values():
        if model.terms:
            show(f"{model.license}: {model.terms}", soft_wrap=True)
