"""The header of a GGUF file: walks metadata and tensor descriptions without trusting any number in them.

The walk only steps from field to field and remembers where values are; strings and arrays are decoded afterwards, when
the whole structure is known to be sound (``HeaderReader.decode``). Source: the GGUF specification in ggml's
documentation, versions 2 and 3.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.checkpoint.source import Source
from ruvllm.errors import ModelFormatError

# A header as long as its file allows would let a sparse file cost gigabytes and minutes. The largest published
# vocabularies (262 144 tokens, 515 000 merges) need 16 MB and 800 000 strings.
MAX_HEADER_BYTES = 100_000_000
MAX_STRINGS = 1 << 20
MAX_ENTRIES = 1 << 14
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, the last of them zero

_WINDOW = 1 << 20  # bytes read at once from a file that is not mapped
_SMALLEST_ENTRY = 8 + 1 + 4 + 1  # key length, key, type, value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimensions, one of them, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("u1", struct.Struct("<B")),
    1: ("i1", struct.Struct("<b")),
    2: ("<u2", struct.Struct("<H")),
    3: ("<i2", struct.Struct("<h")),
    4: ("<u4", _U32),
    5: ("<i4", struct.Struct("<i")),
    6: ("<f4", struct.Struct("<f")),
    _BOOL: ("?", struct.Struct("<B")),
    10: ("<u8", _U64),
    11: ("<i8", struct.Struct("<q")),
    12: ("<f8", struct.Struct("<d")),
}
UINT32 = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """The position of a metadata value: its type, first byte, end; for arrays the element type and count.

    ``ends`` holds the end of each string, counted from ``start``, so that decoding need not walk them again.
    """

    type: int
    start: int
    end: int
    count: int | None = None  # None: not an array
    ends: array[int] | None = None


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor description as written: sizes innermost first, type code, offset from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    position: int  # of the description in the file
    offset_position: int


class HeaderReader:
    """Reads fields at given positions of a file; every failure names position, field, found and expected."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._limit = min(source.size, MAX_HEADER_BYTES)
        self._base = 0
        self._view = source.read(0, source.size if source.mapped else min(_WINDOW, source.size)).data
        self._strings = 0

    def error(self, field: str, found: object, expected: object, position: int) -> ModelFormatError:
        return ModelFormatError(self._source.path, field=field, found=found, expected=expected, offset=position)

    def preamble(self) -> tuple[int, int, int]:
        """Version, tensor count, metadata count; checks magic, byte order and that the counts are possible."""
        if self._source.size == 0:
            raise self.error("file", "0 bytes", "a GGUF file", 0)
        magic = bytes(self._at(0, 4, "magic"))
        if magic != b"GGUF":
            raise self.error("magic", magic, "b'GGUF', with which every GGUF file begins", 0)
        version = self.u32(4, "version")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                raise self.error("byte order", "a big-endian file", "a little-endian file", 4)
            raise self.error("version", version, "2 or 3", 4)
        tensors = self._count(8, "tensor count", _SMALLEST_TENSOR)
        entries = self._count(16, "metadata count", _SMALLEST_ENTRY)
        return version, tensors, entries

    def entries(self, position: int, count: int) -> tuple[dict[str, Entry], int]:
        """The metadata entries that start at ``position``, and where they end."""
        entries: dict[str, Entry] = {}
        for index in range(count):
            start = position
            key, position = self._string(start, f"metadata key {index}", MAX_KEY_BYTES)
            if not key:
                raise self.error(f"metadata key {index}", "an empty key", "a name", start)
            if key in entries:
                raise self.error(f"metadata key {index}", f"{key!r} a second time", "each key once", start)
            entry = self._entry(position, f"metadata {key!r}")
            entries[key] = entry
            position = entry.end
        return entries, position

    def tensors(self, position: int, count: int) -> tuple[list[TensorHeader], int]:
        """The tensor descriptions that start at ``position``, and where they end."""
        headers: list[TensorHeader] = []
        names: set[str] = set()
        for index in range(count):
            start = position
            name, position = self._string(start, f"name of tensor {index}", MAX_NAME_BYTES)
            if not name or "\0" in name:
                raise self.error(f"name of tensor {index}", repr(name), "a name without NUL characters", start)
            if name in names:
                raise self.error(f"name of tensor {index}", f"{name!r} a second time", "each name once", start)
            names.add(name)
            n_dims = self.u32(position, f"tensor {name!r} number of dimensions")
            if not 1 <= n_dims <= 4:
                raise self.error(f"tensor {name!r} number of dimensions", n_dims, "1 to 4", position)
            position += 4
            raw = self._at(position, n_dims * 8 + 12, f"tensor {name!r} description")
            *dims, kind, offset = struct.unpack(f"<{n_dims}QIQ", raw)
            headers.append(TensorHeader(name, tuple(dims), kind, offset, position, position + n_dims * 8 + 4))
            position += n_dims * 8 + 12
        return headers, position

    def decode(self, key: str, entry: Entry) -> Any:
        """The value: bool, int, float, str, list of str, or a NumPy array of numbers (a copy)."""
        field = f"metadata {key!r}"
        raw = self._at(entry.start, entry.end - entry.start, field)
        if entry.ends is not None:
            strings = self._decode_strings(bytes(raw), entry.ends, entry.start, field)
            return strings[0] if entry.count is None else strings
        kind, scalar = _SCALARS[entry.type]
        if entry.type == _BOOL:
            flags = np.frombuffer(raw, np.uint8)
            if flags.size and flags.max() > 1:
                wrong = int((flags > 1).argmax())
                raise self.error(field, f"the boolean {flags[wrong]}", "0 or 1", entry.start + wrong)
        if entry.count is None:
            (value,) = scalar.unpack(raw)
            return bool(value) if entry.type == _BOOL else value
        return np.frombuffer(raw, kind).copy()

    def u32(self, position: int, field: str) -> int:
        return int(_U32.unpack(self._at(position, 4, field))[0])

    def u64(self, position: int, field: str) -> int:
        return int(_U64.unpack(self._at(position, 8, field))[0])

    def _at(self, position: int, count: int, field: str) -> memoryview:
        """The ``count`` bytes at ``position``."""
        self._require(position, count, field)
        start = position - self._base
        if start < 0 or start + count > len(self._view):
            self._base, start = position, 0
            self._view = self._source.read(position, min(max(count, _WINDOW), self._source.size - position)).data
        return self._view[start : start + count]

    def _require(self, position: int, count: int, field: str) -> None:
        if position + count <= self._limit:
            return
        if position + count <= self._source.size:
            raise self.error(field, f"{position + count} bytes of header", f"at most {MAX_HEADER_BYTES}", position)
        left = max(self._source.size - position, 0)
        raise self.error(field, f"{left} bytes to the end of the file", f"{count} bytes", position)

    def _count(self, position: int, field: str, smallest: int) -> int:
        count = self.u64(position, field)
        most = min(MAX_ENTRIES, max(self._source.size - 24, 0) // smallest)
        if count > most:
            raise self.error(field, count, f"at most {most} in a file of {self._source.size} bytes", position)
        return count

    def _string(self, position: int, field: str, most: int) -> tuple[str, int]:
        """A length-prefixed UTF-8 string of at most ``most`` bytes, and the position after it."""
        length = self.u64(position, f"{field} length")
        if length > most:
            raise self.error(f"{field} length", length, f"at most {most}", position)
        raw = bytes(self._at(position + 8, length, field))
        try:
            return raw.decode("utf-8"), position + 8 + length
        except UnicodeDecodeError as error:
            raise self._not_utf8(field, raw, error.start, position + 8) from None

    def _not_utf8(self, field: str, raw: bytes, wrong: int, start: int) -> ModelFormatError:
        return self.error(field, f"the byte {raw[wrong]:#04x}", "UTF-8 text", start + wrong)

    def _entry(self, position: int, field: str) -> Entry:
        kind = self.u32(position, f"{field} type")
        position += 4
        if kind == _ARRAY:
            return self._array(position, field)
        if kind == _STRING:
            ends = self._walk_strings(position, 1, field)
            return Entry(kind, position, position + ends[-1], ends=ends)
        if kind not in _SCALARS:
            raise self.error(f"{field} type", kind, "a value type from 0 to 12", position - 4)
        size = _SCALARS[kind][1].size
        self._require(position, size, field)
        return Entry(kind, position, position + size)

    def _array(self, position: int, field: str) -> Entry:
        kind = self.u32(position, f"{field} element type")
        if kind == _ARRAY:
            raise self.error(f"{field} element type", "an array of arrays", "numbers, booleans or strings", position)
        if kind != _STRING and kind not in _SCALARS:
            raise self.error(f"{field} element type", kind, "a value type from 0 to 12", position)
        count = self.u64(position + 4, f"{field} length")
        start = position + 12
        smallest = 8 if kind == _STRING else _SCALARS[kind][1].size
        if count > (self._source.size - start) // smallest:
            left = self._source.size - start
            raise self.error(f"{field} length", f"{count} elements", f"what {left} bytes can hold", position + 4)
        if kind == _STRING:
            ends = self._walk_strings(start, count, field)
            return Entry(kind, start, start + (ends[-1] if count else 0), count, ends)
        self._require(start, count * smallest, field)
        return Entry(kind, start, start + count * smallest, count)

    def _walk_strings(self, start: int, count: int, field: str) -> array[int]:
        """The end of each of ``count`` strings, from ``start``. A vocabulary has 10^5: keep the loop lean."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self.error(f"{field} length", f"{self._strings} strings", f"at most {MAX_STRINGS}", start)
        length_at = _U64.unpack_from
        ends = array("Q")
        position = start
        while len(ends) < count:
            self._at(position, 8, f"{field} string {len(ends)} length")
            view, base = self._view, self._base
            last = min(len(view), self._limit - base) - 8
            at = position - base
            for _ in range(count - len(ends)):
                if at > last:
                    break
                (length,) = length_at(view, at)
                at += 8 + length
                if at + base > self._limit:
                    self._require(at + base - length, length, f"{field} string {len(ends)}")
                ends.append(at + base - start)
            position = at + base
        return ends

    def _decode_strings(self, raw: bytes, ends: array[int], start: int, field: str) -> list[str]:
        strings: list[str] = []
        begin = 0
        try:
            for end in ends:
                strings.append(raw[begin + 8 : end].decode("utf-8"))
                begin = end
        except UnicodeDecodeError as error:
            raise self._not_utf8(f"{field} string {len(strings)}", raw, begin + 8 + error.start, start) from None
        return strings
