"""Compile kernels ahead of use, with progress: those of one kind of model, or all."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ruvllm.checkpoint.source import Source
from ruvllm.checkpoint.storage import BLOCKS, row_bytes
from ruvllm.checkpoint.tensor import Tensor, TensorInfo
from ruvllm.compile_steps import run_steps
from ruvllm.kernels import operations as o
from ruvllm.kernels.jit.cache import is_warm, kernel_cache_directory, mark_warm
from ruvllm.kernels.jit.decorators import DISABLE_JIT
from ruvllm.kernels.jit.private.dispatch import on_each_compilation
from ruvllm.kernels.tape import replay
from ruvllm.kernels.threads.pool import limited_to, num_threads
from ruvllm.kernels.threads.regions import CFunction
from ruvllm.model.config import SIZES, ModelConfig
from ruvllm.model.generate import generate
from ruvllm.model.kv_blocks import DTYPES as KV_DTYPES
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.kv_size import chosen_kv
from ruvllm.model.llama import Llama
from ruvllm.model.replay import needed_operations
from ruvllm.model.sampling.options import Sampling
from ruvllm.model.weights import INTEGER_LAYOUTS, LAYOUTS, layout_for, load_weights
from ruvllm.progress import hidden, tqdm

if TYPE_CHECKING:
    from ruvllm.kernels import KernelSpec

logger = logging.getLogger(__name__)

_FUNCTIONS = 135  # compiled for one kind of model, roughly: the length of the progress bar
_TRAINING_FUNCTIONS = 140  # for training on it
_MOST_PROCESSES = 4  # compiling at once; each imports numba first
# Where operations stand among the steps of a first load: slow ones at both ends, attention together, others between.
_PLACES = {"integers": 0, "floats": 1, "quantize": 2, "_replay": 3, "append_rows": 5, "token": 6, "attend_rows": 7}
_BETWEEN = 4


def compile_for(kinds: Iterable[tuple[str, str]], progress: bool | None = None) -> None:
    """Compile what a model needs, given the pairs of storage type and layout of its matrices.

    Does nothing if the machine code is in the user's cache directory already.
    progress: show a bar; None: where stderr is a terminal or a notebook. Without a bar, the log reports it.
    """
    kinds = sorted(set(kinds))
    kind = f"{kinds}, {chosen_kv('auto', (layout for _, layout in kinds))} cache"
    if DISABLE_JIT or is_warm(kind):
        return
    processes = 1 if kernel_cache_directory() is None else min(num_threads(), _MOST_PROCESSES)
    same = f"from ruvllm.compiling import _compile_steps\nsteps = _compile_steps({kinds!r})"
    with _compile_bar(progress):
        run_steps(_compile_steps(kinds), processes, same)
        _run_tiny_model(kinds)
    mark_warm(kind)


def compile_cache(
    layouts: Iterable[str], kv: str, progress: bool | None = None, config: ModelConfig | None = None
) -> None:
    """Compile what a model with these layouts also needs for a KV cache of ``kv``; see ``compile_for``.

    config: of a model that is not LLaMA.
    """
    layouts = sorted(set(layouts))
    if not isinstance(kv, str) or kv not in KV_DTYPES or kv == chosen_kv("auto", layouts):
        return  # it was compiled with the model, or the cache refuses it
    kind = f"{kv} cache, {layouts}" + ("" if config is None else f", {_tiny_config(config)!r}")
    if DISABLE_JIT or is_warm(kind):
        return
    needed = operations_for(layouts, kv) if config is None else operations_for(layouts, kv, config)
    _compile_operations(needed, kind, progress)


def compile_many(kv: str, progress: bool | None = None) -> None:
    """Compile what passes over several sequences also need, for keys and values of ``kv``."""
    kind = f"many sequences, {kv}"
    if DISABLE_JIT or is_warm(kind):
        return
    dtype = KV_DTYPES[kv]
    _compile_operations([o.attend_runs(dtype), o.append_blocks(dtype), o.chosen_rows], kind, progress)


def compile_choices(config: ModelConfig, layouts: Iterable[str], progress: bool | None = None) -> None:
    """Compile the operations of a model that LLaMA lacks: norms by head, softcaps, experts ..."""
    layouts = sorted(set(layouts))
    kv = chosen_kv("auto", layouts)
    kind = f"operations, {layouts}, {kv} cache, {_tiny_config(config)!r}"
    if DISABLE_JIT or is_warm(kind):
        return
    common = operations_for(layouts, kv)
    extra = [operation for operation in operations_for(layouts, kv, config) if operation not in common]
    if extra:
        _compile_operations(extra, kind, progress)
    else:
        mark_warm(kind)


def _compile_operations(operations: list[CFunction], kind: str, progress: bool | None) -> None:
    with _compile_bar(progress, 3 * len(operations)):
        for operation in operations:
            _ = operation.address
    mark_warm(kind)


def compile_training(layouts: Iterable[str], progress: bool | None = None) -> None:
    """Compile what training an adapter needs on weights of these layouts; see ``compile_for``."""
    # One function computes gradients through integers of all widths.
    for layout in sorted({"int8" if layout in INTEGER_LAYOUTS else layout for layout in layouts}):
        if DISABLE_JIT or is_warm(f"training {layout}"):
            continue
        with _compile_bar(progress, _TRAINING_FUNCTIONS, "about a minute"):
            _train_tiny_model(layout)
        mark_warm(f"training {layout}")


def warmup(progress: bool | None = True) -> None:
    """Compile the kernels for every kind of weights, file and cache into the user's compile cache, with progress bars.

    Loading a model or training on it compiles what is missing anyway, the first time after an installation or an
    upgrade. Files that mix 16-bit floats with integers are not among these kinds.
    """
    if DISABLE_JIT:
        return
    from ruvllm.kernels import KERNELS

    kinds = [("F32", layout) for layout in LAYOUTS] + [(dtype, layout_for("auto", dtype)) for dtype in BLOCKS]
    steps: list[Callable[[], None]] = [partial(compile_for, [kind], progress) for kind in kinds]
    for layout in (*LAYOUTS, "int5"):
        steps += [partial(compile_cache, [layout], kv, progress) for kv in KV_DTYPES]
    steps += [partial(compile_many, kv, progress) for kv in KV_DTYPES]
    steps += [partial(compile_training, [layout], progress) for layout in LAYOUTS]
    steps += [partial(_run_kernel, spec) for spec in KERNELS.values()]
    with tqdm(total=len(steps), desc="warming up", unit="kind", leave=False, disable=hidden(progress)) as bar:
        for step in steps:
            step()
            bar.update()


def _run_kernel(spec: KernelSpec) -> None:
    """Call a public kernel at the example sizes of its record: some take several threads."""
    takes_out = "out" in inspect.signature(spec.function).parameters
    for sizes in spec.examples:
        arguments = spec.example(np.random.default_rng(0), **sizes)
        result = spec.function(**arguments)
        if takes_out and "out" not in arguments:  # small calls with out= have code of their own
            spec.function(**arguments, out=result)


def _compile_steps(kinds: Iterable[tuple[str, str]]) -> list[Callable[[], object]]:
    """What a first load of a model of these kinds compiles, in independent steps; their order is for ``run_steps``."""
    layouts = {layout for _, layout in kinds}
    needed = operations_for(layouts, chosen_kv("auto", layouts))
    operations: list[Callable[[], object]] = [partial(getattr, operation, "address") for operation in needed]
    first = sum(_place(operation) < _BETWEEN for operation in needed)
    last = sum(_place(operation) <= _BETWEEN for operation in needed)
    return [*operations[:first], partial(_load_weights, kinds), *operations[first:last], _sample, *operations[last:]]


def operations_for(layouts: Iterable[str], kv: str, config: ModelConfig | None = None) -> list[CFunction]:
    """The operations of a model with these layouts, in the order in which they are compiled. config: LLaMA if None."""
    return sorted([*needed_operations(_tiny_config(config), sorted(layouts), kv), replay], key=_place)


def _place(operation: CFunction) -> int:
    return _PLACES.get(operation.__name__, _BETWEEN)


def _load_weights(kinds: Iterable[tuple[str, str]]) -> None:
    """Pack weights of these kinds, and take rows of them, as of embeddings."""
    for dtype, layout in kinds:
        weights = load_weights(_zeros("matrix", (16, 256), dtype), layout)
        weights.take(np.arange(2), np.empty((2, 256), np.float32))


def _sample() -> None:
    """Sample in every way."""

    def forward(ids: np.ndarray, cache: Any, last_only: bool, out: np.ndarray) -> None:
        out[:] = 0

    model = cast(Llama, SimpleNamespace(config=SimpleNamespace(vocab_size=512), forward=forward))
    cache = cast(KVCache, SimpleNamespace(ids=np.arange(64), length=64))
    for sampling in (Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1), Sampling()):
        list(generate(model, cache, np.arange(64), sampling, max_tokens=1, logprobs=2))


class _Nothing:
    """A file of zeros."""

    path = Path("zeros")

    def read(self, offset: int, count: int) -> np.ndarray:
        """``count`` read-only zeros, as in a mapped file."""
        zeros = np.zeros(count, np.uint8)
        zeros.flags.writeable = False
        return zeros

    def prefetch(self, offset: int, count: int) -> None:
        """There is nothing to read."""

    def release(self, offset: int, count: int) -> None:
        """There is nothing to release."""


def _zeros(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor of zeros, read as if it came from a file."""
    size = math.prod(shape[:-1]) * row_bytes(dtype, shape[-1])
    return Tensor(TensorInfo(name, shape, dtype, 0, size), cast(Source, _Nothing()))


