"""load: from a name, a GGUF file or a Hugging Face directory to an LLM."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ruvllm.checkpoint.fingerprint import fingerprint
from ruvllm.checkpoint.groups import group_layout
from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import Checkpoint, open_checkpoint
from ruvllm.checkpoint.packed_cache import VARIABLE, PackedModel, place_of
from ruvllm.checkpoint.part import PartOfCheckpoint
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.compiling import compile_choices, compile_for
from ruvllm.dividing import divide, threads_of, wanted_part
from ruvllm.kernels.memory import free_memory, require_memory
from ruvllm.llm import DEFAULT_MAX_TOKENS, LLM
from ruvllm.model.exchange import require_wire
from ruvllm.model.kv_size import PREFILL_TOKENS, cache_bytes, chosen_kv
from ruvllm.model.llama import WEIGHTS, Llama, Weights, choose_layouts
from ruvllm.model.ranks import Ranks, host_cores, ranks_of
from ruvllm.model.replay import working_bytes
from ruvllm.model.share import Share
from ruvllm.model.split import SplitLlama
from ruvllm.model.weights import INTEGER_LAYOUTS, FloatWeights, IntegerWeights, matrix_bytes
from ruvllm.progress import hidden, tqdm

logger = logging.getLogger(__name__)

_PLENTY = 1 << 30  # bytes of memory
_SLOW_LOAD_SECONDS = 1.0  # a progress bar appears when loading takes longer
_WORTH_KEEPING = 1 << 25  # bytes of weights: fewer are packed in a tenth of a second


def load(
    path: str | os.PathLike[str],
    weights: str = "auto",
    threads: int | None = None,
    mmap: bool = True,
    progress: bool | None = None,
    comm: Any = None,
    shares: Sequence[float] | str | None = None,
    wire: str = "auto",
) -> LLM:
    """Load a model.

    Args:
        path: a .gguf file (of several parts the first), a Hugging Face directory with config.json, tokenizer.json and
            safetensors, or a name that ``ruvllm pull`` takes, fetched if needed: "smollm2-135m", "gemma3-270m", or on
            the Hugging Face Hub "OWNER/NAME" (a directory), "OWNER/NAME:Q4_K_M", "OWNER/NAME/file.gguf".
        weights: how weights are kept in memory: "auto" keeps the precision of the file, so that a 4-bit file runs on
            4-bit weights; "f32", "f16", "bf16", "int8", "int4" convert all matrices.
        threads: None uses the physical cores.
        mmap: map the file; False reads it, which survives a file that shrinks while it is being read.
        progress: show progress bars; None: where stderr is a terminal or a notebook.
        comm: an MPI communicator (mpi4py) whose ranks all call this: each loads its share, and they run the model
            together. Rank 0 then uses the model as any other; on the others call ``llm.follow()``. An exception that
            nobody catches on one rank then ends all. On one rank, shares and wire are ignored with a warning.
        shares: how much of the model each rank takes, relative to the others: [3, 1]. None: equal shares; "auto": in
            proportion to the memory bandwidth that each rank measures now.
        wire: what ranks send each other in a layer. "exact": inputs and outputs of its o and down, in four messages;
            results have the bits of one rank's. "f32": partial sums, in two messages, added in another order; "f16":
            the same in half the bytes. "auto" is "exact" for weights of 4 to 8 bits, else "f32".

    Returns:
        The model with its tokenizer, ready to generate; the file is no longer needed.

    Raises:
        FileNotFoundError: neither a known name nor an existing path.
        ModelFormatError: not a model that this library can run.
        InsufficientMemoryError: its weights, with a cache for a short text, do not fit into the free memory.
        DownloadError: a name that could not be fetched.
        RankError: another rank failed to load, or has another version of ruvllm, another file or other arguments.
        ValueError: unknown ``weights`` or ``wire``, or threads < 1; ranks among which the model cannot be divided.
    """
    if (ranks := ranks_of(comm)) is not None:
        return _load_share(path, weights, threads, mmap, ranks, shares, wire)
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    require_wire(wire)
    if ignored := [name for name, given in (("shares", shares is not None), ("wire", wire != "auto")) if given]:
        logger.warning("%s: ignored, as the model is not divided over ranks here", ", ".join(ignored))
    where = resolve(path)
    with _not_collecting(), open_checkpoint(where, mmap=mmap) as checkpoint:
        _require_memory(checkpoint, weights)
        tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
        layouts = choose_layouts(checkpoint.config, checkpoint, weights)
        place = place_of(checkpoint, weights, layouts) if mmap else None
        packed = place.find() if place is not None else None
        compile_for(((checkpoint.tensor(name).dtype, layout) for name, layout in layouts.items()), progress)
        compile_choices(checkpoint.config, layouts.values(), progress)
        with _loading_bar(checkpoint, progress) as bar:
            source: Weights = checkpoint if packed is None else PackedModel(checkpoint, packed)
            model = Llama(checkpoint.config, source, weights, threads, progress=bar.update)
    if place is not None and packed is None and model.nbytes >= _WORTH_KEEPING:
        place.keep_later(_matrices(model))
    return LLM(model, tokenizer, Path(where))


@contextmanager
def _not_collecting() -> Iterator[None]:
    """Loading makes half a million objects and no garbage: collecting would take a tenth of the start."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def pack(path: str | os.PathLike[str], weights: str = "auto", progress: bool | None = None) -> Path:
    """Keep the packed weights of a model in the cache, so that its first load is as fast as later ones.

    Loading does so by itself, in the background, for weights of 32 MB or more.

    Args:
        path, weights, progress: as for ``load``.

    Returns:
        The file in the cache. It is as before if the cache holds this model as it is.

    Raises:
        OSError: the cache is off (RUVLLM_PACKED_CACHE=0) or cannot be written, the file would be larger than its limit,
            or the disk would be short.
        ModelFormatError, InsufficientMemoryError, DownloadError, ValueError: as for ``load``.
    """
    with open_checkpoint(resolve(path)) as checkpoint:
        layouts = choose_layouts(checkpoint.config, checkpoint, weights)
        place = place_of(checkpoint, weights, layouts)
        if place is None:
            raise OSError(f"packed weights cannot be kept: there is no private cache directory, or {VARIABLE} is 0")
        if place.find() is None:
            _require_memory(checkpoint, weights)
            with _loading_bar(checkpoint, progress) as bar:
                place.keep(_matrices(Llama(checkpoint.config, checkpoint, weights, progress=bar.update)))
    return place.path


