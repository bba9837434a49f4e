"""Tables of the command line: the memory of models, and this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm.cli.show import show
from ruvllm.machine import machine, size, threads, versions

if TYPE_CHECKING:
    from ruvllm.model.config import ModelConfig

KV_TOKENS = 1000


def show_memory(names: list[str]) -> None:
    """Print the sizes of models: parameters and weights at FP16, INT8, INT4; then their KV caches."""
    from rich import box
    from rich.table import Table

    from ruvllm.model.kv_size import cache_bytes
    from ruvllm.model.presets import PRESETS

    weights, caches = Table(box=box.SIMPLE_HEAD), Table(box=box.SIMPLE_HEAD)
    at_length = ("KV cache FP16", "FP32", "INT8", "context", "its KV cache FP16")
    for table, headings in ((weights, ("parameters", "FP16", "INT8", "INT4")), (caches, at_length)):
        table.add_column("model" if table is weights else f"{KV_TOKENS} tokens", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", overflow="fold")
    for name in names or list(PRESETS):
        config = PRESETS[name.lower()] if name.lower() in PRESETS else _config_of(name)
        label, context = config.name or Path(name).name, config.max_position_embeddings
        estimate = config.memory_estimate()
        active = f" ({_count(estimate.active)} active)" if estimate.active < estimate.parameters else ""
        sizes = [size(n) for n in (estimate.fp16, estimate.int8, estimate.int4)]
        weights.add_row(label, _count(estimate.parameters) + active, *sizes)
        sizes = [size(cache_bytes(config, KV_TOKENS, kv)) for kv in ("f16", "f32", "int8")]
        caches.add_row(label, *sizes, f"{context:,}", size(cache_bytes(config, context, "f16")))
    show(weights)
    show(caches)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _config_of(name: str) -> ModelConfig:
    from ruvllm.checkpoint.hub import MODELS, resolve
    from ruvllm.model.presets import PRESETS

    if name not in MODELS and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"no configuration or file called {name!r}: known configurations are {', '.join(PRESETS)}"
        )
    from ruvllm.checkpoint.loader import open_checkpoint

    return open_checkpoint(resolve(name)).config


def show_info(model: str | None, comm: Any = None, shares: Any = None, wire: str = "auto") -> None:
    """Print this machine as the library sees it, and the model if one is named; of several ranks also what each has."""
    about_ranks = {} if comm is None else _ranks(model, comm, shares, wire)
    sections = {"versions": versions(), "machine": machine(), "threads": threads(), "files": _files()}
    if model is not None:
        sections = {"model": _model(model)} | sections
    if about_ranks:
        sections = {"ranks": about_ranks} | sections
    for title, rows in sections.items():
        show(_pairs(title, rows))


def _ranks(model: str | None, comm: Any, shares: Any, wire: str) -> dict[str, str]:
    """Each rank's machine and threads, and its share of the model if one is named."""
    from ruvllm.dividing import threads_of, wanted_part
    from ruvllm.kernels.memory import free_memory
    from ruvllm.model.ranks import Ranks, host_cores

    ranks = Ranks(comm)
    with ranks.together():
        mine = {"host": host_cores(), "part": wanted_part(shares, ranks), "free": free_memory() or 0}
    every = ranks.compare(mine)
    hosts = [facts["host"] for facts in every]
    threads = ranks.comm.allgather(threads_of(ranks.rank, hosts))
    found = [
        f"{facts['host'][0]}, {count} threads, {size(facts['free'])} free"
        for facts, count in zip(every, threads, strict=True)
    ]
    if model is not None:
        with ranks.together():
            held = _held(model, [facts["part"] for facts in every], wire)
        found = [f"{about}; {share}" for about, share in zip(found, held, strict=True)]
    return {f"rank {rank}": about for rank, about in enumerate(found)}


def _held(name: str, parts: list[float], wire: str) -> list[str]:
    """Heads, columns and bytes of each rank's share."""
    from ruvllm.checkpoint.hub import resolve
    from ruvllm.checkpoint.loader import open_checkpoint
    from ruvllm.dividing import divide
    from ruvllm.loading import weight_bytes
    from ruvllm.model.kv_size import cache_bytes
    from ruvllm.model.llama import choose_layouts

    with open_checkpoint(resolve(name)) as checkpoint:
        shares = divide(checkpoint.config, parts, choose_layouts(checkpoint.config, checkpoint, "auto"), wire)
        return [
            f"{share}; weights {size(weight_bytes(checkpoint, 'auto', share))}, KV cache "
            f"{size(cache_bytes(share.local, KV_TOKENS))} for {KV_TOKENS:,} tokens"
            for share in shares
        ]


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
        rows["compiled kernels"] = "not cached: there is no private directory"
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
    from ruvllm.cli.describe import described
    from ruvllm.loading import weight_bytes
    from ruvllm.model.kv_size import cache_bytes

    checkpoint = open_checkpoint(resolve(name))
    config = checkpoint.config
    estimate = config.memory_estimate()
    rounded = [f"{ROUNDED[dtype]} ({dtype})" for dtype in checkpoint.weight_dtypes if dtype in ROUNDED]
    active = f" ({estimate.active:,} active for one token)" if estimate.active < estimate.parameters else ""
    lengths = sorted({min(KV_TOKENS, config.max_position_embeddings), config.max_position_embeddings})
    caches = [[size(cache_bytes(config, tokens, kv)) for kv in ("f32", "f16", "int8")] for tokens in lengths]
    return {
        "name": config.name or Path(checkpoint.path).name,
        "file": f"{checkpoint.path} ({checkpoint.format})",
        "weights": ", ".join(f"{count} {dtype}" for dtype, count in checkpoint.weight_dtypes.items()) + " tensors",
        "parameters": f"{estimate.parameters:,}{active}",
        **described(config),
        "memory": f"{size(weight_bytes(checkpoint))} as it is loaded (--weights auto)",
        "rounded then": ", ".join(rounded) or "nothing",
        "if all were": f"FP16 {size(estimate.fp16)}, INT8 {size(estimate.int8)}, INT4 {size(estimate.int4)}",
        "KV cache": "; ".join(
            f"{fp32} in FP32, {fp16} in FP16, {int8} in INT8 for {tokens:,} tokens"
            for tokens, (fp32, fp16, int8) in zip(lengths, caches, strict=True)
        ),
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
