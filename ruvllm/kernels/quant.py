"""Integer matmul: weights in 4, 5 or 8 bits times activations in 8 bits (see quant_layout.py), by integer dot products.

    y[r] = sum over groups g of  scale[r, g] xs[g] sum((code - zero) xq)  +  min[r, g] xs[g] sum(xq)
         + sum over outliers (k, x) of  W[r, k] x

Integer sums are exact, and float sums are taken in one order whatever the number of tokens: all instruction sets give
the same integers, and a token's result does not depend on its neighbours.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels._simd import (
    bits_at,
    bytes_to_f32,
    dot_rows,
    end_rows,
    f32_load,
    f32_store,
    f32_store_first,
    f32_zero,
    f32_zeros,
    find_magnitude,
    fma,
    fma_places,
    fma_rows,
    halfs_load,
    high_nibbles,
    low_nibbles,
    never_inline,
    offset_rows,
    prefetch_l2,
    scale_rows,
    sdot_rows,
    signed_offset_rows,
    splat,
    splat_at,
    stack_f32,
    stack_i32,
    start_rows,
    store_rows,
    sum_rows,
    tile_zeros,
    to_f32,
    u8_load,
    with_fifth_bit,
)
from ruvllm.kernels._threads import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels._tile import LANES, STREAMS
from ruvllm.kernels._views import flat
from ruvllm.kernels.quant_layout import (
    GROUP,
    HALFS,
    INT4,
    INT5,
    INT8,
    LINE,
    NO_ZERO,
    OFFSETS,
    OUTLIERS,
    ZERO4,
    ZERO5,
    ZERO8,
)

_FEW = 4  # tokens of the smaller tile, for those that do not fill a whole one
_AT_ONCE = 128  # tokens whose outliers' columns are listed together
_LISTED = _AT_ONCE * OUTLIERS
_UNPACKED = _LISTED * 16  # floats: 32 KB, of which little is used
_NO_COLUMN = np.float32(np.inf)  # in a list of columns, behind its end
_NONE = np.float32(-1)  # no column either, and a whole number


# For each token of a tile (as many as ``rows`` has vectors), the codes at byte ``at`` times group ``xi`` of the
# activations, sum((code - zero) xq); the next token's group is ``groups`` further.


@inline_kernel
def _dots_int4(w: Any, at: Any, xq: Any, offsets: Any, xi: Any, groups: Any, has_mins: Any, rows: Any) -> Any:
    zero = offset_rows(offsets, xi * OFFSETS + (NO_ZERO if has_mins else 0), groups * OFFSETS, rows)
    sums = start_rows(zero)
    q, step = xi * GROUP, groups * GROUP
    for j in range(4):
        line = u8_load(w, at + j * LINE)
        sums = dot_rows(sums, low_nibbles(line), xq, q + 4 * j, step)
        sums = dot_rows(sums, high_nibbles(line), xq, q + 4 * j + 16, step)
    return end_rows(sums, zero)


@inline_kernel
def _dots_int5(w: Any, at: Any, xq: Any, offsets: Any, xi: Any, groups: Any, has_mins: Any, rows: Any) -> Any:
    sums = offset_rows(offsets, xi * OFFSETS + (NO_ZERO if has_mins else 1), groups * OFFSETS, rows)
    q, step = xi * GROUP, groups * GROUP
    fifth = u8_load(w, at + 4 * LINE)
    for half in range(0, 4, 2):  # in halves: no accumulator of any target overflows
        so_far = sums
        sums = start_rows(so_far)
        for j in range(half, half + 2):
            line = u8_load(w, at + j * LINE)
            sums = dot_rows(sums, with_fifth_bit(low_nibbles(line), fifth, j), xq, q + 4 * j, step)
            sums = dot_rows(sums, with_fifth_bit(high_nibbles(line), fifth, j + 4), xq, q + 4 * j + 16, step)
        sums = end_rows(sums, so_far)
    return sums


@inline_kernel
def _dots_int8(w: Any, at: Any, xq: Any, offsets: Any, xi: Any, groups: Any, has_mins: Any, rows: Any) -> Any:
    sums = signed_offset_rows(offsets, xi * OFFSETS, groups * OFFSETS, rows)
    for j in range(8):
        sums = sdot_rows(sums, u8_load(w, at + j * LINE), xq, xi * GROUP + 4 * j, groups * GROUP)
    return sums


# The codes of column k of the group at byte ``at``, one for each of 16 rows.


@inline_kernel
def _column_int4(w: Any, at: Any, k: Any) -> Any:
    quad, bit = k >> 2, (k & 3) << 3
    return to_f32(bits_at(u8_load(w, at + (quad & 3) * LINE), bit + (quad & 4), 4))


@inline_kernel
def _column_int5(w: Any, at: Any, k: Any) -> Any:
    fifth = to_f32(bits_at(u8_load(w, at + 4 * LINE), ((k & 3) << 3) + (k >> 2), 1))
    return fma(fifth, splat(np.float32(16)), _column_int4(w, at, k))


@inline_kernel
def _column_int8(w: Any, at: Any, k: Any) -> Any:
    return bytes_to_f32(u8_load(w, at + (k >> 2) * LINE), k & 3)


@inline_kernel
def _list_columns(outliers: Any, lo: Any, hi: Any, found: Any, places: Any) -> Any:
    """List each column that is an outlier of tokens lo:hi once in ``found``, and where it stands in ``places``.

    Many tokens have the same ones, so that few are unpacked. Returns how many there are.
    """
    count = 0
    for i in range((hi - lo) * OUTLIERS):
        k = outliers[2 * (lo * OUTLIERS + i)]
        block, at = 0, LANES
        while block < count and at == LANES:
            at = find_magnitude(f32_load(found, block), k)
            block += LANES
        if at < LANES:
            places[i] = (block - LANES + at) * LANES
        else:
            if count % LANES == 0:
                f32_store(found, count, splat(_NO_COLUMN))
            found[count] = k
            places[i] = count * LANES
            count += 1
    return count


@inline_kernel
def _column(column: Any, zero: Any, has_mins: Any, w: Any, at: Any, k: Any) -> Any:
    """Column k of W, in the block at byte ``at``, as it multiplies an outlier; mins do so in the totals."""
    codes = column(w, at + (2 * HALFS if has_mins else HALFS), k % GROUP)
    return (codes - splat(ZERO8 if has_mins else zero)) * halfs_load(w, at)


@inline_kernel
def _unpack_columns(
    column: Any, zero: Any, has_mins: Any, w: Any, size: Any, p: Any, groups: Any, found: Any, count: Any,
    columns: Any,
) -> None:  # fmt: skip
    """The listed columns of panel p as they multiply outliers; mins do so in the totals."""
    for i in range(count):
        k = np.int64(found[i])
        f32_store(columns, i * LANES, _column(column, zero, has_mins, w, (p * groups + k // GROUP) * size, k))


@inline_kernel
def _add_outliers(columns: Any, places: Any, outliers: Any, first: Any, t: Any, zeros: Any, acc: Any) -> Any:
    """acc + the sum of the outliers of the tokens from t on, times their columns of W.

    ``first``: the token at which the places begin.
    """
    kept = zeros
    for i in range(t * OUTLIERS, (t + 1) * OUTLIERS):
        kept = fma_places(columns, places, i - first * OUTLIERS, outliers, 2 * i + 1, OUTLIERS, kept)
    return sum_rows(acc, kept)


@inline_kernel
def _add_block(
    dots: Any, has_mins: Any, w: Any, at: Any, xq: Any, xs: Any, offsets: Any, totals: Any,
    xi: Any, groups: Any, acc: Any,
) -> Any:  # fmt: skip
    """acc + the block at byte ``at`` times group ``xi`` of the activations, for each token of the tile."""
    if has_mins:  # first, as they lie: memory is read fastest in order
        acc = fma_rows(halfs_load(w, at + HALFS), totals, xi, groups, acc)
    sums = dots(w, at + (2 * HALFS if has_mins else HALFS), xq, offsets, xi, groups, has_mins, acc)
    return scale_rows(acc, sums, halfs_load(w, at), xs, xi, groups)


@inline_kernel
def _tile(
    dots: Any, has_mins: Any, w: Any, size: Any, xq: Any, xs: Any, offsets: Any, totals: Any,
    columns: Any, places: Any, outliers: Any, first: Any, p: Any, t: Any, groups: Any, zeros: Any, out: Any, rows: Any,
) -> None:  # fmt: skip
    """The 16 outputs of panel p for the tokens from t on, as many as there are zeros: weights are unpacked once."""
    acc = zeros
    for g in range(groups):
        at, xi = (p * groups + g) * size, t * groups + g
        acc = _add_block(dots, has_mins, w, at, xq, xs, offsets, totals, xi, groups, acc)
    acc = _add_outliers(columns, places, outliers, first, t, zeros, acc)
    at, count = t * rows + p * LANES, rows - p * LANES
    if count >= LANES:
        store_rows(out, at, rows, acc)
    else:
        for r in range(len(acc)):
            f32_store_first(out, at + r * rows, acc[r], count)


def _panels_of(dots: Any, column: Any, zero: Any) -> Any:
    """quant_matmul for one kind of weights: how it multiplies, what a column of it is, and its code of 0."""

    @part_kernel
    def _one_token(
        has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, step: Any,
    ) -> None:  # fmt: skip
        """The only token times STREAMS runs of ``step`` panels from lo on, read side by side: memory is the limit."""
        never_inline()
        groups, size = blocks.shape[1], blocks.shape[2]
        w, xq, xs, offsets, totals = flat(blocks), flat(xq), flat(xs), flat(offsets), flat(totals)
        outliers, out = flat(outliers), flat(out)
        for p in range(lo, lo + step):
            a, b, c, d = f32_zeros(1), f32_zeros(1), f32_zeros(1), f32_zeros(1)
            a_kept, b_kept, c_kept, d_kept = f32_zero(), f32_zero(), f32_zero(), f32_zero()
            i, k = 0, np.int64(outliers[0])
            apart = step * groups * size
            for g in range(groups):
                at = (p * groups + g) * size
                a = _add_block(dots, has_mins, w, at, xq, xs, offsets, totals, g, groups, a)
                at += apart
                b = _add_block(dots, has_mins, w, at, xq, xs, offsets, totals, g, groups, b)
                at += apart
                c = _add_block(dots, has_mins, w, at, xq, xs, offsets, totals, g, groups, c)
                at += apart
                d = _add_block(dots, has_mins, w, at, xq, xs, offsets, totals, g, groups, d)
                while k // GROUP == g:  # now, when the blocks are near: to come back would break the streams
                    x = splat_at(outliers, 2 * i + 1)
                    a_kept = fma(_column(column, zero, has_mins, w, at - 3 * apart, k), x, a_kept)
                    b_kept = fma(_column(column, zero, has_mins, w, at - 2 * apart, k), x, b_kept)
                    c_kept = fma(_column(column, zero, has_mins, w, at - apart, k), x, c_kept)
                    d_kept = fma(_column(column, zero, has_mins, w, at, k), x, d_kept)
                    i += 1
                    k = np.int64(outliers[2 * i] if i < OUTLIERS else _NONE)
            f32_store(out, p * LANES, a[0] + a_kept)
            f32_store(out, (p + step) * LANES, b[0] + b_kept)
            f32_store(out, (p + 2 * step) * LANES, c[0] + c_kept)
            f32_store(out, (p + 3 * step) * LANES, d[0] + d_kept)

    @part_kernel
    def _tokens(
        has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, hi: Any,
    ) -> None:  # fmt: skip
        """All tokens times panels lo:hi, in tiles."""
        never_inline()
        groups, size, tokens, rows = blocks.shape[1], blocks.shape[2], out.shape[0], out.shape[1]
        w, xq, xs, offsets, totals = flat(blocks), flat(xq), flat(xs), flat(offsets), flat(totals)
        outliers, out = flat(outliers), flat(out)
        height = len(tile_zeros())
        found, places, columns = stack_f32(_LISTED), stack_i32(_LISTED), stack_f32(_UNPACKED)
        for first in range(0, tokens, _AT_ONCE):
            end = min(first + _AT_ONCE, tokens)
            count = _list_columns(outliers, first, end, found, places)
            for p in range(lo, hi):
                for at in range((p + 1) * groups * size, (p + 2) * groups * size, LINE):
                    prefetch_l2(w, at)  # the next panel: its columns are read here and there, which no machine foresees
                _unpack_columns(column, zero, has_mins, w, size, p, groups, found, count, columns)
                t = first
                while t + height <= end:
                    _tile(
                        dots, has_mins, w, size, xq, xs, offsets, totals, columns, places, outliers, first,
                        p, t, groups, tile_zeros(), out, rows,
                    )  # fmt: skip
                    t += height
                while t + _FEW <= end:
                    _tile(
                        dots, has_mins, w, size, xq, xs, offsets, totals, columns, places, outliers, first,
                        p, t, groups, f32_zeros(_FEW), out, rows,
                    )  # fmt: skip
                    t += _FEW
                while t < end:
                    _tile(
                        dots, has_mins, w, size, xq, xs, offsets, totals, columns, places, outliers, first,
                        p, t, groups, f32_zeros(1), out, rows,
                    )  # fmt: skip
                    t += 1

    @inline_kernel
    def _panels(
        has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, hi: Any,
    ) -> None:  # fmt: skip
        """quant_matmul for one kind of weights."""
        step = max(0, min(hi, out.shape[1] // LANES) - lo) // STREAMS
        if out.shape[0] == 1 and step > 0:
            if has_mins:  # constants, so that each has code of its own: one loop for both spills registers
                _one_token(True, blocks, xq, xs, offsets, totals, outliers, out, lo, step)
            else:
                _one_token(False, blocks, xq, xs, offsets, totals, outliers, out, lo, step)
            lo += STREAMS * step
        if lo < hi:
            _tokens(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi)

    return _panels


_PANELS = {
    INT4: _panels_of(_dots_int4, _column_int4, ZERO4),
    INT5: _panels_of(_dots_int5, _column_int5, ZERO5),
    INT8: _panels_of(_dots_int8, _column_int8, ZERO8),
}


@cache
def quant_matmul_part(kinds: tuple[int, ...]) -> Any:
    """quant_matmul as a part of larger kernels, for these kinds alone: each takes seconds to compile."""
    int4, int5, int8 = (_PANELS[kind] if kind in kinds else None for kind in (INT4, INT5, INT8))

    @part_kernel
    def products(
        kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, hi: Any,
    ) -> None:  # fmt: skip
        if int4 is not None and kind == INT4:
            int4(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi)
        if int5 is not None and kind == INT5:
            int5(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi)
        if int8 is not None and kind == INT8:
            int8(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi)

    return products


_matmul = quant_matmul_part((INT4, INT5, INT8))


@kernel(strict=True)
def quant_matmul(
    kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
    out: Any, lo: Any, hi: Any,
) -> None:  # fmt: skip
    """out (T, N) = x W^T for the rows of panels lo:hi, W quantised as ``kind``, x as quantize_activations left it."""
    _matmul(kind, has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi)


@parallel_kernel
def quant_matmul_parallel(
    kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
    out: Any, threads: Any,
) -> None:  # fmt: skip
    """quant_matmul with the panels split over threads: each output is one thread's, so any split gives the same."""
    panels = blocks.shape[0]
    for t in prange(threads):
        lo, hi = panels * t // threads, panels * (t + 1) // threads
        quant_matmul(kind, has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi)


def linear_quant(
    kind: int, has_mins: bool, blocks: np.ndarray,
    xq: np.ndarray, xs: np.ndarray, offsets: np.ndarray, totals: np.ndarray, outliers: np.ndarray, out: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """out (T, N) = x W^T for callers that own their buffers (``model.Linear``): sizes are theirs to guarantee."""
    threads = threads_for(len(out) * blocks.size, PARALLEL_MACS, len(blocks))
    if threads == 1:
        quant_matmul(kind, has_mins, blocks, xq, xs, offsets, totals, outliers, out, 0, len(blocks))
    else:
        launch(quant_matmul_parallel, kind, has_mins, blocks, xq, xs, offsets, totals, outliers, out, threads)
    return out
