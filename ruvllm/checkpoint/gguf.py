"""GGUF files (versions 2 and 3): validated structure, metadata and tensors, memory-mapped or read.

Everything is checked on opening, before anything large is allocated: after that no tensor can lie outside of the file,
on top of another, or in a type that cannot be decoded. Source: the GGUF specification in ggml's documentation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ruvllm.checkpoint.gguf_header import UINT32, Entry, HeaderReader, TensorHeader
from ruvllm.checkpoint.source import Closing, Source
from ruvllm.checkpoint.storage import BLOCKS, GGUF_REMOVED, GGUF_TYPES, GGUF_UNSUPPORTED
from ruvllm.checkpoint.tensor import Tensor, TensorInfo

_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 16
_MAX_SIZE = (1 << 63) - 1  # ggml counts elements and bytes in signed 64-bit integers


class GGUFFile(Closing):
    """A GGUF file whose structure has been validated.

    Attributes:
        path: as given.
        version: 2 or 3.
        metadata: key -> bool, int, float, str, list of str, or NumPy array of numbers.
        metadata_offsets: key -> position of its value in the file, for error messages.
        tensors: name -> TensorInfo, in the file's order.
        identities: of the file.

    Args:
        path: the file.
        mmap: map the file (nothing is copied, but a file that shrinks meanwhile kills the process with SIGBUS),
            or else read each tensor on demand.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: it is not a sound GGUF file, or holds tensors of a type that ruvllm does not read.
    """

    def __init__(self, path: str | os.PathLike[str], mmap: bool = True) -> None:
        self._source = Source(path, mmap=mmap)
        self.identities = [self._source.identity]
        try:
            reader = HeaderReader(self._source)
            self.path = self._source.path
            self.version, n_tensors, n_entries = reader.preamble()
            entries, position = reader.entries(24, n_entries)
            headers, position = reader.tensors(position, n_tensors)
            alignment = _alignment(reader, entries)
            self.tensors: dict[str, TensorInfo] = _lay_out(reader, headers, position, alignment, self._source.size)
            self.metadata: dict[str, Any] = {key: reader.decode(key, entry) for key, entry in entries.items()}
            self.metadata_offsets: dict[str, int] = {key: entry.start for key, entry in entries.items()}
            self._entries = entries
        except BaseException:
            self._source.close()
            raise

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name. Raises KeyError when the file has none."""
        return Tensor(self.tensors[name], self._source)

    def metadata_bytes(self, key: str) -> bytes:
        """The bytes of a metadata value, its type first, as ``gguf_writer.encoded`` makes them."""
        entry = self._entries[key]
        start = entry.start - (4 if entry.count is None else 16)  # type; of arrays also their elements' type and count
        return self._source.read(start, entry.end - start).tobytes()

    def close(self) -> None:
        """Close the file; arrays taken from a mapped file stay valid."""
        self._source.close()


def _alignment(reader: HeaderReader, entries: dict[str, Entry]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return _DEFAULT_ALIGNMENT
    field = "metadata 'general.alignment'"
    if entry.type != UINT32 or entry.count is not None:
        raise reader.error(field, "another type", "an unsigned 32-bit integer", entry.start)
    alignment = reader.u32(entry.start, field)
    if alignment & (alignment - 1) or not 8 <= alignment <= _MAX_ALIGNMENT:
        raise reader.error(field, alignment, f"a power of two from 8 to {_MAX_ALIGNMENT}", entry.start)
    return alignment


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor and the positions of its description, to check its place among the others."""

    info: TensorInfo
    header: TensorHeader


def _lay_out(
    reader: HeaderReader, headers: list[TensorHeader], header_end: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """Types, sizes and places of all tensors: without overlap, gap or byte left over."""
    data_start = -(-header_end // alignment) * alignment
    placed = [_Placed(_describe(reader, header, data_start, alignment, size), header) for header in headers]
    expected = end = data_start if headers else header_end
    for tensor in sorted(placed, key=lambda t: t.info.offset):
        info, header = tensor.info, tensor.header
        if info.offset != expected:
            fault = "overlaps the one before" if info.offset < expected else "leaves a gap before it"
            raise reader.error(
                f"tensor {info.name!r} offset",
                f"{header.offset}, which {fault}",
                expected - data_start,
                header.offset_position,
            )
        end = info.offset + info.nbytes
        if end > size:
            raise reader.error(f"tensor {info.name!r} data", f"{size - info.offset} bytes", info.nbytes, info.offset)
        expected = -(-end // alignment) * alignment
    # Writers pad the last tensor like the others, or not at all.
    if not end <= size <= max(expected, data_start):
        raise reader.error("file size", size, f"{end} to {max(expected, data_start)} bytes", end)
    return {tensor.info.name: tensor.info for tensor in placed}


def _describe(reader: HeaderReader, header: TensorHeader, data_start: int, alignment: int, size: int) -> TensorInfo:
    """Type, shape and size of one tensor, its own numbers checked against each other and the file."""
    field = f"tensor {header.name!r}"
    elements = 1
    for i, dim in enumerate(header.dims):
        if not 1 <= dim <= _MAX_SIZE:
            raise reader.error(f"{field} dimension {i}", dim, f"1 to {_MAX_SIZE}", header.position + 4 + 8 * i)
        elements *= dim
    if elements > _MAX_SIZE:
        raise reader.error(f"{field} elements", elements, f"at most {_MAX_SIZE}", header.position + 4)
    kind = _type(reader, header, field)
    per_block, block_bytes = BLOCKS[kind]
    if header.dims[0] % per_block:
        raise reader.error(
            f"{field} row length", header.dims[0], f"a multiple of {per_block} for {kind}", header.position + 4
        )
    nbytes = elements // per_block * block_bytes
    if header.offset % alignment:
        raise reader.error(f"{field} offset", header.offset, f"a multiple of {alignment}", header.offset_position)
    if data_start + header.offset + nbytes >= 1 << 64:
        raise reader.error(f"{field} offset", f"{header.offset}, which wraps 2^64", "inside", header.offset_position)
    offset = data_start + header.offset
    if offset >= size:
        raise reader.error(
            f"{field} offset", header.offset, f"less than the {max(size - data_start, 0)} bytes of data",
            header.offset_position,
        )  # fmt: skip
    return TensorInfo(header.name, tuple(reversed(header.dims)), kind, offset, nbytes)


def _type(reader: HeaderReader, header: TensorHeader, field: str) -> str:
    kind = GGUF_TYPES.get(header.type)
    if kind is not None:
        return kind
    if header.type in GGUF_UNSUPPORTED:
        found = f"{GGUF_UNSUPPORTED[header.type]}, which is not supported"
    elif header.type in GGUF_REMOVED:
        found = f"{GGUF_REMOVED[header.type]}, which was removed from the format"
    else:
        found = f"the unknown type {header.type - (1 << 32) if header.type >= 1 << 31 else header.type}"
    expected = "one of " + ", ".join(GGUF_TYPES.values())
    raise reader.error(f"{field} type", found, expected, header.offset_position - 4)
