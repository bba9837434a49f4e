"""Llama: token ids to logits, of LLaMA and of every model that a ``ModelConfig`` describes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np

import ruvllm.kernels as K
from ruvllm.errors import printable
from ruvllm.kernels.attention.prefill import prompt_scratch_size
from ruvllm.kernels.jit.decorators import DISABLE_JIT
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.threads.pool import limited_to, most_threads, physical_cores
from ruvllm.model.checks import is_integer, require
from ruvllm.model.config import ModelConfig
from ruvllm.model.exchange import Alone, Exchange
from ruvllm.model.experts import MixtureOfExperts
from ruvllm.model.fingerprint import fingerprint
from ruvllm.model.hooks import active
from ruvllm.model.kv_cache import Filling, KVCache
from ruvllm.model.kv_size import PREFILL_TOKENS, chosen_kv
from ruvllm.model.layer import Decoder, TransformerLayer, parts
from ruvllm.model.linear import Linear
from ruvllm.model.low_rank import AdapterSet, Factors
from ruvllm.model.names import Point, points_of
from ruvllm.model.ops.eager import Eager
from ruvllm.model.random_weights import RandomWeights
from ruvllm.model.replay import Parallel, Runner, Tapes, Working
from ruvllm.model.rope import RopeTables
from ruvllm.model.weights import FLOAT_LAYOUTS, LAYOUTS, WeightTensor, layout_for

logger = logging.getLogger(__name__)

LAYER_MACS = 25_000_000_000  # the most multiply-adds per layer and pass: Ctrl-C is seen between two layers
WEIGHTS = ("auto", *LAYOUTS)


class Weights(Protocol):
    """Named tensors: a ``checkpoint.Checkpoint`` or ``RandomWeights``."""

    def tensor(self, name: str) -> WeightTensor:
        """The tensor of a canonical name."""
        ...

    def __contains__(self, name: str) -> bool: ...


class Llama:
    """A model: embedding, layers, norm, head; its configuration says which family it is.

    Args:
        config: sizes and variants.
        weights: where the tensors come from; None makes random ones from ``seed``.
        layout: "auto" keeps the precision of the file; "f32", "f16", "bf16", "int8", "int4" convert all matrices.
        threads: None uses the physical cores that this process may run on; at most those of numba's pool are used.
        progress: called with the number of weights read, as they are.
        architecture: the layer code: ``Decoder``, or a subclass that overrides what differs.

    Raises:
        ValueError: unknown layout, or threads < 1.
    """

    exchange: Exchange = Alone()  # with the ranks that hold the other parts of the model: see ``model.split``

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights | None = None,
        layout: str = "auto",
        threads: int | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        architecture: type[Decoder] = Decoder,
    ) -> None:
        if layout not in WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, found {layout!r}")
        self.config = config
        self.threads = _checked_threads(threads)
        source: Weights = RandomWeights(config, seed) if weights is None else weights
        with limited_to(self.threads):
            self.decoder = architecture(config, _Loader(source, layout, progress, self.exchange))
        # One parallel region replays the whole model; False runs each operation from Python, with the same results.
        # Without the JIT it is off, so that a debugger steps through the layers.
        self.fused = not DISABLE_JIT
        self.runner: Runner = Parallel()
        self.adapters: AdapterSet | None = None  # see ``model.lora``
        self.layer_weights = max(_weights(layer) for layer in self.decoder.layers)  # the largest layer's
        self._tapes = Tapes(self)
        self.rope = RopeTables(config)

    @property
    def whole_config(self) -> ModelConfig:
        """The configuration of the whole model, of which this one may be a part."""
        return self.config

    @property
    def prefill_tokens(self) -> int:
        """Tokens of one forward pass: PREFILL_TOKENS, but whole tiles of six fewer where a layer is very large."""
        return max(6, min(PREFILL_TOKENS, LAYER_MACS // self.layer_weights // 6 * 6))

    def new_cache(self, max_tokens: int, kv: str = "auto") -> KVCache:
        """A KV cache for ``max_tokens`` positions. kv: "f32", "f16", "int8"; "auto": see ``chosen_kv``."""
        return KVCache(self.config, max_tokens, chosen_kv(kv, self.layouts))

    def identity(self) -> str:
        """Equal for models whose keys and values of a token are the same bits."""
        return fingerprint(self)

    def forked(self, cache: KVCache, fork: KVCache) -> None:
        """Called after each fork of a cache that this model fills."""

    def forward(
        self, ids: Iterable[int] | np.ndarray, cache: KVCache, last_only: bool = False,
        out: np.ndarray | None = None, ops: Callable[..., Eager] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Logits of the next token after each of ``ids``, which are appended to the cache.

        Args:
            ids: (T,) token ids.
            cache: keys and values of what came before; grows by T.
            last_only: only the logits after the last token.
            out: float32 (T, V), or (V,) with last_only, to write into.
            ops: ``Eager`` or a subclass of it, with which the layers then run in Python; None: the tape, if ``fused``.

        Returns:
            float32 (T, V), or (V,) with last_only.

        Raises:
            TypeError: ids are not integers.
            ValueError: no ids, or an id outside the vocabulary; a cache of another model.
            ContextFullError: they do not fit into the cache, which stays as it was.
            RuntimeError: another thread is using the cache.
        """
        ids = self.checked_ids(ids)
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a KVCache, found {type(cache).__name__}")
        with cache.in_use():
            cache.claim(self)
            return self._forward_all(ids, cache, last_only, out, ops or (None if self.fused else Eager))

    def _forward_all(
        self, ids: np.ndarray, cache: KVCache, last_only: bool, out: np.ndarray | None,
        ops: Callable[..., Eager] | None,
    ) -> np.ndarray:  # fmt: skip
        """``forward`` in passes of equal size: a short last pass would read all weights for a few tokens."""
        cache.require_free(len(ids))
        V = self.config.vocab_size
        logits = K.check.output("out", out, (V,) if last_only else (len(ids), V))
        before = cache.length
        passes = -(-len(ids) // self.prefill_tokens)
        size = -(-len(ids) // (6 * passes)) * 6  # whole tiles of six
        try:
            with limited_to(self.threads):
                for lo in range(0, len(ids), size):
                    part = ids[lo : lo + size]
                    last = lo + len(part) == len(ids)
                    rows = logits[lo : lo + len(part)] if not last_only else logits[None] if last else None
                    self._forward(part, cache, rows, ops)
        except BaseException:  # Ctrl-C between two kernels: the tokens are not in the cache
            cache.rewind(before)
            raise
        return logits

    def _forward(
        self, ids: np.ndarray, cache: KVCache, logits: np.ndarray | None, ops: Callable[..., Eager] | None
    ) -> None:
        """Append ids to the cache; write the logits after the last ``len(logits)`` of them (1 or all)."""
        start, end = cache.length, cache.length + len(ids)
        cos, sin = (table[:, start:end] for table in self.rope.upto(end, cache.max_tokens))
        hooks = active(self)
        if hooks is not None:
            hooks.begin(cache, ids)
        cache.fill(self.filling)
        cache.reserve(end)
        if ops is None:
            working = cache.buffers_for("fused", len(ids), lambda n: Working(self, cache, n, self.threads))
            working.run(ids, cos, sin, logits)
        else:
            scratch = cache.buffers_for("eager", len(ids), lambda n: _Scratch(n, self.threads, self.config.head_dim))
            positions = np.arange(start, end)
            eager = ops(cache, positions, cos, sin, scratch.floats, logits, self.adapters)
            eager.hooks = {} if hooks is None else hooks.functions
            self.decoder(eager, self.embedded(ids))
        cache.ids[start:end] = ids
        cache.length = end

    def embedded(self, ids: np.ndarray) -> np.ndarray:
        """The embeddings (T, E) of token ids (T,)."""
        return self.decoder.embed.take(ids, aligned_empty((len(ids), self.config.hidden_size)))

    def unembed(self, x: np.ndarray) -> np.ndarray:
        """Logits (T, V) of a residual stream (T, E) after any layer: the model's last norm and head."""
        logits, none = np.empty((len(x), self.config.vocab_size), np.float32), np.empty(0, np.float32)
        with limited_to(self.threads):
            self.decoder.unembed(Eager(self.new_cache(1), np.arange(0), none, none, none, logits), x)
        return logits

    def pack_adapters(self, factors: Mapping[str, Factors]) -> AdapterSet:
        """Adapters as ``set_adapters`` takes them, from the factors of each matrix."""
        rounded = not any(linear.layout in FLOAT_LAYOUTS for linear in self.linears().values())
        return AdapterSet(self.config.num_hidden_layers, factors, rounded, self._held)

    def _held(self, name: str, factors: Factors) -> Factors:
        """The part of an adapter for this model's part of a matrix."""
        return factors

    def set_adapters(self, adapters: AdapterSet | None) -> None:
        """Set the adapters from the next token on; see ``model.lora``, which makes such sets."""
        self.adapters = adapters

    def weights_changed(self) -> None:
        """Must be called after a matrix got new weights: their addresses are looked up again."""
        self._tapes = Tapes(self)

    @property
    def tapes(self) -> Tapes:
        """What is replayed: with the hooks of this thread, if it has any."""
        hooks = active(self)
        return self._tapes if hooks is None else hooks.tapes(self._tapes)

    @cached_property
    def points(self) -> dict[str, Point]:
        """The named arrays of the model: see ``model.names``."""
        return points_of(self.decoder, self.config)

    @property
    def filling(self) -> Filling:
        """What decides the keys and values of a token: weights, adapters, and the edits of this thread."""
        hooks = active(self)
        adapters = None if self.adapters is None else weakref.ref(self.adapters)
        edits = () if hooks is None else [weakref.ref(edit) for edit in hooks.edits]
        return weakref.ref(self._tapes), adapters, *edits

    def checked_ids(self, ids: Any, name: str = "ids") -> np.ndarray:
        """Token ids as int64 (T,), T >= 1. Raises TypeError for anything but integers, ValueError outside 0 .. V-1."""
        ids = K.check.integers(name, ids if hasattr(ids, "__len__") or not isinstance(ids, Iterable) else list(ids))
        if not len(ids):
            raise ValueError(f"{name}: expected at least one token id, found none")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise ValueError(f"{name}: expected token ids from 0 to {self.config.vocab_size - 1}, found {wrong}")
        return ids

    def linears(self) -> dict[str, Linear]:
        """Every matrix by its canonical name; a tied head appears once, as ``embed``."""
        return self.decoder.linears()

    @property
    def layouts(self) -> set[str]:
        """The layouts of the matrices, which decide what is compiled for a model."""
        return {linear.layout for linear in self.linears().values()}

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        vectors = sum(part.nbytes for part in parts(self.decoder) if isinstance(part, np.ndarray))
        return vectors + sum(linear.nbytes for linear in self.linears().values())

    def __repr__(self) -> str:
        name = printable(self.config.name or "random", 60)
        return f"Llama({name}, {len(self.decoder.layers)} layers, {self.nbytes / 1e6:.0f} MB)"


def choose_layouts(config: ModelConfig, weights: Weights, layout: str) -> dict[str, str]:
    """The layout of every matrix."""
    matrices = [name for name, shape in config.tensor_shapes().items() if len(shape) == 2]
    return {name: layout_for(layout, weights.tensor(name).dtype) for name in matrices}


class _Loader:
    """Reads a model's parameters from tensors, converting matrices to their layouts; the ``Parameters`` of a layer."""

    def __init__(
        self, source: Weights, layout: str, progress: Callable[[int], None] | None, exchange: Exchange
    ) -> None:
        self.source, self.layout, self.progress, self.exchange = source, layout, progress, exchange

    def linear(self, name: str) -> Linear:
        """The matrix, and its bias where the source has one."""
        tensor, bias_name = self.source.tensor(name), f"{name}_bias"
        bias = self.source.tensor(bias_name) if bias_name in self.source else None
        loaded = Linear.load(tensor, layout_for(self.layout, tensor.dtype), bias, name)
        for read in (tensor, bias):
            if read is not None:
                read.release()
        if self.progress:
            self.progress(tensor.shape[0] * tensor.shape[1])
        return loaded

    def vector(self, name: str) -> np.ndarray:
        """The vector as float32."""
        tensor = self.source.tensor(name)
        loaded = np.array(tensor.float32().reshape(-1))
        tensor.release()
        return loaded


def _weights(layer: TransformerLayer) -> int:
    """Weights that one token meets in the matrices of a layer."""
    idle = layer.mlp.idle_weights if isinstance(layer.mlp, MixtureOfExperts) else 0
    return sum(part.size for part in parts(layer) if isinstance(part, Linear)) - idle


class _Scratch:
    """Scratch buffers of attention, one per thread."""

    def __init__(self, tokens: int, threads: int, dim: int) -> None:
        self.tokens, self.floats = tokens, aligned_empty((threads, prompt_scratch_size(dim)))


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return physical_cores()
    require("threads", threads, is_integer(threads) and threads >= 1, "a positive integer")
    most = most_threads()
    if threads > most:
        logger.warning("threads: expected at most %d in this process, found %d", most, threads)
    return min(int(threads), most)
