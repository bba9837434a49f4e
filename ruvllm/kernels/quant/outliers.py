"""Outliers: activations that are not rounded, and the columns of quantised weights that they multiply."""

from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.quant.layout import GROUP, LINE, OUTLIERS, SCALE_BYTES, ZERO8
from ruvllm.kernels.simd.vectors import (
    bits_at,
    bytes_to_f32,
    f16_load,
    f32_load,
    f32_store,
    find_magnitude,
    fma,
    fma_columns,
    splat,
    sum_rows,
    to_f32,
    u8_load,
)

_NO_COLUMN = np.float32(np.inf)  # pads a list of columns


class Columns(NamedTuple):
    """The columns of W that are outliers of the tokens from ``first`` on: ``count`` of them, numbered in ``found``.

    offsets: for each outlier, that of its column in ``unpacked``.
    """

    outliers: Any
    first: Any
    found: Any
    count: Any
    offsets: Any
    unpacked: Any


@inline_kernel
def column_int4(w, at, k):
    """The 4-bit codes of column k of the group at byte ``at``, one for each of 16 rows."""
    quad, bit = k >> 2, (k & 3) << 3
    return to_f32(bits_at(u8_load(w, at + (quad & 3) * LINE), bit + (quad & 4), 4))


@inline_kernel
def column_int5(w, at, k):
    """The 5-bit codes of column k of the group at byte ``at``, one for each of 16 rows."""
    fifth = to_f32(bits_at(u8_load(w, at + 4 * LINE), ((k & 3) << 3) + (k >> 2), 1))
    return fma(fifth, splat(np.float32(16)), column_int4(w, at, k))


@inline_kernel
def column_int8(w, at, k):
    """The 8-bit codes of column k of the group at byte ``at``, one for each of 16 rows."""
    return bytes_to_f32(u8_load(w, at + (k >> 2) * LINE), k & 3)


@inline_kernel
def list_columns(outliers, lo, hi, found, offsets):
    """List the distinct outlier columns of tokens lo:hi in ``found``, and each outlier's offset in ``offsets``.

    Many tokens share their outlier columns, so few are unpacked. Returns how many there are.
    """
    count = 0
    for i in range((hi - lo) * OUTLIERS):
        k = outliers[2 * (lo * OUTLIERS + i)]
        block, at = 0, LANES
        while block < count and at == LANES:
            at = find_magnitude(f32_load(found, block), k)
            block += LANES
        if at < LANES:
            offsets[i] = (block - LANES + at) * LANES
        else:
            if count % LANES == 0:
                f32_store(found, count, splat(_NO_COLUMN))
            found[count] = k
            offsets[i] = count * LANES
            count += 1
    return count


@inline_kernel
def outlier_column(column, zero, has_mins, w, at, k):
    """Column k of W, dequantised, from the block at byte ``at``; mins are multiplied in the totals."""
    codes = column(w, at + (2 * SCALE_BYTES if has_mins else SCALE_BYTES), k % GROUP)
    return (codes - splat(ZERO8 if has_mins else zero)) * f16_load(w, at)


@inline_kernel
def unpack_columns(column, zero, p, at, columns):
    """Dequantise the listed columns of the panels at ``at``; mins are multiplied in the totals."""
    for i in range(columns.count):
        k = np.int64(columns.found[i])
        for panel in range(len(at)):
            block, to = at[panel] + k // GROUP * p.size, (i * len(at) + panel) * LANES
            f32_store(columns.unpacked, to, outlier_column(column, zero, p.has_mins, p.w, block, k))


@inline_kernel
def add_outliers(columns, t, at, zeros, tile):
    """The tile plus, for the tokens from t on, the sum of their outliers times their columns of W."""
    kept, outliers = zeros, columns.outliers
    index, x = (t - columns.first) * OUTLIERS, 2 * OUTLIERS * t + 1
    for i in range(OUTLIERS):
        kept = fma_columns(columns.unpacked, columns.offsets, index + i, outliers, x + 2 * i, OUTLIERS, at, kept)
    return sum_rows(tile, kept)
