"""Keys and values of every layer, in arrays that grow as they fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ruvllm.kernels.attention.kv import key_rows, padded
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import aligned_zeros
from ruvllm.model.config import ModelConfig

DTYPES: dict[str, type] = {"f32": np.float32, "f16": np.uint16, "int8": np.int8}


def require_kv(kv: object) -> None:
    """Raise ValueError unless this is a precision of keys and values."""
    if not isinstance(kv, str) or kv not in DTYPES:
        raise ValueError(f"kv: expected one of {', '.join(DTYPES)}, found {kv!r}")


class KVArrays:
    """Of each layer keys (KV, B, K, 16) and values (KV, 16 B, DV): the layout of ``kernels.attention.kv``.

    They have no positions at first. Large arrays lie on huge pages, which attention reads an eighth faster, but a
    touched one takes 2 MB: arrays for the whole context would touch one for each kv head of each layer at the first
    token. So they grow with the text.
    """

    def __init__(self, config: ModelConfig, kv: str) -> None:
        require_kv(kv)
        self.config, self.dtype = config, kv
        self.keys: Any = []
        self.values: Any = []
        self.table = np.zeros((config.num_hidden_layers, 3), np.int64)  # addresses and blocks of 16, for a tape

    def grow(self, sizes: Sequence[int]) -> None:
        """New arrays with so many positions of each layer, multiples of 16, that hold what there was."""
        heads, dim, dtype = self.config.num_key_value_heads, self.config.head_dim, DTYPES[self.dtype]
        keys = _zeros([(heads, size // LANES, key_rows(dim, dtype), LANES) for size in sizes], dtype)
        values = _zeros([(heads, size, padded(dim)) for size in sizes], dtype)
        for old, new in (*zip(self.keys, keys, strict=False), *zip(self.values, values, strict=False)):
            new[:, : old.shape[1]] = old
        self.keys, self.values = keys, values
        self.table[:] = [(k.ctypes.data, v.ctypes.data, k.shape[1]) for k, v in zip(keys, values, strict=True)]


def _zeros(shapes: list[tuple[int, ...]], dtype: type) -> Any:
    """Arrays of zeros for all layers: one array where the layers are alike, else a list."""
    if len(set(shapes)) == 1:
        return aligned_zeros((len(shapes), *shapes[0]), dtype)
    return [aligned_zeros(shape, dtype) for shape in shapes]
