"""The forward plan: the addresses and buffers with which one compiled call takes tokens through a whole model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ruvllm.kernels import forward as f
from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels._region import Region
from ruvllm.kernels._team import sync_size
from ruvllm.kernels._threads import num_threads
from ruvllm.kernels._tile import LANES
from ruvllm.kernels.cached_attention import NO_WINDOW
from ruvllm.kernels.low_rank import PARTS
from ruvllm.kernels.panels import panel_count
from ruvllm.kernels.quant_layout import GROUP, OFFSETS, OUTLIERS, SIDE
from ruvllm.kernels.token_attention import chunk_count, partial_width
from ruvllm.model.kv_cache import DTYPES as KV_DTYPES
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.low_rank import AdapterSet
from ruvllm.model.weights import FLOAT_LAYOUTS, INTEGER_LAYOUTS

if TYPE_CHECKING:
    from ruvllm.model.config import ModelConfig
    from ruvllm.model.llama import Llama


# Multiply-adds of one compiled call, in whole layers: 0.2 s at 20 GFLOP/s, which any core does. One token of a small
# model takes one call for all layers, a prompt of a large one a call for each.
MACS_AT_ONCE = 2_000_000_000


# Sets of integer layouts that have a region of their own: files mix them, and each region is compiled apart.
_MIXTURES = ((), (f.Q8,), (f.Q4, f.Q8), (f.Q4, f.Q5, f.Q8))


def region_for(layouts: Iterable[str], kv: str) -> Region:
    """The region for a model whose matrices have these layouts, at most one of them float, and a KV cache of dtype kv.

    It is the smallest that serves them, because a kind of matrix takes seconds to compile.
    """
    layouts = set(layouts)
    integers = {INTEGER_LAYOUTS[layout] for layout in layouts & INTEGER_LAYOUTS.keys()}
    floats = [FLOAT_LAYOUTS[layout] for layout in layouts & FLOAT_LAYOUTS.keys()]
    mixture = next(mixture for mixture in _MIXTURES if integers <= set(mixture))
    return f.forward_region(floats[0] if floats else None, mixture, KV_DTYPES[kv])


class ForwardPlan:
    """Where the weights of a model are. Holds references to all of them, so that the addresses stay valid."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        config = model.config
        self.layers = np.zeros((len(model.layers), f.LAYER_FIELDS), np.int64)
        for row, layer in zip(self.layers, model.layers, strict=True):
            matrices = [matrix.address_fields() for matrix in layer.linears().values()]
            norms = [layer.attn_norm.ctypes.data, layer.mlp_norm.ctypes.data]
            row[:] = [*(field for fields in matrices for field in fields), *norms]
        # The adapters pointed at by the latest pass, and the table that points at them.
        self._adapted: tuple[AdapterSet | None, np.ndarray] = (None, self.layers)
        self.head = np.array(model.head.address_fields(), np.int64)
        self.layouts = model.layouts
        self.layer_weights = sum(matrix.rows * matrix.columns for matrix in model.layers[0].linears().values())
        self.floats = np.array([config.rms_norm_eps, config.head_dim**-0.5], np.float32)

    def run(
        self, ids: np.ndarray, cache: KVCache, buffers: ForwardBuffers, cos: np.ndarray, sin: np.ndarray,
        logits: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Take ids through all layers, appending to the cache; write logits (rows, V) of the last 1 or all of them."""
        table, T = buffers.table, len(ids)
        adapters = self.model.adapters  # looked at once: another thread may swap them meanwhile
        layers = self._layers_with(adapters)
        table[f.LAYERS] = layers.ctypes.data
        if adapters is not None:
            buffers.reserve_rank(adapters.rank)
        for row, token in zip(buffers.x, ids, strict=False):
            row[:] = self.model.embed.row(int(token))
        buffers.positions[:T] = np.arange(cache.length, cache.length + T) if T > 1 else cache.length
        table[f.TOKENS] = T
        table[f.LOGITS] = 0 if logits is None else logits.ctypes.data
        table[f.COS], table[f.SIN] = cos.ctypes.data, sin.ctypes.data
        threads = table[f.THREADS] = min(num_threads(), buffers.threads)
        region, count = region_for(self.layouts, cache.dtype), len(self.layers)
        step = max(1, MACS_AT_ONCE // (T * self.layer_weights))
        for first in range(0, count, step):  # Ctrl-C is seen between calls
            end = min(first + step, count)
            table[f.FIRST_LAYER], table[f.LAYER_END] = first, end
            table[f.LOGIT_ROWS] = 0 if logits is None or end < count else len(logits)
            buffers.sync[:] = 0
            region.run(table, int(threads))

    def _layers_with(self, adapters: AdapterSet | None) -> np.ndarray:
        """The layers' table with the addresses of these adapters in it."""
        held, table = self._adapted
        if held is not adapters:
            table = self.layers
            if adapters is not None:
                table = self.layers.copy()
                table[:, f.ADAPTER : f.MATRIX_FIELDS : f.FIELDS] = adapters.addresses
            self._adapted = adapters, table
        return table


class ForwardBuffers:
    """The buffers of a forward pass of up to ``tokens`` tokens; they belong to a KV cache and are allocated once."""

    def __init__(self, plan: ForwardPlan, cache: KVCache, tokens: int, threads: int) -> None:
        config = plan.model.config
        E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = max(tokens, threads)  # of what is one row per token, or one per thread for a single token
        groups = -(-max(E, F, heads * D) // GROUP)
        sides = rows + SIDE  # the last block of tokens may not be full
        chunks = chunk_count(cache.max_tokens)
        scratch = f.thread_scratch(D, heads // kv_heads)
        self.tokens, self.threads, self.rows = tokens, threads, rows
        self.rank = 0  # of the widest adapters that there is room for
        self.x = aligned_empty((rows, E))
        self.positions = np.zeros(tokens, np.int64)
        self.sync = aligned_empty(sync_size(threads), np.int64)
        window = NO_WINDOW if config.sliding_window is None else config.sliding_window
        numbers = {
            f.HIDDEN: E, f.FEED: F, f.HEADS: heads, f.KV_HEADS: kv_heads, f.DIM: D,
            f.VOCABULARY: config.vocab_size, f.WINDOW: window, f.CHUNKS: chunks, f.WIDEST: groups * GROUP,
            f.SCRATCH_SIZE: scratch, f.BLOCKS: cache.keys.shape[2], f.KEY_ROWS: cache.keys.shape[3],
            f.WIDE: cache.values.shape[3],
            f.KV_BYTES: cache.keys.itemsize, f.SYNC_SIZE: self.sync.size,
        }  # fmt: skip
        # Kept, because the table holds nothing but their addresses.
        self.arrays = {
            f.SYNC: self.sync, f.FLOATS: plan.floats, f.HEAD: plan.head, f.NORM: plan.model.norm,
            f.POSITIONS: self.positions, f.KEYS: cache.keys, f.VALUES: cache.values,
            f.X: self.x, f.SUMS_OF: aligned_empty((tokens, E)), f.INPUT: aligned_empty((rows, E)),
            f.Q: aligned_empty((tokens, heads * D)), f.ATTENDED: aligned_empty((rows, heads * D)),
            f.K: aligned_empty((tokens, kv_heads * D)), f.V: aligned_empty((tokens, kv_heads * D)),
            f.GATE: aligned_empty((tokens, F)), f.UP: aligned_empty((tokens, F)),
            f.ACTIVATED: aligned_empty((threads, F)),
            f.PARTIAL: aligned_empty((heads, chunks, partial_width(D))),
            f.XQ: aligned_empty((sides, groups * GROUP), np.int8), f.XS: aligned_empty((sides, groups)),
            f.OFFSETS_OF: aligned_empty((sides, groups, OFFSETS), np.int32), f.TOTALS: aligned_empty((sides, groups)),
            f.OUTLIERS_OF: aligned_empty((rows, OUTLIERS, 2)), f.SCRATCH: aligned_empty((threads, scratch)),
        }  # fmt: skip
        self.table = np.zeros(f.TABLE_SIZE, np.int64)
        for index, number in numbers.items():
            self.table[index] = number
        for index, array in self.arrays.items():
            self.table[index] = array.ctypes.data

    def reserve_rank(self, rank: int) -> None:
        """Make room for adapters of this rank."""
        if rank > self.rank:
            size = (PARTS + self.rows) * panel_count(rank) * LANES
            low = self.arrays[f.LOW] = aligned_empty((f.AT_ONCE, size))
            self.table[f.LOW], self.table[f.LOW_SIZE] = low.ctypes.data, size
            self.rank = rank


def working_bytes(config: ModelConfig, tokens: int) -> int:
    """About what ForwardBuffers for ``tokens`` tokens take, threads' scratch apart."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    floats = 3 * E + 2 * F + 2 * heads * D + 2 * kv_heads * D
    groups = -(-max(E, F, heads * D) // GROUP)
    return tokens * (4 * floats + groups * (GROUP + 8 + 4 * OFFSETS) + 8 * OUTLIERS)