def _matrices(model: Llama) -> dict[str, FloatWeights | IntegerWeights]:
    return {name: linear.weights for name, linear in model.linears().items()}


def _loading_bar(checkpoint: Checkpoint, progress: bool | None) -> Any:
    return tqdm(
        total=checkpoint.config.parameter_count(), desc="loading", unit="", unit_scale=True, leave=False,
        delay=_SLOW_LOAD_SECONDS, disable=hidden(progress),
    )  # fmt: skip


def _load_share(
    path: str | os.PathLike[str], weights: str, threads: int | None, mmap: bool, ranks: Ranks,
    shares: Sequence[float] | str | None, wire: str,
) -> LLM:  # fmt: skip
    """``load`` on each of several ranks. Whatever goes wrong on one raises an error on all of them."""
    with ExitStack() as opened:
        with _not_collecting(), ranks.together():
            if weights not in WEIGHTS:
                raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
            where = resolve(path)
            checkpoint = opened.enter_context(open_checkpoint(where, mmap=mmap))
            layouts = choose_layouts(checkpoint.config, checkpoint, weights)
            version = import_module("ruvllm").__version__
            mine: dict[str, Any] = {"same version": version, "same file": fingerprint(checkpoint.paths)}
            mine |= {
                "same weights": weights,
                "same wire": wire,
                "same shares": shares if shares is None else str(shares),
                "part": wanted_part(shares, ranks),
                "host": host_cores(),
            }
        every = ranks.compare(mine)
        with _not_collecting(), ranks.together():
            found = divide(checkpoint.config, [facts["part"] for facts in every], layouts, wire)
            threads = threads_of(ranks.rank, [facts["host"] for facts in every]) if threads is None else threads
            here = [share for share in found if every[share.rank]["host"][0] == mine["host"][0]]
            _require_memory(checkpoint, weights, here)
            tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
            compile_for(((checkpoint.tensor(name).dtype, layout) for name, layout in layouts.items()), False)
            compile_choices(checkpoint.config, layouts.values(), False)
            held = PartOfCheckpoint(checkpoint, found[ranks.rank])
            model = SplitLlama(found, ranks, held, weights, threads, wire=wire)
    model.guard()
    return LLM(model, tokenizer, Path(where))


def _require_memory(checkpoint: Checkpoint, weights: str, shares: Sequence[Share] = ()) -> None:
    """Refuse a model that does not fit with a cache for a short text, before anything is allocated.

    shares: those that this machine will hold; none: the whole model.
    """
    configs = [share.local for share in shares] or [checkpoint.config]
    tokens = min(DEFAULT_MAX_TOKENS, checkpoint.config.max_position_embeddings)
    layouts = choose_layouts(checkpoint.config, checkpoint, weights).values()
    held: list[Share | None] = [*shares] or [None]
    needed = sum(weight_bytes(checkpoint, weights, share) for share in held)
    needed += sum(cache_bytes(config, tokens, chosen_kv("auto", layouts)) for config in configs)
    free = free_memory()
    if free is None or free > 2 * needed + _PLENTY:
        return  # a pass needs far less than the rest, but to know how much the model has to be recorded
    where = f"the {len(shares)} ranks of this machine: " if shares else ""
    what = f"{checkpoint.path}: {where}weights={weights!r} and a KV cache of {tokens} tokens"
    require_memory(needed + sum(working_bytes(config, PREFILL_TOKENS) for config in configs), what)


def weight_bytes(checkpoint: Checkpoint, weights: str = "auto", share: Share | None = None) -> int:
    """Bytes of a model's weights, or of a share of them, when loaded as ``weights``; see ``load``."""
    layouts = choose_layouts(checkpoint.config, checkpoint, weights)
    total = 0
    for name, whole in checkpoint.config.tensor_shapes().items():
        shape = whole if share is None else share.shape(name, whole)
        if shape is None:
            continue
        if name not in layouts:
            total += 4 * shape[0]
            continue
        layout, mins = layouts[name], False
        if layout in INTEGER_LAYOUTS:
            _, mins = group_layout(checkpoint.tensor(name).dtype, layout, symmetric=False)
        total += matrix_bytes(shape, layout, mins)
    return total
