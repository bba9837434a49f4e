"""The decode plan: the addresses and buffers with which one compiled call takes a token through a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ruvllm.kernels import decode as d
from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels._team import SYNC_SIZE
from ruvllm.kernels._threads import num_threads
from ruvllm.kernels.cached_attention import NO_WINDOW
from ruvllm.kernels.quant import GROUP
from ruvllm.kernels.token_attention import CHUNK, chunk_count, partial_width
from ruvllm.model.kv_cache import KVCache

if TYPE_CHECKING:
    from ruvllm.model.llama import Llama


class DecodePlan:
    """Where the weights of a model are. Holds references to all of them, so that the addresses stay valid."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        config = model.config
        self.layers = np.zeros((len(model.layers), d.LAYER_FIELDS), np.int64)
        for row, layer in zip(self.layers, model.layers, strict=True):
            matrices = [matrix.address_fields() for matrix in layer.linears().values()]
            norms = [layer.attn_norm.ctypes.data, layer.mlp_norm.ctypes.data]
            row[:] = [*(field for fields in matrices for field in fields), *norms]
        self.head = np.array(model.head.address_fields(), np.int64)
        self.floats = np.array([config.rms_norm_eps, config.head_dim**-0.5], np.float32)

    def run(self, cache: KVCache, buffers: DecodeBuffers, cos: np.ndarray, sin: np.ndarray, logits: np.ndarray) -> None:
        """Take the embedding in buffers.x through all layers at position cache.length, and write logits (V,)."""
        table = buffers.table
        table[d.POSITION] = cache.length
        table[d.COS], table[d.SIN] = cos.ctypes.data, sin.ctypes.data
        table[d.LOGITS] = logits.ctypes.data
        buffers.sync[:] = 0
        threads = table[d.THREADS] = min(num_threads(), buffers.threads)
        d.decode_region.run(table, int(threads))


class DecodeBuffers:
    """The buffers of one decode step, which belong to a KV cache: allocated once, then nothing is."""

    def __init__(self, plan: DecodePlan, cache: KVCache, threads: int) -> None:
        config = plan.model.config
        E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        groups = -(-max(E, F, heads * D) // GROUP)
        widest = groups * GROUP
        chunks = chunk_count(cache.max_tokens)
        self.threads = threads
        self.x = aligned_empty(E)
        self.sync = aligned_empty(SYNC_SIZE, np.int64)
        window = NO_WINDOW if config.sliding_window is None else config.sliding_window
        numbers = {
            d.LAYER_COUNT: len(plan.layers), d.HIDDEN: E, d.FEED: F, d.HEADS: heads, d.KV_HEADS: kv_heads, d.DIM: D,
            d.VOCABULARY: config.vocab_size, d.WINDOW: window, d.CHUNKS: chunks, d.WIDEST: widest,
            d.BLOCKS: cache.keys.shape[2], d.WIDE: cache.values.shape[3], d.KV_HALF: int(cache.keys.dtype == np.uint16),
        }  # fmt: skip
        # Kept, because the table holds nothing but their addresses.
        self.arrays = {
            d.SYNC: self.sync, d.FLOATS: plan.floats, d.LAYERS: plan.layers, d.HEAD: plan.head, d.NORM: plan.model.norm,
            d.KEYS: cache.keys, d.VALUES: cache.values, d.X: self.x, d.SUMS_OF: aligned_empty(E),
            d.Q: aligned_empty(heads * D), d.K: aligned_empty(kv_heads * D), d.V: aligned_empty(kv_heads * D),
            d.GATE: aligned_empty(F), d.UP: aligned_empty(F), d.OWN: aligned_empty((threads, widest)),
            d.PARTIAL: aligned_empty((heads, chunks, partial_width(D))),
            d.XQ: aligned_empty((threads, widest), np.int8), d.XS: aligned_empty((threads, groups)),
            d.SUMS: aligned_empty((threads, groups), np.int32), d.TOTALS: aligned_empty((threads, groups)),
            d.SCRATCH: aligned_empty((threads, heads // kv_heads * CHUNK)),
        }  # fmt: skip
        self.table = np.zeros(d.TABLE_SIZE, np.int64)
        for index, number in numbers.items():
            self.table[index] = number
        for index, array in self.arrays.items():
            self.table[index] = array.ctypes.data
