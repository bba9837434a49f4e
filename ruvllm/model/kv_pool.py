"""KVPool: keys and values of many sequences, in blocks that sequences take, share and give back."""

from __future__ import annotations

import numpy as np

from ruvllm.kernels.attention.kv import key_rows, padded
from ruvllm.kernels.attention.tile import CHUNK
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import aligned_zeros, require_memory
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_cache import DTYPES, require_kv
from ruvllm.model.kv_size import key_value_bytes

BLOCK = CHUNK  # positions of a block: attention looks up one block for each chunk


class KVPool:
    """``blocks`` blocks of BLOCK positions, each of every layer: windowed layers keep all positions, too.

    Of each layer keys (KV, B, K, 16) and values (KV, 16 B, DV), as in a ``KVCache`` of so many positions; block b has
    the positions from BLOCK b on. Memory of blocks that were never used is never touched.

    Raises:
        ValueError: blocks < 1, or an unknown ``kv``.
        InsufficientMemoryError: full, it would not fit into the free memory.
    """

    def __init__(self, config: ModelConfig, blocks: int, kv: str = "f32") -> None:
        require_kv(kv)
        if blocks < 1:
            raise ValueError(f"blocks: expected a positive integer, found {blocks}")
        require_memory(blocks * block_bytes(config, kv), f"KV cache of {blocks} blocks of {BLOCK} tokens")
        layers, heads, dim, dtype = config.num_hidden_layers, config.num_key_value_heads, config.head_dim, DTYPES[kv]
        self.config, self.dtype, self.blocks = config, kv, blocks
        self.max_tokens = blocks * BLOCK
        self.keys = aligned_zeros((layers, heads, self.max_tokens // LANES, key_rows(dim, dtype), LANES), dtype)
        self.values = aligned_zeros((layers, heads, self.max_tokens, padded(dim)), dtype)
        addresses = [(k.ctypes.data, v.ctypes.data, k.shape[1]) for k, v in zip(self.keys, self.values, strict=True)]
        self.table = np.array(addresses, np.int64)  # (L, 3), for a tape

    def copy(self, block: int, to: int, positions: int) -> None:
        """Copy the first ``positions`` of a block to another."""
        lines, per_block = -(-positions // LANES), BLOCK // LANES
        for layer in range(len(self.keys)):
            keys, values = self.keys[layer], self.values[layer]
            source, target = block * per_block, to * per_block
            keys[:, target : target + lines] = keys[:, source : source + lines]
            values[:, to * BLOCK : to * BLOCK + positions] = values[:, block * BLOCK : block * BLOCK + positions]

    def __repr__(self) -> str:
        total = self.keys.nbytes + self.values.nbytes
        return f"KVPool({self.blocks} blocks of {BLOCK} tokens, {self.dtype}, {total / 1e6:.1f} MB)"


def block_bytes(config: ModelConfig, kv: str = "f32") -> int:
    """Bytes of one block. Raises ValueError for an unknown ``kv``."""
    require_kv(kv)
    return BLOCK * config.num_hidden_layers * config.num_key_value_heads * key_value_bytes(config, kv)


def blocks_for(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // BLOCK)
