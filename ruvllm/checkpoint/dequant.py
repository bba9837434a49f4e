"""Storage types -> float32: one decoder per type, equal bit for bit to ggml's reference dequantisation.

A quantised row is a chain of blocks, each with its own 16-bit scale ``d`` (and minimum ``m``), n = 32 or 256 elements:

    Q2_K  w = (d s) q - (dmin z)                                  s, z: 4-bit scale and minimum of each 16 elements
    Q4_K  w = (d s) q - (dmin z)    Q5_K  the same with 5 bits    s, z: 6-bit scale and minimum of each 32 elements
    Q6_K  w = (d s) (q - 32)                                      s: int8 scale of each 16 elements
    all others in blocks: see ``whole_numbers``

Products and sums are rounded in that order and never fused, as in the reference. Source: ggml-quants.c of ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ruvllm.checkpoint.storage import BLOCKS, row_bytes
from ruvllm.checkpoint.whole_numbers import WHOLE_TYPES, whole_rows
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.simd.vectors import f16_to_f32

Array = np.ndarray[Any, Any]

# Byte positions of the 16-bit float scales in a block.
SCALE_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "Q4_Z": (0,),
}  # fmt: skip
_NO_NUMBER = 255  # the exponent of MXFP4 that means NaN
_CHECKED_BLOCKS = 1 << 20  # blocks whose scales are checked together: bounds the temporary array


@kernel(strict=True)
def half(low: Any, high: Any) -> Any:
    """The float32 value of the 16-bit float with these two bytes."""
    return f16_to_f32(np.uint16(low) | np.uint16(np.uint16(high) << np.uint16(8)))


@kernel(strict=True)
def q2_k_rows(raw: Any, out: Any) -> None:
    """Rows of Q2_K: 16 bytes of s and z; 2 x 32 bytes, two bits of all codes before the next two; d, dmin."""
    for i in range(raw.shape[0]):
        for b in range(out.shape[1] // 256):
            x = raw[i, b * 84 : b * 84 + 84]
            d = half(x[80], x[81])
            dmin = half(x[82], x[83])
            for g in range(16):
                ds = d * np.float32(x[g] & 15)
                dz = dmin * np.float32(x[g] >> 4)
                q = x[16 + g // 8 * 32 + g % 2 * 16 : 32 + g // 8 * 32 + g % 2 * 16]
                y = out[i, b * 256 + g * 16 : b * 256 + g * 16 + 16]
                shift = np.uint8(g % 8 // 2 * 2)
                for j in range(16):
                    y[j] = ds * np.float32((q[j] >> shift) & 3) - dz


@kernel(strict=True)
def scale_and_minimum(packed: Any, j: Any) -> Any:
    """The j-th (0-7) of eight 6-bit scales and eight 6-bit minimums packed in 12 bytes, as float32."""
    if j < 4:
        s = packed[j] & 63
        z = packed[j + 4] & 63
    else:
        s = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
        z = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
    return np.float32(s), np.float32(z)


@kernel(strict=True)
def k_rows(raw: Any, out: Any, block: Any, fifth_at: Any, codes_at: Any) -> None:
    """Rows of Q4_K, Q5_K: 16-bit d, dmin; 12 bytes of scales; 4 x 32 bytes of codes, low halves before high halves.

    Of Q5_K also 32 bytes of fifth bits, bit g of byte j for element j of group g, ``fifth_at`` bytes into a block.
    """
    for i in range(raw.shape[0]):
        for b in range(out.shape[1] // 256):
            x = raw[i, b * block : b * block + block]
            d = half(x[0], x[1])
            dmin = half(x[2], x[3])
            fifth = x[fifth_at : fifth_at + 32]
            for g in range(8):
                s, z = scale_and_minimum(x[4:16], g)
                ds = d * s
                dz = dmin * z
                q = x[codes_at + g // 2 * 32 : codes_at + 32 + g // 2 * 32]
                y = out[i, b * 256 + g * 32 : b * 256 + g * 32 + 32]
                shift = np.uint32(4 * (g % 2))
                for j in range(32):
                    bits = (np.uint32(q[j]) >> shift) & 15
                    if fifth_at > 0:
                        bits |= ((np.uint32(fifth[j]) >> np.uint32(g)) & 1) << 4
                    y[j] = ds * np.float32(np.int32(bits)) - dz


@kernel(strict=True)
def q6_k_rows(raw: Any, out: Any) -> None:
    """Rows of Q6_K: two halves of 128 elements, low 4 bits in 64 bytes and high 2 in 32 each; int8 scales; d."""
    for i in range(raw.shape[0]):
        for b in range(out.shape[1] // 256):
            x = raw[i, b * 210 : b * 210 + 210]
            d = half(x[208], x[209])
            for g in range(8):  # 32 elements with the same shifts
                low = x[g // 4 * 64 + g % 2 * 32 : g // 4 * 64 + g % 2 * 32 + 32]
                high = x[128 + g // 4 * 32 : 160 + g // 4 * 32]
                low_shift = np.uint32(g % 4 // 2 * 4)
                high_shift = np.uint32(g % 4 * 2)
                y = out[i, b * 256 + g * 32 : b * 256 + g * 32 + 32]
                for part in range(2):
                    ds = d * np.float32(np.int8(x[192 + 2 * g + part]))
                    for j in range(16 * part, 16 * part + 16):
                        bits = (np.uint32(low[j]) >> low_shift) & 15 | ((np.uint32(high[j]) >> high_shift) & 3) << 4
                        y[j] = ds * np.float32(np.int32(bits) - np.int32(32))


def _f64_rows(raw: Array, out: Array) -> None:
    with np.errstate(all="ignore"):  # beyond float32's range: infinity or zero; NaN stays NaN
        out[...] = raw.view("<f8")


def _f32_rows(raw: Array, out: Array) -> None:
    out[...] = raw.view("<f4")


def _f16_rows(raw: Array, out: Array) -> None:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        out[...] = raw.view("<f2")


def _bf16_rows(raw: Array, out: Array) -> None:
    bits = out.view(np.uint32)
    bits[...] = raw.view("<u2")  # a bfloat16 is the high half of a float32
    bits <<= 16


# type -> decoder(raw, out); NumPy's own conversions are as fast where there are no blocks
ROW_DECODERS: dict[str, Callable[[Array, Array], None]] = {
    "F64": _f64_rows,
    "F32": _f32_rows,
    "F16": _f16_rows,
    "BF16": _bf16_rows,
    "Q4_P": _f32_rows,
    "Q2_K": q2_k_rows,
    "Q4_K": lambda raw, out: k_rows(raw, out, 144, 0, 16),
    "Q5_K": lambda raw, out: k_rows(raw, out, 176, 16, 48),
    "Q6_K": q6_k_rows,
    **{dtype: partial(whole_rows, dtype) for dtype in WHOLE_TYPES},
}


def dequantize_rows(dtype: str, raw: Array, columns: int, out: Array) -> Array:
    """out[i, :] = the float32 values of row i; bit-equal to ggml's reference.

    Args:
        dtype: a storage type, a key of ``ROW_DECODERS``.
        raw: (n, bytes per row) uint8, each row contiguous.
        columns: K, elements per row: a multiple of the type's block length.
        out: (n, K) float32, C-contiguous.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: an argument of another type, shape or layout, by name.
    """
    if dtype not in ROW_DECODERS:
        raise ValueError(f"dtype must be one of {', '.join(ROW_DECODERS)}, not {dtype!r}")
    per_block = BLOCKS[dtype][0]
    if columns < 0 or columns % per_block:
        raise ValueError(f"columns must be a multiple of {per_block} for {dtype}, not {columns}")
    if raw.dtype != np.uint8:
        raise TypeError(f"raw must be uint8, not {raw.dtype}")
    if out.dtype != np.float32:
        raise TypeError(f"out must be float32, not {out.dtype}")
    if raw.ndim != 2 or raw.shape[1] != row_bytes(dtype, columns) or not raw.flags.c_contiguous:
        raise ValueError(f"raw must be contiguous (n, {row_bytes(dtype, columns)}), not {raw.shape}")
    if out.shape != (raw.shape[0], columns) or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be writeable, C-contiguous ({raw.shape[0]}, {columns}), not {out.shape}")
    if raw.flags.writeable:  # files are read-only arrays: one compiled version serves both
        raw = raw.view()
        raw.flags.writeable = False
    ROW_DECODERS[dtype](raw, out)
    return out


def first_bad_scale(dtype: str, raw: Array) -> tuple[int, int, float] | None:
    """(row, block, value) of the first scale that is NaN or infinite; None when all are finite.

    Args:
        dtype: a storage type; those without block scales have nothing to find.
        raw: (n, bytes per row) uint8, C-contiguous.
    """
    block_bytes = BLOCKS[dtype][1]
    if dtype == "MXFP4":
        bad = raw[:, ::block_bytes] == _NO_NUMBER
        return (*divmod(int(bad.argmax()), bad.shape[1]), np.nan) if bad.any() else None
    if dtype not in SCALE_OFFSETS or raw.size == 0:
        return None
    halves = raw.reshape(-1, block_bytes).view("<u2")  # (blocks, block_bytes / 2)
    for start in range(0, len(halves), _CHECKED_BLOCKS):
        for at in SCALE_OFFSETS[dtype]:
            scales = halves[start : start + _CHECKED_BLOCKS, at // 2]
            bad = (scales & 0x7C00) == 0x7C00  # an exponent of ones: infinity or NaN
            if bad.any():
                block = int(bad.argmax())
                row, column = divmod(start + block, raw.shape[1] // block_bytes)
                return row, column, float(scales[block].view(np.float16))
    return None