class _ZeroWeights:
    """Every tensor of a configuration as zeros; the matrices cycle through these storage types."""

    def __init__(self, config: ModelConfig, dtypes: Iterable[str]) -> None:
        self._shapes = config.tensor_shapes()
        matrices = [name for name, shape in self._shapes.items() if len(shape) > 1]
        self._dtypes = dict(zip(matrices, itertools.cycle(dtypes), strict=False))

    def tensor(self, name: str) -> Tensor:
        """The tensor of a canonical name."""
        return _zeros(name, self._shapes[name], self._dtypes.get(name, "F32"))

    def __contains__(self, name: str) -> bool:
        return name in self._shapes


def _tiny_model(kinds: Iterable[tuple[str, str]], threads: int | None = None) -> Llama:
    """Two layers that have matrices of all these kinds, large enough for kernels to use several threads."""
    dtypes, layouts = zip(*kinds, strict=True)
    # A user chooses one layout for all matrices. int5 cannot be chosen: files of 5 bits are kept in it.
    weights = layouts[0] if len(set(layouts)) == 1 and layouts[0] in LAYOUTS else "auto"
    config = _tiny_config()
    return Llama(config, _ZeroWeights(config, dtypes), weights, threads)


def _tiny_config(config: ModelConfig | None = None) -> ModelConfig:
    """A small model, with the choices of ``config`` if given: one layer of each kind that it has."""
    tiny = ModelConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    if config is None:
        return tiny
    kinds = {
        (config.window(i), config.rope_index(i), config.has_experts(i)): i for i in range(config.num_hidden_layers)
    }
    layers = sorted(kinds.values())
    experts = config.experts
    if experts is not None:
        experts = replace(
            experts, count=4, per_token=2, intermediate_size=512,
            layers=tuple(i for i, layer in enumerate(layers) if config.has_experts(layer)),
            shared_intermediate_size=512 if experts.shared_intermediate_size else 0,
        )  # fmt: skip
    sizes = {name: getattr(tiny, name) for name in SIZES if name != "num_hidden_layers"}
    return replace(
        config, **sizes, num_hidden_layers=len(layers), rope=tiny.rope, local_rope=None, experts=experts,
        no_rope_layers=tuple(i for i, layer in enumerate(layers) if layer in config.no_rope_layers),
        layer_types=tuple(config.layer_types[layer] for layer in layers) if config.layer_types else (),
        bos_token_id=None, eos_token_ids=(), name="",
    )  # fmt: skip


