"""The decode plan: the addresses and buffers with which one compiled call takes a token through a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels._team import SYNC_SIZE
from ruvllm.kernels._threads import launch, threads_for
from ruvllm.kernels.cached_attention import NO_WINDOW
from ruvllm.kernels.decode import LAYER_FIELDS, decode_member, decode_parallel
from ruvllm.kernels.quant import GROUP
from ruvllm.kernels.token_attention import CHUNK, chunk_count, partial_width
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_cache import KVCache

if TYPE_CHECKING:
    from ruvllm.model.llama import Llama


class DecodePlan:
    """Where the weights of a model are. Holds references to all of them, so that the addresses stay valid."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.layers = np.zeros((len(model.layers), LAYER_FIELDS), np.int64)
        for row, layer in zip(self.layers, model.layers, strict=True):
            matrices = [matrix.address_fields() for matrix in layer.linears().values()]
            norms = [layer.attn_norm.ctypes.data, layer.mlp_norm.ctypes.data]
            row[:] = [*(field for fields in matrices for field in fields), *norms]
        self.head = np.array([model.head.address_fields()], np.int64)

    def run(self, cache: KVCache, buffers: DecodeBuffers, cos: np.ndarray, sin: np.ndarray, logits: np.ndarray) -> None:
        """Take the embedding in buffers.x through all layers at position cache.length, and write logits (V,)."""
        config, b = self.model.config, buffers
        b.position[0] = cache.length
        b.sync[:] = 0
        window = NO_WINDOW if config.sliding_window is None else config.sliding_window
        threads = min(threads_for(1, 0, b.threads), b.threads)
        arguments = (
            self.layers, self.head, self.model.norm, np.float32(config.rms_norm_eps), window,
            np.float32(config.head_dim**-0.5), b.position, cos, sin, cache.keys, cache.values, b.x, b.q, b.k, b.v,
            b.gate, b.up, b.sums_of, b.partial, b.own, b.xq, b.xs, b.sums, b.totals, b.scratch, logits, b.sync,
        )  # fmt: skip
        if threads == 1:
            decode_member(*arguments, 1)
        else:
            launch(decode_parallel, *arguments, threads)


class DecodeBuffers:
    """The buffers of one decode step, which belong to a KV cache: allocated once, then nothing is."""

    def __init__(self, config: ModelConfig, threads: int, max_tokens: int) -> None:
        E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        widest = -(-max(E, F, heads * D) // GROUP)  # groups of the widest input
        self.threads = threads
        self.position = np.zeros(1, np.int64)
        self.x, self.sums_of = aligned_empty((1, E)), aligned_empty((1, E))
        self.q = aligned_empty((1, heads, D))
        self.k, self.v = aligned_empty((1, kv_heads, D)), aligned_empty((1, kv_heads, D))
        self.gate, self.up = aligned_empty(F), aligned_empty(F)
        self.partial = aligned_empty((heads, chunk_count(max_tokens), partial_width(D)))
        self.own = aligned_empty((threads, max(E, heads * D)))
        self.xq = aligned_empty((threads, widest * GROUP), np.int8)
        self.xs, self.totals = aligned_empty((threads, widest)), aligned_empty((threads, widest))
        self.sums = aligned_empty((threads, widest), np.int32)
        self.scratch = aligned_empty((threads, heads // kv_heads * CHUNK))
        self.sync = aligned_empty(SYNC_SIZE, np.int64)
