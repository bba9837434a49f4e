"""KVPool: keys and values of many sequences, in blocks that sequences take, share and give back."""

from __future__ import annotations

from ruvllm.kernels.attention.tile import CHUNK
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import require_memory
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_arrays import KVArrays, require_kv
from ruvllm.model.kv_size import key_value_bytes

BLOCK = CHUNK  # positions of a block: attention looks up one block for each chunk


class KVPool(KVArrays):
    """``blocks`` blocks of BLOCK positions, each of every layer: windowed layers keep all positions, too.

    As in a ``KVCache`` of so many positions; block b has the positions from BLOCK b on. Memory grows as blocks are
    first used. While it grows, there are copies of what it holds, of an eighth of all blocks at the most.

    Raises:
        ValueError: blocks < 1, or an unknown ``kv``.
        InsufficientMemoryError: full, it would not fit into the free memory.
    """

    def __init__(self, config: ModelConfig, blocks: int, kv: str = "f32") -> None:
        super().__init__(config, kv)
        if blocks < 1:
            raise ValueError(f"blocks: expected a positive integer, found {blocks}")
        require_memory(blocks * block_bytes(config, kv), f"KV cache of {blocks} blocks of {BLOCK} tokens")
        self.blocks = blocks
        self.max_tokens = blocks * BLOCK
        self._reserved = 0  # blocks that there is memory for

    def reserve(self, blocks: int) -> None:
        """Have memory for the first ``blocks`` blocks: at least twice as much as before, if it is not enough."""
        if blocks > self._reserved:
            wanted = max(blocks, 2 * self._reserved)
            # The larger arrays may take all their memory at once, on huge pages: what is copied must be little then.
            self._reserved = wanted if 8 * wanted <= self.blocks else self.blocks
            self.grow([self._reserved * BLOCK] * self.config.num_hidden_layers)

    def copy(self, block: int, to: int, positions: int) -> None:
        """Copy the first ``positions`` of a block to another."""
        self.reserve(max(block, to) + 1)
        lines, per_block = -(-positions // LANES), BLOCK // LANES
        for layer in range(len(self.keys)):
            keys, values = self.keys[layer], self.values[layer]
            source, target = block * per_block, to * per_block
            keys[:, target : target + lines] = keys[:, source : source + lines]
            values[:, to * BLOCK : to * BLOCK + positions] = values[:, block * BLOCK : block * BLOCK + positions]

    def __repr__(self) -> str:
        total = self.blocks * block_bytes(self.config, self.dtype)
        return f"KVPool({self.blocks} blocks of {BLOCK} tokens, {self.dtype}, {total / 1e6:.1f} MB)"


def block_bytes(config: ModelConfig, kv: str = "f32") -> int:
    """Bytes of one block. Raises ValueError for an unknown ``kv``."""
    require_kv(kv)
    return BLOCK * config.num_hidden_layers * config.num_key_value_heads * key_value_bytes(config, kv)


def blocks_for(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // BLOCK)
