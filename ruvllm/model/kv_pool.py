"""KVPool: keys and values of many sequences, in blocks that sequences take, share and give back."""

from __future__ import annotations

import numpy as np

from ruvllm.kernels.attention.tile import CHUNK
from ruvllm.kernels.memory import require_memory
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_blocks import Block, BlockLayout, require_kv
from ruvllm.model.kv_size import PREFILL_TOKENS, group_bytes, group_windows

BLOCK = CHUNK  # positions of a block: attention looks up one block for each chunk


class KVPool:
    """Blocks of BLOCK positions, each of one group of layers (``BlockLayout``), of at most ``memory`` bytes in all.

    Blocks are allocated when they are first used, and never moved: a pool holds the most that was in use at once, and
    never more than its memory.

    Raises:
        ValueError: memory for less than one block of each group, or an unknown ``kv``.
        InsufficientMemoryError: that much memory is not free.
    """

    def __init__(self, config: ModelConfig, memory: int, kv: str = "f32") -> None:
        self.config, self.dtype, self.memory = config, kv, memory
        self.layout = BlockLayout(config, kv)
        if memory < sum(self.layout.nbytes):
            raise ValueError(f"memory: expected at least {sum(self.layout.nbytes)} bytes, found {memory}")
        fitting = (n for n in range(blocks_for(config.max_position_embeddings), 0, -1) if self.bytes_for(n) <= memory)
        self.max_tokens = min(next(fitting) * BLOCK, config.max_position_embeddings)  # in one sequence
        require_memory(memory, "KV cache of many texts")
        self.allocated = 0  # bytes
        self._free: list[list[Block]] = [[] for _ in self.layout.nbytes]  # by group
        self.tables = np.zeros((len(self._free), 1), np.int64)
        self.layer_table = self.layout.layer_table(self.tables)

    def bytes_for(self, blocks: int) -> int:
        """Bytes that one sequence of so many blocks needs at once."""
        return sequence_bytes(self.config, self.dtype, blocks * BLOCK)

    def first_blocks(self, length: int) -> list[int]:
        """Of each group of layers, the first block that is seen by the token after ``length`` others."""
        return [0 if window is None else max(0, length - window + 1) // BLOCK for window in self.layout.windows]

    def allocate(self, group: int) -> Block | None:
        """A block of a group of layers, with whatever was in it; None if the memory is used up."""
        if self._free[group]:
            return self._free[group].pop()
        needed = self.layout.nbytes[group]
        for other, free in enumerate(self._free):  # memory of other groups' free blocks
            while free and self.allocated + needed > self.memory:
                free.pop()
                self.allocated -= self.layout.nbytes[other]
        if self.allocated + needed > self.memory:
            return None
        self.allocated += needed
        return self.layout.new_block(group)

    def free(self, group: int, block: Block) -> None:
        """Give a block back."""
        self._free[group].append(block)

    def set_tables(self, tables: np.ndarray) -> None:
        """The block tables of the next pass, (groups, n): addresses of the blocks of its sequences."""
        self.tables = tables
        self.layer_table[:] = self.layout.layer_table(tables)

    def __repr__(self) -> str:
        return f"KVPool({self.allocated / 1e6:.1f} of {self.memory / 1e6:.1f} MB, {self.dtype})"


def block_bytes(config: ModelConfig, kv: str = "f32") -> int:
    """Bytes of BLOCK positions of all layers. Raises ValueError for an unknown ``kv``."""
    require_kv(kv)
    return sum(group_bytes(config, kv, BLOCK))


def sequence_bytes(config: ModelConfig, kv: str, positions: int) -> int:
    """Bytes of the blocks that a sequence of so many positions needs at once: of windowed layers, what a pass sees."""
    total = 0
    for window, size in zip(group_windows(config), group_bytes(config, kv, BLOCK), strict=True):
        blocks = blocks_for(positions)
        if window is not None:  # its tokens and those that the first of them sees, wherever they begin in a block
            blocks = min(blocks, (window + PREFILL_TOKENS - 3) // BLOCK + 2)
        total += blocks * size
    return total


def blocks_for(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // BLOCK)
