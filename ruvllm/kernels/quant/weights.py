"""Quantise and dequantise: float32 as 4- or 8-bit codes in groups of 32 with 16-bit scales.

    INT8              x ~ scale code           code -127..127
    INT4, symmetric   x ~ scale (code - 8)     code 0..15, scale of either sign
    INT4, with mins   x ~ scale code + min     code 0..15

Codes are rounded against the scale (and min) as stored, in IEEE half precision, and scales are large enough for every
element of the group: no error exceeds scale / 2, but for float32 rounding. A group is 32 elements of the last axis.
"""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.quant.layout import GROUP, INT4, INT8
from ruvllm.kernels.simd.vectors import (
    f16_to_f32,
    f32_load,
    f32_load_first,
    f32_to_f16,
    f32_zero,
    fma,
    fmax,
    fmin,
    hmax,
    hsum,
    i8_store,
    lanes_between,
    round_to_i32,
    splat,
    to_f32,
)
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.over_rows import over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_INFINITY = np.float32(np.inf)
_NAN_BITS = np.uint16(0x7E00)
_INFINITE_BITS = np.uint16(0x7C00)  # also the exponent's bits, all ones in infinities and NaN
_SIGN = np.uint16(0x8000)
_ONE_BIT = np.uint16(1)
_NO_BITS = np.uint16(0)
_LARGEST_INT8, _REACH_INT8 = np.float32(127), np.float32(127.5)

# Symmetric 4-bit codes stand for -8..7, so the scale must be at least low / 8.5 and high / 7.5 for the extremes. The
# best of the scales from there up is taken, at which the largest magnitude is FIRST_TARGET - i TARGET_STEP steps: a
# group with few distinct values often fits one of them exactly.
_REACH_LOW, _REACH_HIGH = np.float32(8.5), np.float32(7.5)
_ZERO_CODE = np.float32(8)
_FIRST_TARGET, _TARGET_STEP, _TARGETS = np.float32(8.5), np.float32(0.25), 8

# With mins, the smallest element may be up to half a step below min, and the largest half a step above 15 steps: all
# combinations of three insets at either end are tried.
_INSET, _INSETS = np.float32(0.25), 3
_LAST_CODE, _REACH = np.float32(15), np.float32(15.5)


@inline_kernel
def _load_group(flat, at, left, other):
    """A group as two vectors; elements past the end of the row, ``left`` elements away, are ``other``."""
    if left >= GROUP:
        return f32_load(flat, at), f32_load(flat, at + LANES)
    a = lanes_between(f32_load_first(flat, at, left), 0, left, other)
    b = lanes_between(f32_load_first(flat, at + LANES, left - LANES), 0, left - LANES, other)
    return a, b


@inline_kernel
def _half_scale(wanted, least):
    """Bits of the half float nearest to ``wanted``, or of the next larger one where that is below ``least``."""
    bits = f32_to_f16(wanted)
    return np.uint16(bits + _ONE_BIT) if f16_to_f32(bits) < least else bits


@inline_kernel
def _half_below(x):
    """Bits of the largest half float that is not above x."""
    bits = f32_to_f16(x)
    if f16_to_f32(bits) <= x:
        return bits
    if bits == 0:
        return np.uint16(_SIGN | _ONE_BIT)
    return np.uint16(bits + _ONE_BIT) if bits & _SIGN else np.uint16(bits - _ONE_BIT)


@inline_kernel
def _codes(x, inverse, first, last):
    """round(x / scale) within first..last; ``inverse`` is 1 / scale in all lanes."""
    return round_to_i32(fmin(fmax(x * inverse, first), last))


