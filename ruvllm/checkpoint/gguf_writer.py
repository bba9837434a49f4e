"""Writing GGUF files (version 3): metadata, tensor descriptions, then the tensors' bytes.

Source: the GGUF specification in ggml's documentation.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ruvllm.checkpoint.storage import GGUF_TYPES, row_bytes

ALIGNMENT = 32
_CODES = {name: code for code, name in GGUF_TYPES.items()}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class Described(NamedTuple):
    """A tensor to write: its name, row-major shape and storage type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its length in the file, without the padding that follows."""
        return math.prod(self.shape[:-1]) * row_bytes(self.dtype, self.shape[-1])


def encoded(value: Any) -> bytes:
    """A metadata value with its type: bool, int (unsigned, 32 bits), float (32 bits), str, or a list of one of these.

    Integers in lists are signed. Raises: TypeError for anything else.
    """
    if isinstance(value, list):
        kind, _ = _scalar(value[0]) if value else (_STRING, b"")
        if kind == _UINT32:
            return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + np.array(value, "<i4").tobytes()
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_scalar(item)[1] for item in value)
    kind, raw = _scalar(value)
    return struct.pack("<I", kind) + raw


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    raise TypeError(f"metadata: expected a bool, int, float, str or a list of one of these, found {type(value)}")


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def write_header(file: BinaryIO, metadata: Mapping[str, bytes], tensors: Iterable[Described]) -> None:
    """Everything before the tensors' bytes; metadata: key -> ``encoded`` value."""
    tensors = list(tensors)
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + value)
    offset = 0
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        file.write(_string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        file.write(struct.pack("<IQ", _CODES[tensor.dtype], offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    pad(file)


def pad(file: BinaryIO) -> None:
    """Padding zeros, to write after the bytes of each tensor."""
    file.write(bytes(-file.tell() % ALIGNMENT))
