"""A file of packed weights: a model's matrices as they lie in memory, so that the next load maps them.

A safetensors file. Its tensors are panels (``model.weights``), each at a multiple of 64 bytes of the file. The header's
``__metadata__`` has

    checksum    SHA-256 of the header with 64 zeros in this place
    key         what the panels were made from and how, see ``packed_cache``
    matrices    JSON: name -> [layout, whether it has mins, rows, columns]
    written     when the file was completed, in seconds: its time of modification ever since

A file is used only if all of this holds, its length is what its header says, and it belongs to this user alone.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ruvllm.kernels.memory import CACHE_LINE
from ruvllm.kernels.quant.panels import Panels
from ruvllm.model.weights import FLOAT_LAYOUTS, INTEGER_LAYOUTS, FloatWeights, IntegerWeights
from ruvllm.paths import require_own

Matrix = FloatWeights | IntegerWeights

_ALIGNMENT = 4096  # of the data: a page
_PIECE = 1 << 24  # bytes written at once
_MAX_HEADER_BYTES = 1 << 26
_NO_CHECKSUM = b"0" * 64
_CHECKSUM_AT = len('{"__metadata__": {"checksum": "')
_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", **dict.fromkeys(INTEGER_LAYOUTS, "U8")}


class UnusableError(Exception):
    """A file of packed weights that must not be used; says why."""


def write_packed(
    path: Path, matrices: Mapping[str, Matrix], facts: Mapping[str, str], go_on: Callable[[], bool] = lambda: True
) -> bool:
    """Write matrices, and facts about them; "key" is one. The file appears when it is complete.

    Args:
        path: the file, in a directory that only this user can write.
        matrices: by canonical name.
        facts: further metadata.
        go_on: asked between pieces; where it says no, nothing is written.

    Returns:
        Whether it was written.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    written = int(time.time()) // 2 * 2  # every file system can keep even seconds
    header, arrays = _header(matrices, {**facts, "written": str(written)})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "xb", opener=_for_me) as file:
            for piece in chain([memoryview(header)], _pieces(arrays)):
                if not go_on():
                    return False
                file.write(piece)
        os.utime(temporary, (time.time(), written))
        os.replace(temporary, path)
        return True
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _for_me(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _pieces(arrays: list[np.ndarray]) -> Iterator[memoryview]:
    for array in arrays:
        flat = memoryview(array.reshape(-1).view(np.uint8).data)
        for at in range(0, len(flat), _PIECE):
            yield flat[at : at + _PIECE]


def _header(matrices: Mapping[str, Matrix], facts: dict[str, str]) -> tuple[bytes, list[np.ndarray]]:
    """The bytes before the data, and the arrays of the data, with padding between them."""
    tensors: dict[str, Any] = {}
    arrays: list[np.ndarray] = []
    table: dict[str, list[Any]] = {}
    at = 0
    for name, matrix in matrices.items():
        mins = isinstance(matrix, IntegerWeights) and matrix.panels.has_mins
        array = matrix.panels.blocks if isinstance(matrix, IntegerWeights) else matrix.panels
        table[name] = [matrix.layout, mins, matrix.rows, matrix.columns]
        for key, kind, part in (
            (name, _TYPES[matrix.layout], array),
            (f"padding.{len(arrays)}", "U8", np.zeros(-array.nbytes % CACHE_LINE, np.uint8)),
        ):
            if part.nbytes:
                tensors[key] = {"dtype": kind, "shape": part.shape, "data_offsets": [at, at + part.nbytes]}
                arrays.append(part)
                at += part.nbytes
    metadata = {"checksum": _NO_CHECKSUM.decode(), **facts, "matrices": json.dumps(table)}
    raw = json.dumps({"__metadata__": metadata, **tensors}).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + _with_checksum(raw), arrays


def _with_checksum(raw: bytes) -> bytes:
    """A header with its checksum in place of zeros."""
    return raw[:_CHECKSUM_AT] + hashlib.sha256(raw).hexdigest().encode() + raw[_CHECKSUM_AT + 64 :]


def read_facts(path: Path) -> dict[str, str]:
    """The metadata of a file of packed weights, once it has been checked.

    Raises:
        OSError: it cannot be read.
        UnusableError: it must not be used.
    """
    with open(path, "rb", opener=_no_link) as file:
        facts: dict[str, str] = _checked_header(path, file)[0]["__metadata__"]
        return facts


def open_packed(path: Path, key: str) -> dict[str, Matrix]:
    """The matrices of a file, by name, as views of its pages: writing to them changes this process's copy alone.

    The file's time of access is set, by which the least recently used one is known.

    Raises:
        OSError: there is none, or it cannot be read.
        UnusableError: it has another key, or must not be used.
    """
    with open(path, "rb", opener=_no_link) as file:
        header, start, size = _checked_header(path, file)
        if header["__metadata__"]["key"] != key:
            raise UnusableError("made from another state of the model, or by another version")
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    info = os.stat(path)
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), info.st_mtime_ns))
    if hasattr(mmap, "MADV_WILLNEED"):
        pages.madvise(mmap.MADV_WILLNEED)
    try:
        table = json.loads(header["__metadata__"]["matrices"])
        return {name: _matrix(pages, start, header[name], table[name]) for name in table}
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableError(f"its header makes no sense: {error}") from None


def _matrix(pages: mmap.mmap, start: int, entry: dict[str, Any], described: list[Any]) -> Matrix:
    layout, mins, rows, columns = described
    (lo, hi), shape = entry["data_offsets"], tuple(entry["shape"])
    dtype = np.dtype(FLOAT_LAYOUTS.get(layout, np.uint8))
    array = np.frombuffer(pages, dtype, (hi - lo) // dtype.itemsize, start + lo).reshape(shape)
    if layout in INTEGER_LAYOUTS:
        return IntegerWeights(Panels(INTEGER_LAYOUTS[layout], bool(mins), array), rows, columns)
    return FloatWeights(array, rows)


def _no_link(path: str, flags: int) -> int:
    # The time of access says when the weights were used, not when a header was looked at.
    return os.open(path, flags | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOATIME")))


def _checked_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The header of an open file, where its data begin, and its length. Raises UnusableError."""
    info = os.fstat(file.fileno())
    try:
        require_own(path, info)
    except PermissionError as error:
        raise UnusableError(str(error)) from None
    length = int.from_bytes(file.read(8), "little")
    if not _CHECKSUM_AT + 64 < length <= min(info.st_size - 8, _MAX_HEADER_BYTES):
        raise UnusableError("it has no sound header")
    raw = file.read(length)
    said = raw[_CHECKSUM_AT : _CHECKSUM_AT + 64]
    if _with_checksum(raw[:_CHECKSUM_AT] + _NO_CHECKSUM + raw[_CHECKSUM_AT + 64 :])[_CHECKSUM_AT:][:64] != said:
        raise UnusableError("its header is damaged")
    header: dict[str, Any] = json.loads(raw)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if info.st_size != 8 + length + max(ends, default=0):
        raise UnusableError(f"it has {info.st_size} bytes, not those that its header says")
    if info.st_mtime_ns != int(header["__metadata__"]["written"]) * 10**9:
        raise UnusableError("it was written to after it was completed")
    return header, 8 + length, info.st_size
