"""Small model files, sound and hostile, built byte by byte: the corpus of the file tests and of the fuzzer.

Row numbers are those of the project's table of bad input: 1-25 GGUF, 33 block scales, 35-49 safetensors, 51 both.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.checkpoint.storage import BLOCKS, GGUF_TYPES

GGUF_CODES = {name: code for code, name in GGUF_TYPES.items()}
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
HUGE = 1 << 63
# Byte positions of the 16-bit scales and minimums in a block, from ggml's block structures.
SCALE_OFFSETS: dict[str, tuple[int, ...]] = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,)},
}


Tensors = dict[str, tuple[str, tuple[int, ...], np.ndarray]]  # name -> (type, row-major shape, bytes)


@dataclass(frozen=True)
class Hostile:
    """One bad file: the table's row, a name, the bytes, and what the one-line error must say."""

    row: int
    name: str
    data: bytes
    says: str

    def __str__(self) -> str:
        return f"row{self.row:02d}-{self.name}"


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """(rows, bytes per row) of random elements whose block scales are finite."""
    rng = np.random.default_rng(seed)
    per_block, block_bytes = BLOCKS[kind]
    if kind in SCALE_OFFSETS:
        blocks = rng.integers(0, 256, (rows * columns // per_block, block_bytes), np.uint8)
        for at in SCALE_OFFSETS[kind]:
            scales = rng.standard_normal(len(blocks)).astype("<f2")
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        return blocks.reshape(rows, -1)
    if kind == "MXFP4":
        blocks = rng.integers(0, 256, (rows * columns // per_block, block_bytes), np.uint8)
        blocks[:, 0] = rng.integers(118, 130, len(blocks))  # powers of two near those of weights
        return blocks.reshape(rows, -1)
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[kind]).view(np.uint8)


# --- GGUF ---------------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def description(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int, n_dims: int | None = None) -> bytes:
    """``dims`` innermost first, as in the file."""
    n = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n, *dims, kind, offset)


def gguf(
    entries: list[bytes],
    descriptions: list[bytes],
    data: bytes,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_entries: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = struct.pack(
        "<IQQ",
        version,
        len(descriptions) if n_tensors is None else n_tensors,
        len(entries) if n_entries is None else n_entries,
    )
    header = magic + counts + b"".join(entries) + b"".join(descriptions)
    return header + bytes(-len(header) % alignment) + data


def tensors_and_data(tensors: Tensors, alignment: int = 32) -> tuple[list[bytes], bytes]:
    """Descriptions and data section."""
    data = b""
    descriptions = []
    for name, (kind, shape, raw) in tensors.items():
        descriptions.append(description(name, shape[::-1], GGUF_CODES[kind], len(data)))
        data += raw.tobytes()
        data += bytes(-len(data) % alignment)
    return descriptions, data


SCALARS: dict[str, tuple[int, bytes, Any]] = {
    "test.u8": (U8, b"\xff", 255),
    "test.i8": (I8, b"\xff", -1),
    "test.u16": (U16, b"\xfe\xff", 65534),
    "test.i16": (I16, b"\xfe\xff", -2),
    "test.u32": (U32, u32(1 << 31), 1 << 31),
    "test.i32": (I32, struct.pack("<i", -5), -5),
    "test.f32": (F32, struct.pack("<f", 0.5), 0.5),
    "test.bool": (BOOL, b"\x01", True),
    "test.string": (STRING, text("naïve ▁ 🦙"), "naïve ▁ 🦙"),
    "test.u64": (U64, u64(HUGE), HUGE),
    "test.i64": (I64, struct.pack("<q", -HUGE), -HUGE),
    "test.f64": (F64, struct.pack("<d", 1e-300), 1e-300),
    "test.strings": (ARRAY, array(STRING, 3, text("a") + text("") + text("Ġé")), ["a", "", "Ġé"]),
    "test.no_strings": (ARRAY, array(STRING, 0, b""), []),
    "test.floats": (ARRAY, array(F32, 2, struct.pack("<2f", 1, -2)), np.array([1, -2], "<f4")),
    "test.bytes": (ARRAY, array(U8, 3, b"abc"), np.frombuffer(b"abc", np.uint8)),
    "test.bools": (ARRAY, array(BOOL, 2, b"\x00\x01"), np.array([False, True])),
    "test.no_numbers": (ARRAY, array(U64, 0, b""), np.array([], "<u8")),
}


def gguf_tensors() -> Tensors:
    """Name -> (type, shape, bytes): each readable type, one to four axes, row lengths that are no power of two."""
    tensors: Tensors = {}
    for i, kind in enumerate(GGUF_CODES):
        columns = BLOCKS[kind][0] * 3 if BLOCKS[kind][0] > 1 else 7
        tensors[f"matrix.{kind}"] = (kind, (3, columns), random_rows(kind, 3, columns, i))
    tensors["vector"] = ("F32", (5,), random_rows("F32", 1, 5, 100))
    tensors["cube"] = ("F16", (2, 3, 4), random_rows("F16", 6, 4, 101))
    tensors["four"] = ("Q8_0", (1, 2, 1, 32), random_rows("Q8_0", 2, 32, 102))
    return tensors


def valid_gguf(version: int = 3, alignment: int | None = None) -> bytes:
    """A sound file with every kind of metadata value and every type of tensor."""
    entries = [entry(key, kind, payload) for key, (kind, payload, _) in SCALARS.items()]
    if alignment is not None:
        entries.append(entry("general.alignment", U32, u32(alignment)))
    descriptions, data = tensors_and_data(gguf_tensors(), alignment or 32)
    return gguf(entries, descriptions, data, version=version, alignment=alignment or 32)


def small_gguf(
    *,
    entries: list[bytes] | None = None,
    first: bytes | None = None,
    second: bytes | None = None,
    data: bytes = bytes(128),
    **options: Any,
) -> bytes:
    """Two tensors, "a" (2, 4) F32 at 0 and "b" (2, 32) Q8_0 at 32, with anything replaced."""
    entries = [entry("general.architecture", STRING, text("llama"))] if entries is None else entries
    first = description("a", (4, 2), 0, 0) if first is None else first
    second = description("b", (32, 2), 8, 32) if second is None else second
    return gguf(entries, [first, second], data, **options)


def _with_entry(kind: int, payload: bytes, key: str | bytes = "k") -> bytes:
    return small_gguf(entries=[entry(key, kind, payload)])


def _with_alignment(value: int, kind: int = U32) -> bytes:
    payload = u32(value) if kind == U32 else u64(value)
    return small_gguf(entries=[entry("general.alignment", kind, payload)])


def hostile_gguf() -> list[Hostile]:
    """Rows 1-25 of the table (row 3, every prefix, is a test of its own)."""
    a, b = description("a", (4, 2), 0, 0), description("b", (32, 2), 8, 32)
    ok = small_gguf()
    big_endian = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    nested = array(ARRAY, 1, array(ARRAY, 1, array(U8, 1, b"\x00")))
    return [
        Hostile(1, "empty", b"", "file: found 0 bytes, expected a GGUF file"),
        Hostile(2, "magic", b"GGML" + ok[4:], "magic: found b'GGML', expected b'GGUF'"),
        Hostile(4, "version-0", small_gguf(version=0), "version: found 0, expected 2 or 3"),
        Hostile(4, "version-1", small_gguf(version=1), "version: found 1, expected 2 or 3"),
        Hostile(4, "version-future", small_gguf(version=4), "version: found 4, expected 2 or 3"),
        Hostile(5, "big-endian", big_endian, "byte order: found a big-endian file"),
        Hostile(6, "tensor-count", small_gguf(n_tensors=HUGE), f"tensor count: found {HUGE}, expected at most"),
        Hostile(6, "tensor-count-cut", small_gguf(n_tensors=3), "name of tensor 2: found"),
        Hostile(7, "metadata-count", small_gguf(n_entries=HUGE), f"metadata count: found {HUGE}, expected at most"),
        Hostile(7, "metadata-count-max", small_gguf(n_entries=2**64 - 1), "metadata count: found"),
        Hostile(8, "string-length", _with_entry(STRING, u64(10**6) + b"x"), "metadata 'k' string 0: found"),
        Hostile(8, "string-length-wraps", _with_entry(STRING, u64(2**64 - 8) + b"x"), "metadata 'k' string 0: found"),
        Hostile(8, "key-length", small_gguf(entries=[u64(HUGE) + b"k"]), "metadata key 0 length: found"),
        Hostile(8, "key-length-past-end", small_gguf(entries=[u64(65535) + b"k"]), "metadata key 0: found"),
        Hostile(9, "array-length", _with_entry(ARRAY, array(U8, HUGE, b"")), f"length: found {HUGE} elements"),
        Hostile(9, "array-length-wraps", _with_entry(ARRAY, array(U64, 1 << 61, b"")), "'k' length: found"),
        Hostile(9, "strings-length", _with_entry(ARRAY, array(STRING, 10**15, b"")), "'k' length: found"),
        Hostile(9, "strings-cut", _with_entry(ARRAY, array(STRING, 20, text("x"))), "metadata 'k' string"),
        Hostile(10, "nested", _with_entry(ARRAY, nested), "'k' element type: found an array of arrays"),
        Hostile(11, "value-type", _with_entry(13, b"\x00"), "metadata 'k' type: found 13"),
        Hostile(11, "element-type", _with_entry(ARRAY, array(99, 1, b"\x00")), "'k' element type: found 99"),
        Hostile(11, "boolean-2", _with_entry(BOOL, b"\x02"), "metadata 'k': found the boolean 2"),
        Hostile(11, "booleans-7", _with_entry(ARRAY, array(BOOL, 2, b"\x01\x07")), "found the boolean 7"),
        Hostile(12, "key-empty", _with_entry(U8, b"\x00", ""), "metadata key 0: found an empty key"),
        Hostile(12, "key-twice", small_gguf(entries=[entry("k", U8, b"\x00")] * 2), "found 'k' a second time"),
        Hostile(12, "key-not-utf8", _with_entry(U8, b"\x00", b"k\xff"), "metadata key 0: found the byte 0xff"),
        Hostile(12, "value-not-utf8", _with_entry(STRING, text(b"\xc3")), "string 0: found the byte 0xc3"),
        Hostile(12, "token-not-utf8", _with_entry(ARRAY, array(STRING, 2, text("a") + text(b"b\x80"))), "string 1:"),
        Hostile(13, "tensor-twice", small_gguf(second=description("a", (32, 2), 8, 32)), "'a' a second time"),
        Hostile(13, "tensor-nul", small_gguf(second=description("b\0", (32, 2), 8, 32)), "without NUL"),
        Hostile(13, "tensor-unnamed", small_gguf(second=description("", (32, 2), 8, 32)), "tensor 1: found ''"),
        Hostile(13, "tensor-name-64", small_gguf(second=description("b" * 64, (32, 2), 8, 32)), "found 64"),
        Hostile(13, "tensor-not-utf8", small_gguf(second=description(b"\xfe", (32, 2), 8, 32)), "byte 0xfe"),
        Hostile(14, "dims-0", small_gguf(second=description("b", (), 8, 32)), "dimensions: found 0, expected 1 to 4"),
        Hostile(14, "dims-5", small_gguf(second=description("b", (32, 2, 1, 1, 1), 8, 32)), "dimensions: found 5"),
        Hostile(14, "dims-2^32", small_gguf(second=description("b", (32,), 8, 32, 2**32 - 1)), "dimensions: found"),
        Hostile(15, "dim-0", small_gguf(second=description("b", (32, 0), 8, 32)), "dimension 1: found 0"),
        Hostile(15, "dim-2^63", small_gguf(second=description("b", (32, HUGE), 8, 32)), "dimension 1: found"),
        Hostile(16, "dims-wrap", small_gguf(second=description("b", (1 << 32, 1 << 32), 8, 32)), "elements: found"),
        Hostile(16, "dims-wrap-small", small_gguf(second=description("b", (32, 1 << 60), 8, 32)), "elements: found"),
        Hostile(17, "type-unknown", small_gguf(second=description("b", (32, 2), 777, 32)), "unknown type 777"),
        Hostile(17, "type-negative", small_gguf(second=description("b", (32, 2), 2**32 - 1, 32)), "unknown type -1"),
        Hostile(17, "type-removed", small_gguf(second=description("b", (32, 2), 4, 32)), "Q4_2, which was removed"),
        Hostile(17, "row-not-blocks", small_gguf(second=description("b", (16, 4), 8, 32)), "row length: found 16"),
        Hostile(18, "unaligned", small_gguf(second=description("b", (32, 2), 8, 33)), "found 33, expected a multiple"),
        Hostile(19, "beyond", small_gguf(second=description("b", (32, 2), 8, 1 << 20)), "less than the 128 bytes"),
        Hostile(20, "wraps", small_gguf(second=description("b", (32, 2), 8, 2**64 - 32)), "which wraps 2^64"),
        Hostile(21, "overlap", small_gguf(second=description("b", (32, 2), 8, 0)), "found 0, which overlaps"),
        Hostile(21, "overlap-first", small_gguf(first=description("a", (4, 2), 0, 96)), "found 32, which leaves a gap"),
        Hostile(22, "short", small_gguf(data=bytes(32 + 67)), "tensor 'b' data: found 67 bytes, expected 68"),
        Hostile(22, "no-data", gguf([], [a, b], b""), "offset: found 0, expected less than the 0 bytes"),
        Hostile(23, "trailing", small_gguf(data=bytes(129)), "file size: found"),
        Hostile(23, "gap", small_gguf(second=description("b", (32, 1), 8, 64)), "found 64, which leaves a gap"),
        Hostile(23, "gap-before-all", gguf([], [description("a", (4, 2), 0, 32)], bytes(64)), "which leaves a gap"),
        Hostile(23, "trailing-no-tensors", gguf([], [], bytes(32)), "file size: found"),
        Hostile(24, "alignment-0", _with_alignment(0), "'general.alignment': found 0"),
        Hostile(24, "alignment-13", _with_alignment(13), "'general.alignment': found 13"),
        Hostile(24, "alignment-4", _with_alignment(4), "'general.alignment': found 4"),
        Hostile(24, "alignment-128K", _with_alignment(1 << 17), "'general.alignment': found 131072"),
        Hostile(24, "alignment-u64", _with_alignment(32, U64), "expected an unsigned 32-bit integer"),
        Hostile(24, "alignment-array", _with_entry(ARRAY, array(U32, 1, u32(32)), "general.alignment"), "32-bit"),
        Hostile(25, "unsupported", small_gguf(second=description("b", (256, 2), 21, 32)), "found IQ3_S, which is not"),
        Hostile(25, "unsupported-I32", small_gguf(second=description("b", (17,), 26, 32)), "found I32, which is not"),
    ]


# --- safetensors --------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header (an object to write as JSON, or bytes) and its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def st_entry(kind: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def safetensors_tensors() -> Tensors:
    """Name -> (type, shape, bytes): the readable types, none to three axes, and one without elements."""
    shapes: dict[str, tuple[int, ...]] = {"F64": (3, 5), "F32": (2, 3, 4), "F16": (7,), "BF16": (5, 1)}
    tensors: Tensors = {
        f"t.{kind}": (kind, shape, random_rows(kind, int(np.prod(shape[:-1])), shape[-1], i))
        for i, (kind, shape) in enumerate(shapes.items())
    }
    tensors["scalar"] = ("F32", (), random_rows("F32", 1, 1, 9))
    tensors["none"] = ("F16", (0, 4), np.empty(0, np.uint8))
    return tensors


def valid_safetensors(tensors: Tensors | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "note": "naïve"}}
    data = b""
    for name, (kind, shape, raw) in (safetensors_tensors() if tensors is None else tensors).items():
        header[name] = st_entry(kind, list(shape), len(data), len(data) + raw.nbytes)
        data += raw.tobytes()
    return safetensors(header, data)


def hostile_safetensors() -> list[Hostile]:
    """Rows 35-45 of the table."""
    t = st_entry("F32", [2], 0, 8)
    twice = b'{"a":%s,"a":%s}' % ((json.dumps(t).encode(),) * 2)
    data = bytes(8)
    return [
        Hostile(35, "empty", b"", "header length: found a file of 0 bytes"),
        Hostile(35, "7-bytes", bytes(7), "header length: found a file of 7 bytes"),
        Hostile(35, "header-0", bytes(16), "header length: found 0"),
        Hostile(36, "header-beyond", safetensors({"a": t}, data, length=1000), "header length: found 1000"),
        Hostile(37, "header-100MB", safetensors({"a": t}, data, length=100_000_001), "header length: found 100000001"),
        Hostile(37, "header-2^64", safetensors({"a": t}, data, length=2**64 - 1), "header length: found 1844674"),
        Hostile(38, "not-utf8", safetensors(b'{"\xff":1}'), "header: found the byte 0xff"),
        Hostile(38, "not-json", safetensors(b'{"a":}'), "header: found no JSON"),
        Hostile(38, "array", safetensors(b"[1]"), "header: found no '{'"),
        Hostile(38, "two-objects", safetensors(b"{}{}"), "header: found no JSON"),
        Hostile(38, "nan", safetensors(b'{"a":NaN}'), "header: found NaN"),
        Hostile(38, "long-integer", safetensors(b'{"a":' + b"9" * 5000 + b"}"), "header: found Exceeds"),
        Hostile(38, "half-surrogate", safetensors(b'{"\\ud800":1}'), "header: found half of a surrogate pair"),
        Hostile(39, "duplicate", safetensors(twice, data), "header: found the key 'a' a second time"),
        Hostile(39, "duplicate-inner", safetensors(b'{"a":{"dtype":1,"dtype":2}}'), "the key 'dtype' a second time"),
        Hostile(40, "depth", safetensors(b'{"a":' + b"[" * 100_000), "header: found JSON nested too deep"),
        Hostile(40, "depth-1M", safetensors(b'{"a":' + b"[" * 1_000_000), "JSON values, expected at most"),
        Hostile(40, "depth-objects", safetensors(b'{"a":' * 100_000), "header: found JSON nested too deep"),
        Hostile(41, "dtype", safetensors({"a": st_entry("Q9", [2], 0, 8)}, data), "dtype: found the unknown type 'Q9'"),
        Hostile(41, "dtype-number", safetensors({"a": st_entry(32, [2], 0, 8)}, data), "dtype: found the unknown"),
        Hostile(42, "dim-negative", safetensors({"a": st_entry("F32", [-2], 0, 8)}, data), "shape: found [-2]"),
        Hostile(42, "dim-huge", safetensors({"a": st_entry("F32", [HUGE], 0, 8)}, data), "shape: found ["),
        Hostile(42, "dim-wraps", safetensors({"a": st_entry("F32", [2**32, 2**32], 0, 0)}), "data_offsets: found 0"),
        Hostile(42, "dim-true", safetensors({"a": st_entry("F32", [True, 2], 0, 8)}, data), "shape: found [True, 2]"),
        Hostile(42, "dim-float", safetensors({"a": st_entry("F32", [2.0], 0, 8)}, data), "shape: found [2.0]"),
        Hostile(42, "shape-text", safetensors({"a": st_entry("F32", "2", 0, 8)}, data), "shape: found '2'"),
        Hostile(42, "axes-9", safetensors({"a": st_entry("F32", [1] * 8 + [2], 0, 8)}, data), "expected at most 8"),
        Hostile(43, "size", safetensors({"a": st_entry("F32", [3], 0, 8)}, data), "found 8 bytes, expected 96 bits"),
        Hostile(43, "half-byte", safetensors({"a": st_entry("F4", [17], 0, 8)}, data), "found 8 bytes, expected 68"),
        Hostile(43, "offsets-swapped", safetensors({"a": st_entry("F32", [2], 8, 0)}, data), "found [8, 0]"),
        Hostile(43, "offsets-three", safetensors({"a": {**t, "data_offsets": [0, 8, 8]}}, data), "found [0, 8, 8]"),
        Hostile(43, "offsets-missing", safetensors({"a": {"dtype": "F32", "shape": [2]}}, data), "expected an object"),
        Hostile(43, "extra-field", safetensors({"a": {**t, "x": 1}}, data), "expected an object of dtype"),
        Hostile(43, "no-object", safetensors({"a": [1]}, data), "tensor 'a': found [1]"),
        Hostile(44, "overlap", safetensors({"a": t, "b": st_entry("F32", [2], 4, 12)}, bytes(12)), "4, which overlaps"),
        Hostile(44, "hole", safetensors({"a": t, "b": st_entry("F32", [2], 12, 20)}, bytes(20)), "12, which leaves"),
        Hostile(44, "hole-first", safetensors({"a": st_entry("F32", [2], 4, 12)}, bytes(12)), "4, which leaves a hole"),
        Hostile(44, "trailing", safetensors({"a": t}, bytes(9)), "file size: found"),
        Hostile(44, "short", safetensors({"a": t}, bytes(7)), "file size: found"),
        Hostile(45, "metadata-number", safetensors({"__metadata__": {"n": 1}}), "__metadata__: found {'n': 1}"),
        Hostile(45, "metadata-list", safetensors({"__metadata__": ["n"]}), "__metadata__: found ['n']"),
    ]
