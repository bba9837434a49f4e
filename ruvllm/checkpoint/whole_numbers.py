"""Storage types of integer codes in groups of 32 with a scale and perhaps a min: w = scale n + min, n an int8.

    Q4_0    n = q - 8, scale = d      q: 0..15; d of each 32
    Q4_1    n = q, scale = d, min = m
    Q5_0    n = q - 16, scale = d     q: 0..31; d of each 32
    Q5_1    n = q, scale = d, min = m
    Q8_0    n stored, scale = d of each 32
    Q3_K    n = -s q, scale = -d      s: 6-bit scale of each 16 elements, -32..31; q: -4..3; d of each 256
    IQ4_NL  n from a table of 16, -127..113, scale = d of each 32
    IQ4_XS  the same, scale = d s     s: 6-bit scale of each 32 elements, -32..31; d of each 256
    MXFP4   n from a table of 16, -12..12, scale = 2^(e - 128), e a byte: half of the microscaling format's, whose
            values are the halves of these
    TQ1_0   n = -1, 0, 1: five in a byte, as digits of base 3; scale = d of each 256
    TQ2_0   n = -1, 0, 1, 2: four in a byte; scale = d of each 256
    Q4_Z    n = q - z, scale = d      q: 0..15; z: whole zero point; both d and z of each 32

Every product is exact in float32; adding a min rounds. Q3_K is negated because s q reaches 128 = 32 4, beyond int8.
Sources: ggml-quants.c of ggml; OCP Microscaling Formats Specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.kernels.jit.decorators import kernel

Array = np.ndarray[Any, Any]

_GROUP = 32
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


@kernel(strict=True)
def nibble_rows(raw: Any, block: Any, fifth_at: Any, codes_at: Any, zero: Any, numbers: Any) -> None:
    """Numbers n = q - zero of Q4_0, Q4_1, Q5_0, Q5_1: 16 bytes of codes, low halves before high halves.

    A block has so many bytes. Fifth bits, 32 in four bytes, are ``fifth_at`` bytes into it; 0: there are none.
    """
    for i in range(raw.shape[0]):
        for g in range(numbers.shape[1] // _GROUP):
            x, y = raw[i, g * block : g * block + block], numbers[i, g * _GROUP : g * _GROUP + _GROUP]
            for j in range(16):
                low, high = np.int32(x[codes_at + j] & 15), np.int32(x[codes_at + j] >> 4)
                if fifth_at > 0:
                    low |= (np.int32(x[fifth_at + j // 8] >> np.uint8(j % 8)) & 1) << 4
                    high |= (np.int32(x[fifth_at + 2 + j // 8] >> np.uint8(j % 8)) & 1) << 4
                y[j], y[16 + j] = low - np.int32(zero), high - np.int32(zero)


def byte_rows(raw: Array, numbers: Array) -> None:
    """Numbers of Q8_0: 32 signed bytes, from the third byte of a block on."""
    shape = len(raw), numbers.shape[1] // _GROUP
    numbers.reshape(*shape, _GROUP)[...] = raw.reshape(*shape, 34)[:, :, 2:].view(np.int8)


@kernel(strict=True)
def table_rows(raw: Any, table: Any, block: Any, at: Any, numbers: Any) -> None:
    """Codes n of IQ4_NL, IQ4_XS, MXFP4: those of 32 elements in 16 bytes, low halves before high halves.

    The first codes are ``at`` bytes into a block of so many bytes, and fill it.
    """
    parts = (block - at) // 16
    for i in range(raw.shape[0]):
        for g in range(numbers.shape[1] // _GROUP):
            start = g // parts * block + at + g % parts * 16
            x, y = raw[i, start : start + 16], numbers[i, g * _GROUP : g * _GROUP + _GROUP]
            for j in range(16):
                y[j] = table[x[j] & 15]
                y[16 + j] = table[x[j] >> 4]


@kernel(strict=True)
def q3_k_rows(raw: Any, numbers: Any) -> None:
    """Codes n of Q3_K: 32 bytes of inverted third bits, 64 of low two bits, 12 of scales: 16 x 4, then 16 x 2 bits."""
    for i in range(raw.shape[0]):
        for g in range(numbers.shape[1] // _GROUP):
            x, y = raw[i, g // 8 * 110 : g // 8 * 110 + 110], numbers[i, g * _GROUP : g * _GROUP + _GROUP]
            part = g % 8
            low = x[32 + part // 4 * 32 : 64 + part // 4 * 32]
            shift, third = np.uint8(part % 4 * 2), np.uint8(part)
            for half in range(2):
                k = 2 * part + half
                s = (x[96 + k % 8] >> np.uint8(k // 8 * 4)) & 15 | ((x[104 + k % 4] >> np.uint8(k // 4 * 2)) & 3) << 4
                minus = -np.float32(np.int32(s) - np.int32(32))
                for j in range(16 * half, 16 * half + 16):
                    q = np.int32((low[j] >> shift) & 3) - np.int32(4) * (1 - np.int32((x[j] >> third) & 1))
                    y[j] = minus * np.float32(q)  # as floats, in which zero has the reference's sign


@kernel(strict=True)
def tq1_0_rows(raw: Any, numbers: Any) -> None:
    """Codes n of TQ1_0: 32 bytes of five digits, 16 of five, 4 of four: digit k of all bytes before digit k + 1.

    A byte is the digits' fraction of 3^5, scaled to 256: times 3^k without carry, then times 3, it carries digit k.
    """
    for i in range(raw.shape[0]):
        for b in range(numbers.shape[1] // 256):
            x, y = raw[i, b * 54 : b * 54 + 54], numbers[i, b * 256 : b * 256 + 256]
            for start, count, to, digits in ((0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)):
                power = np.int32(1)
                for k in range(digits):
                    for j in range(count):
                        fraction = (np.int32(x[start + j]) * power) & 255
                        y[to + k * count + j] = ((fraction * 3) >> 8) - 1
                    power *= np.int32(3)


@kernel(strict=True)
def tq2_0_rows(raw: Any, numbers: Any) -> None:
    """Codes n of TQ2_0: two halves of 128 elements, 32 bytes each; two bits of all bytes before the next two."""
    for i in range(raw.shape[0]):
        for g in range(numbers.shape[1] // _GROUP):
            start = g // 8 * 66 + g % 8 // 4 * 32
            x, y = raw[i, start : start + _GROUP], numbers[i, g * _GROUP : g * _GROUP + _GROUP]
            shift = np.uint8(g % 4 * 2)
            for j in range(_GROUP):
                y[j] = np.int32((x[j] >> shift) & 3) - np.int32(1)


@kernel(strict=True)
def q4_z_rows(raw: Any, numbers: Any) -> None:
    """Codes n of Q4_Z: zero point in the third byte, from the fifth on 16 of codes as in Q4_0."""
    for i in range(raw.shape[0]):
        for g in range(numbers.shape[1] // _GROUP):
            x, y = raw[i, g * 20 : g * 20 + 20], numbers[i, g * _GROUP : g * _GROUP + _GROUP]
            zero = np.int32(x[2])
            for j in range(16):
                y[j] = np.int32(x[4 + j] & 15) - zero
                y[16 + j] = np.int32(x[4 + j] >> 4) - zero


def _halves(blocks: Array, at: int) -> Array:
    """The 16-bit floats ``at`` bytes into each block, as float32 (n, blocks, 1)."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2").astype(np.float32)


