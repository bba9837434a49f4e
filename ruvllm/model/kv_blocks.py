"""Blocks: the memory of keys and values, in pieces of some positions of all layers that keep the same ones."""

from __future__ import annotations

import numpy as np

from ruvllm.kernels.attention.kv import key_rows, padded
from ruvllm.kernels.attention.tile import Cache
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import CACHE_LINE, aligned_zeros
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_size import CHUNK, HUGE_PAGE, group_bytes, group_windows, layer_bytes

DTYPES: dict[str, type] = {"f32": np.float32, "f16": np.uint16, "int8": np.int8}


def require_kv(kv: object) -> None:
    """Raise ValueError unless this is a precision of keys and values."""
    if not isinstance(kv, str) or kv not in DTYPES:
        raise ValueError(f"kv: expected one of {', '.join(DTYPES)}, found {kv!r}")


class Block:
    """The memory of one block, zeros at first: pages that are not touched cost nothing."""

    __slots__ = ("address", "memory")

    def __init__(self, nbytes: int) -> None:
        self.memory = aligned_zeros(nbytes, np.uint8, CACHE_LINE if nbytes % HUGE_PAGE else HUGE_PAGE)
        self.address = self.memory.ctypes.data


class BlockLayout:
    """Where the keys and values of each layer lie in blocks of ``positions`` positions, a multiple of 16 up to CHUNK.

    Layers with the same window keep the same positions. They are a *group*: their keys and values share blocks. Within
    a block, one layer follows the other, and within a layer one head: its keys (positions / 16, K, 16), then its values
    (positions, DV), as in ``kernels.attention.kv``. So a sequence's memory grows by a block at a time, nothing is
    moved, a token reads long runs, and the first one touches a few huge pages, not one for each head of each layer.

    Attributes:
        groups: of each layer, the number of its group. windows: of each group. nbytes: of a block of each group.
        offsets: of each layer, bytes from the beginning of a block.
    """

    def __init__(self, config: ModelConfig, kv: str, positions: int = CHUNK) -> None:
        require_kv(kv)
        self.kv, self.positions, self.dtype = kv, positions, np.dtype(DTYPES[kv])
        heads, dim = config.num_key_value_heads, config.head_dim
        self._keys = heads, positions // LANES, key_rows(dim, DTYPES[kv]), LANES
        self._values = heads, positions, padded(dim)
        self.windows = group_windows(config)
        self.groups = [self.windows.index(config.window(layer)) for layer in range(config.num_hidden_layers)]
        size = positions * layer_bytes(config, kv)
        self.offsets = [self.groups[:layer].count(group) * size for layer, group in enumerate(self.groups)]
        self.nbytes = group_bytes(config, kv, positions)

    def new_block(self, group: int) -> Block:
        """A block of a group of layers."""
        return Block(self.nbytes[group])

    def arrays(self, block: Block, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys (KV, positions / 16, K, 16) and values (KV, positions, DV) in a block of its group."""
        heads, *key_shape = self._keys
        keys, values = int(np.prod(self._keys)), int(np.prod(self._values))
        rows = block.memory[self.offsets[layer] :][: (keys + values) * self.dtype.itemsize].view(self.dtype)
        by_head = rows.reshape(heads, -1)
        end = keys // heads
        return by_head[:, :end].reshape(heads, *key_shape), by_head[:, end:].reshape(self._values)

    def cache(self, layer: int, table: np.ndarray, block: Block) -> Cache:
        """A layer for kernels: its block table of addresses, and any block of its group, for the shapes."""
        shapes = self._keys, self._values
        keys, values = (block.memory.view(self.dtype)[: int(np.prod(shape))].reshape(shape) for shape in shapes)
        return Cache(keys, values, table, self.offsets[layer])

    def layer_table(self, tables: np.ndarray) -> np.ndarray:
        """Of each layer the address of its group's row of ``tables`` and its offset: CACHES of a tape, (layers, 2)."""
        found = np.empty((len(self.groups), 2), np.int64)
        found[:, 0] = [tables.ctypes.data + group * tables.strides[0] for group in self.groups]
        found[:, 1] = self.offsets
        return found