def _run_tiny_model(kinds: Iterable[tuple[str, str]]) -> None:
    """Prefill and decode with matrices of these kinds."""
    model = _tiny_model(kinds)
    cache = model.new_cache(80)
    list(generate(model, cache, np.arange(64), Sampling(), max_tokens=2))
    cache.clear()
    list(generate(model, cache, np.arange(4), Sampling(), max_tokens=2))


def _train_tiny_model(layout: str) -> None:
    """A step and an evaluation, with many tokens and with few."""
    from ruvllm.model.lora import TARGETS, LoraConfig, MicroLora
    from ruvllm.model.training import TrainingConfig, clip
    from ruvllm.model.training_data import Example

    for threads, tokens in ((None, 80), (None, 3), (1, 3)):
        lora = MicroLora(_tiny_model([("Q8_0" if layout in INTEGER_LAYOUTS else "F32", layout)], threads))
        example = Example(np.arange(tokens), np.ones(tokens, bool))
        with limited_to(threads or num_threads()):
            trainer = lora.fit(
                [example], config=LoraConfig(8, targets=TARGETS), training=TrainingConfig(steps=1, warmup=0)
            )
            trainer.evaluate()
            clip(np.ones_like(trainer.m), 1.0)  # the gradient through zero weights is too small to be clipped


@contextmanager
def _compile_bar(progress: bool | None, functions: int = _FUNCTIONS, takes: str = "some 10 s") -> Iterator[None]:
    """A bar that advances with each function that numba has compiled meanwhile."""
    bar = tqdm(
        total=functions, desc="compiling kernels (first run only)", unit="function", leave=False,
        disable=hidden(progress),
    )  # fmt: skip
    if bar.disable:
        logger.info("compiling kernels for this kind of model: %s, the first time only", takes)

    def advance() -> None:
        bar.total = max(bar.total, bar.n + 1)
        bar.update()

    with bar, on_each_compilation(advance):
        yield