def _six_bit_scales(blocks: Array) -> Array:
    """d s of IQ4_XS: 16-bit d; high two bits of eight s in 16; their low four in 4 bytes."""
    high = np.ascontiguousarray(blocks[:, :, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = blocks[:, :, 4:8, None] >> np.array([0, 4], np.uint8)
    s = (low.reshape(*blocks.shape[:2], 8) & 15).astype(np.int32) | (high.astype(np.int32) & 3) << 4
    with np.errstate(invalid="ignore"):  # infinity times 0
        return _halves(blocks, 0) * (s - 32).astype(np.float32)


def _powers(blocks: Array) -> Array:
    """2^(e - 128), of which the two smallest are subnormal."""
    e = blocks[:, :, :1].astype(np.uint32)
    return np.where(e < 2, np.uint32(0x00200000) << e, (e - np.uint32(1)) << np.uint32(23)).view(np.float32)


class _Type(NamedTuple):
    """scales of blocks (n, B, bytes): float32 (n, B, 1 or groups of a block); numbers of rows, into int8 or float32.

    mins of blocks of 32: float32 (n, B, 1).
    """

    scales: Callable[[Array], Array]
    numbers: Callable[[Array, Array], None]
    mins: Callable[[Array], Array] | None = None


def _nibbles(block: int, fifth_at: int, codes_at: int, zero: int) -> _Type:
    """A type of ``nibble_rows``: its scale comes first, then, if there is no zero point, its min."""
    return _Type(
        lambda blocks: _halves(blocks, 0),
        lambda raw, to: nibble_rows(raw, block, fifth_at, codes_at, zero, to),
        None if zero else lambda blocks: _halves(blocks, 2),
    )


WHOLE_TYPES: dict[str, _Type] = {
    "Q4_0": _nibbles(18, 0, 2, 8),
    "Q4_1": _nibbles(20, 0, 4, 0),
    "Q5_0": _nibbles(22, 2, 6, 16),
    "Q5_1": _nibbles(24, 4, 8, 0),
    "Q8_0": _Type(lambda blocks: _halves(blocks, 0), byte_rows),
    "Q3_K": _Type(lambda blocks: -_halves(blocks, 108), q3_k_rows),
    "IQ4_NL": _Type(lambda blocks: _halves(blocks, 0), lambda raw, to: table_rows(raw, _IQ4, 18, 2, to)),
    "IQ4_XS": _Type(_six_bit_scales, lambda raw, to: table_rows(raw, _IQ4, 136, 8, to)),
    "MXFP4": _Type(_powers, lambda raw, to: table_rows(raw, _FP4, 17, 1, to)),
    "TQ1_0": _Type(lambda blocks: _halves(blocks, 52), tq1_0_rows),
    "TQ2_0": _Type(lambda blocks: _halves(blocks, 64), tq2_0_rows),
    "Q4_Z": _Type(lambda blocks: _halves(blocks, 0), q4_z_rows),
}


def whole_numbers(dtype: str, raw: Array, numbers: Array) -> tuple[Array, Array]:
    """The numbers of stored rows into ``numbers`` (n, K), int8 or float32.

    Args:
        dtype: a key of WHOLE_TYPES.
        raw: (n, bytes per row) uint8, read-only, C-contiguous.
        numbers: w = scale number + min; K a multiple of the type's block length.

    Returns:
        Their scales (n, K / 32) and mins (n, K / 32 or 0), float32.
    """
    per_block, block_bytes = BLOCKS[dtype]
    of = WHOLE_TYPES[dtype]
    of.numbers(raw, numbers)
    rows, groups = len(raw), numbers.shape[1] // _GROUP
    blocks = raw.reshape(rows, raw.shape[1] // block_bytes, block_bytes)
    scales = of.scales(blocks)
    scales = np.repeat(scales, per_block // _GROUP // scales.shape[2], axis=2).reshape(rows, groups)
    return scales, np.empty((rows, 0), np.float32) if of.mins is None else of.mins(blocks).reshape(rows, groups)


@kernel(strict=True)
def scale_groups(x: Any, scales: Any, mins: Any) -> None:
    """x (n, K) = scale x + min, rounded twice, with scales (n, K / 32) and mins (n, K / 32 or 0)."""
    for i in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            y, scale = x[i, g * _GROUP : g * _GROUP + _GROUP], scales[i, g]
            if mins.shape[1] > 0:
                low = mins[i, g]
                for j in range(_GROUP):
                    y[j] = scale * y[j] + low
            else:  # without + 0, which would make 0 of -0
                for j in range(_GROUP):
                    y[j] *= scale


def whole_rows(dtype: str, raw: Array, out: Array) -> None:
    """out (n, K) float32 = the values of stored rows."""
    scale_groups(out, *whole_numbers(dtype, raw, out))