@kernel(strict=True)
def quantize_rows(kind, x, codes, scales, mins, lo, hi):
    """Rows lo:hi of quantize_int8 or quantize_int4: x (n, K); codes (n, 32 G); scales (n, G); mins (n, G) or (n, 0).

    A scale of infinity means that x is too large for half-precision scales, one of NaN that x holds NaN or infinity.
    """
    columns, groups = x.shape[1], scales.shape[1]
    flat, to = x.reshape(-1), codes.reshape(-1)
    with_mins = mins.shape[1] > 0
    tries, first_code, last_code, shift = _TARGETS, -_ZERO_CODE, _LAST_CODE - _ZERO_CODE, _ZERO_CODE
    if kind == INT8:
        tries, first_code, last_code, shift = 1, -_LARGEST_INT8, _LARGEST_INT8, _ZERO
    elif with_mins:
        tries, first_code, last_code, shift = _INSETS * _INSETS, _ZERO, _LAST_CODE, _ZERO
    first, last, zero = splat(first_code), splat(last_code), f32_zero()
    for row in range(lo, hi):
        for g in range(groups):
            start, left, at = row * columns + g * GROUP, columns - g * GROUP, (row * groups + g) * GROUP
            # With mins, padded with an element of the group, so that zeros do not widen its range.
            a, b = _load_group(flat, start, left, flat[start] if with_mins else _ZERO)
            not_finite = hsum(fma(a, zero, b * zero)) != _ZERO
            low, high = hmax(fmax(zero - a, zero - b)), hmax(fmax(a, b))  # the extremes: -low and high
            sign, smallest, largest = _NO_BITS, -low, fmax(low, high)
            least = largest / _REACH_INT8
            if kind == INT4:
                least = fmax(low / _REACH_LOW, high / _REACH_HIGH)
                flipped = fmax(high / _REACH_LOW, low / _REACH_HIGH)
                if flipped < least and not with_mins:
                    sign, least = _SIGN, flipped  # a negative scale: the side with more codes serves positive elements
            best, best_low, best_error = _INFINITE_BITS, _NO_BITS, _INFINITY  # unless a half float is large enough
            for i in range(tries):
                low_bits, fits = _NO_BITS, True
                if kind == INT8:
                    bits = _half_scale(largest / _LARGEST_INT8, least)
                elif with_mins:
                    step = (high - smallest) / (_LAST_CODE + np.float32(i // _INSETS + i % _INSETS) * _INSET)
                    low_bits = _half_below(smallest + np.float32(i // _INSETS) * _INSET * step)
                    reach = (high - f16_to_f32(low_bits)) / _REACH
                    bits = _half_scale(fmax(step, reach), reach)
                    fits = f16_to_f32(low_bits) - smallest <= _HALF * f16_to_f32(bits)
                else:
                    wanted = largest / (_FIRST_TARGET - np.float32(i) * _TARGET_STEP)
                    bits = _half_scale(fmax(wanted, least), least) | sign
                scale = f16_to_f32(bits)
                inverse = splat(_ONE / scale if scale != _ZERO else _ZERO)
                offset, minus = splat(f16_to_f32(low_bits)), splat(-scale)
                ca, cb = a - offset, b - offset
                ea = fma(to_f32(_codes(ca, inverse, first, last)), minus, ca)
                eb = fma(to_f32(_codes(cb, inverse, first, last)), minus, cb)
                error = hsum(fma(ea, ea, eb * eb))
                if error < best_error and fits:
                    best, best_low, best_error = bits, low_bits, error
            scale = f16_to_f32(best)
            inverse, offset = splat(_ONE / scale if scale != _ZERO else _ZERO), splat(f16_to_f32(best_low))
            raised = round_to_i32(splat(shift))
            i8_store(to, at, _codes(a - offset, inverse, first, last) + raised)
            i8_store(to, at + LANES, _codes(b - offset, inverse, first, last) + raised)
            scales[row, g] = _NAN_BITS if not_finite else best
            if with_mins:
                mins[row, g] = best_low


quantize_parallel = over_rows(quantize_rows)


@kernel(strict=True)
def dequantize_rows(kind, codes, scales, mins, out, lo, hi):
    """Rows lo:hi of dequantize: codes (n, 32 G) uint8, int8 bits for INT8; scales (n, G); mins (n, G) or (n, 0)."""
    columns = out.shape[1]
    for row in range(lo, hi):
        for g in range(scales.shape[1]):
            scale = f16_to_f32(scales[row, g])
            low = f16_to_f32(mins[row, g]) if mins.shape[1] > 0 else _ZERO
            zero = _ZERO_CODE if kind == INT4 and mins.shape[1] == 0 else _ZERO
            start = g * GROUP
            count = min(GROUP, columns - start)
            group, y = codes[row, start : start + count], out[row, start : start + count]
            if kind == INT4:
                for i in range(count):
                    y[i] = scale * (np.float32(group[i]) - zero) + low
            else:
                for i in range(count):
                    y[i] = scale * np.float32(np.int8(group[i])) + low


def quantize_int8(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """code = round(x / scale), scale = max|x| / 127 of its group of 32, as an IEEE half float.

    Args:
        x: (..., K) float32. A last group shorter than 32 is padded with zeros.

    Returns:
        codes (..., 32 G) int8 of -127..127, and the bits of scales (..., G) as uint16; G = ceil(K / 32). No error
        |scale code - x| exceeds scale / 2; a group of zeros has scale 0.

    Raises:
        TypeError: ``x`` is not a float32 array.
        ValueError: NaN, infinity or a number beyond 127 x 65504 in ``x``.

    Source: the format is ggml's Q8_0.
    """
    x = check.float32("x", x, min_ndim=1)
    lead, groups = x.shape[:-1], (x.shape[-1] + GROUP - 1) // GROUP
    codes, scales = np.empty((*lead, groups * GROUP), np.int8), np.empty((*lead, groups), np.uint16)
    _quantize(INT8, x, codes.view(np.uint8), scales, np.empty((*lead, 0), np.uint16))
    return codes, scales


def quantize_int4(x: Any, symmetric: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """code = round(x / scale) + 8 or, not symmetric, code = round((x - min) / scale): 0..15, in groups of 32.

    The scale (and min) of a group is that of least squared error among a few that keep each error <= |scale| / 2.

    Args:
        x: (..., K) float32. A last group shorter than 32 is padded: with zeros if symmetric, else with its first
            element.
        symmetric: whether a group has no min.

    Returns:
        codes (..., 32 G) uint8; the bits of scales (..., G), IEEE half floats of either sign, as uint16; and those of
        mins, or None if symmetric.

    Raises:
        TypeError: ``x`` is not a float32 array.
        ValueError: NaN or infinity in ``x``, or a number too large for scales (symmetric: beyond 7.5 x 65504; else a
            range beyond 15 x 65504) or mins (below -65504) in half precision.

    Source: the formats are those of ggml's Q4_0 and Q4_1.
    """
    x, symmetric = check.float32("x", x, min_ndim=1), check.flag("symmetric", symmetric)
    lead, groups = x.shape[:-1], (x.shape[-1] + GROUP - 1) // GROUP
    codes, scales = np.empty((*lead, groups * GROUP), np.uint8), np.empty((*lead, groups), np.uint16)
    mins = np.empty((*lead, 0 if symmetric else groups), np.uint16)
    _quantize(INT4, x, codes, scales, mins)
    return codes, scales, None if symmetric else mins


def dequantize(
    codes: Any,
    scales: Any,
    mins: np.ndarray | None = None,
    columns: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """scale code + min; without mins, scale code for int8 codes and scale (code - 8) for 4-bit codes, which are uint8.

    Args:
        codes: (..., 32 G) int8, or uint8 of 0..15.
        scales, mins: (..., G) uint16, bits of IEEE half floats.
        columns: K, at most 32 G: what is beyond is left out.
        out: (..., K) float32 to write into.

    Returns:
        (..., K) float32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not match.
    """
    if check.is_half(out):
        return check.rounded(out, dequantize, codes, scales, mins, columns)
    codes, scales = check.codes(codes, scales, GROUP)
    *lead, groups = scales.shape
    columns = check.columns(columns, groups, GROUP)
    mins = np.empty((*lead, 0), np.uint16) if mins is None else check.bits("mins", mins, scales.shape)
    out = check.output("out", out, (*lead, columns))
    if out.size:
        kind = INT8 if codes.dtype == np.int8 else INT4
        rows = check.rows(codes.view(np.uint8))
        dequantize_rows(kind, rows, check.rows(scales), mins.reshape(len(rows), -1), check.rows(out), 0, len(rows))
    return out


def _quantize(kind: int, x: np.ndarray, codes: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> None:
    """Fill codes (uint8), scales and mins. Raises ValueError for numbers that cannot be quantised."""
    if not x.size:
        return
    rows, count = check.rows(x), x.size // x.shape[-1]
    arguments = (kind, rows, check.rows(codes), check.rows(scales), mins.reshape(count, -1))
    run_rows(quantize_rows, quantize_parallel, x.size, PARALLEL_ELEMENTS, count, *arguments)
    bad = scales & _INFINITE_BITS == _INFINITE_BITS
    if mins.size:
        bad |= mins & _INFINITE_BITS == _INFINITE_BITS
    if bad.any():
        row, group = divmod(int(bad.argmax()), scales.shape[-1])
        numbers = rows[row, group * GROUP : group * GROUP + GROUP]
        worst = int(np.argmax(np.where(np.isfinite(numbers), np.abs(numbers), np.inf)))
        where = (*np.unravel_index(row, x.shape[:-1]), group * GROUP + worst)
        expected = "numbers that 16-bit scales can hold" if np.isfinite(numbers[worst]) else "finite numbers"
        raise ValueError(f"x: expected {expected}, found {numbers[worst]} at {tuple(map(int, where))}")


def _example(rng: np.random.Generator, rows: int, n: int) -> dict[str, Any]:
    return {"x": rng.standard_normal((rows, n), np.float32)}


def _int4_example(rng: np.random.Generator, rows: int, n: int) -> dict[str, Any]:
    return {**_example(rng, rows, n), "symmetric": False}


def _quantized_example(rng: np.random.Generator, rows: int, n: int) -> dict[str, Any]:
    codes, scales = quantize_int8(**_example(rng, rows, n))
    return {"codes": codes, "scales": scales}


_SIZES = tuple({"rows": rows, "n": n} for rows, n in ((1, 4096), (64, 576), (64, 4096)))

SPECS = [
    KernelSpec(
        name="quantize_int8",
        function=quantize_int8,
        compiled=(quantize_rows, quantize_parallel),
        reference=reference.quantize_int8,
        formula="round(x / scale), scale = max|x| / 127 of 32",
        example=_example,
        flops=lambda rows, n: 4.0 * rows * n,
        bytes=lambda rows, n: (5.0 + 2 / GROUP) * rows * n,
        sizes=_SIZES,
        tolerance=1e-6,  # ties that float32 and float64 round differently
    ),
    KernelSpec(
        name="quantize_int4",
        function=quantize_int4,
        compiled=(quantize_rows, quantize_parallel),
        reference=reference.quantize_int4,
        formula="round((x - min) / scale), the best of some scales and mins for 32",
        example=_int4_example,
        flops=lambda rows, n: 7.0 * _INSETS**2 * rows * n,
        bytes=lambda rows, n: (5.0 + 4 / GROUP) * rows * n,
        sizes=_SIZES,
        tolerance=1e-3,  # ties as above, and scales whose errors float32 cannot tell apart
    ),
    KernelSpec(
        name="dequantize",
        function=dequantize,
        compiled=(dequantize_rows,),
        reference=reference.dequantize,
        formula="scale (code - zero) + min",
        example=_quantized_example,
        flops=lambda rows, n: 2.0 * rows * n,
        bytes=lambda rows, n: (5.0 + 2 / GROUP) * rows * n,
        sizes=_SIZES,
    ),
]
