"""Integer matmul: weights in 4, 5 or 8 bits times activations in 8 bits (see quant/layout.py), by integer dot products.

    y[r] = sum over groups g of  scale[r, g] xs[g] sum((code - zero) xq)  +  min[r, g] xs[g] sum(xq)
         + sum over outliers (k, x) of  W[r, k] x

Integer sums are exact, and float sums are taken in one order whatever the number of tokens: all instruction sets give
the same integers, and a token's result does not depend on its neighbours.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import DOT_PANELS, LANES, STREAMS, TILE, UNROLLS
from ruvllm.kernels.quant.layout import (
    GROUP,
    HALFS,
    INT4,
    INT5,
    INT8,
    LINE,
    NO_ZERO,
    OFFSETS,
    OUTLIERS,
    SIDE,
    ZERO4,
    ZERO5,
    ZERO8,
    block_bytes,
)
from ruvllm.kernels.quant.outliers import (
    add_outliers,
    column_int4,
    column_int5,
    column_int8,
    list_columns,
    outlier_column,
    unpack_columns,
)
from ruvllm.kernels.simd.vectors import (
    dot_rows,
    end_rows,
    f32_store,
    f32_store_first,
    f32_zero,
    f32_zeros,
    fma,
    fma_panels,
    halfs_of,
    high_nibbles,
    lines_of,
    low_nibbles,
    never_inline,
    offset_rows,
    prefetch_l2,
    scale_rows,
    sdot_rows,
    signed_offset_rows,
    splat_at,
    stack_f32,
    stack_i32,
    stack_i64,
    start_rows,
    store_panels,
    with_fifth_bit,
)
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels.threads.team import take_turn

_FEW = 4  # tokens of the smaller tile, for those that do not fill a whole one
_TILE_SUMS, _FEW_SUMS = TILE * DOT_PANELS, _FEW * DOT_PANELS
_AT_ONCE = 10 * SIDE  # tokens whose outliers' columns are listed together
_LISTED = _AT_ONCE * OUTLIERS
_UNPACKED = _LISTED * DOT_PANELS * LANES  # floats: 30 or 60 KB, of which little is used
_AHEAD = 2048  # bytes from what one token reads to what it asks for: a machine's own prefetching ends with each page
_NONE = np.float32(-1)  # no column either, and a whole number


# A tile is one panel or two, whose blocks begin ``offset`` bytes from the places in the tuple ``at``, times some
# tokens, whose numbers of the group lie side by side from place ``xi`` on; ``tile`` has a vector for each pair of them.
# ``step``: from one token's group to the next, GROUP. These give sum((code - zero) xq).


@inline_kernel
def _dots_int4(
    w: Any, at: Any, offset: Any, xq: Any, step: Any, offsets: Any, xi: Any, has_mins: Any, tile: Any
) -> Any:
    zero = offset_rows(offsets, xi * OFFSETS + (NO_ZERO if has_mins else 0), OFFSETS, at, tile)
    sums = start_rows(zero)
    q = xi * GROUP
    for j in range(step // 8):  # 4, and so is what follows: LLVM unrolls loops only where it knows the step
        lines = lines_of(w, at, offset + j * LINE)
        sums = dot_rows(sums, low_nibbles(lines), xq, q + 4 * j, step)
        sums = dot_rows(sums, high_nibbles(lines), xq, q + 4 * j + 16, step)
    return end_rows(sums, zero)


@inline_kernel
def _two_of_int5(w: Any, at: Any, offset: Any, fifth: Any, j: Any, xq: Any, step: Any, q: Any, sums: Any) -> Any:
    lines = lines_of(w, at, offset + j * LINE)
    sums = dot_rows(sums, with_fifth_bit(low_nibbles(lines), fifth, j), xq, q + 4 * j, step)
    return dot_rows(sums, with_fifth_bit(high_nibbles(lines), fifth, j + 4), xq, q + 4 * j + 16, step)


@inline_kernel
def _dots_int5(
    w: Any, at: Any, offset: Any, xq: Any, step: Any, offsets: Any, xi: Any, has_mins: Any, tile: Any
) -> Any:
    sums = offset_rows(offsets, xi * OFFSETS + (NO_ZERO if has_mins else 1), OFFSETS, at, tile)
    q = xi * GROUP
    fifth = lines_of(w, at, offset + 4 * LINE)
    for half in range(0, 4, 2):  # in halves: no accumulator of any target overflows
        so_far = sums
        sums = start_rows(so_far)
        if DOT_PANELS == 2:  # LLVM does not unroll this, and without it shifts by variable distances
            sums = _two_of_int5(w, at, offset, fifth, half, xq, step, q, sums)
            sums = _two_of_int5(w, at, offset, fifth, half + 1, xq, step, q, sums)
        else:
            for j in range(half, half + step // 16):
                sums = _two_of_int5(w, at, offset, fifth, j, xq, step, q, sums)
        sums = end_rows(sums, so_far)
    return sums


@inline_kernel
def _dots_int8(
    w: Any, at: Any, offset: Any, xq: Any, step: Any, offsets: Any, xi: Any, has_mins: Any, tile: Any
) -> Any:
    sums = signed_offset_rows(offsets, xi * OFFSETS, OFFSETS, at, tile)
    for j in range(step // 4):
        sums = sdot_rows(sums, lines_of(w, at, offset + j * LINE), xq, xi * GROUP + 4 * j, step)
    return sums


@inline_kernel
def _add_block(
    dots: Any, has_mins: Any, w: Any, at: Any, offset: Any, xq: Any, step: Any, xs: Any, offsets: Any, totals: Any,
    xi: Any, tile: Any,
) -> Any:  # fmt: skip
    """The tile + its blocks at ``offset`` times the group of the activations from ``xi`` on."""
    if has_mins:  # first, as they lie: memory is read fastest in order
        tile = fma_panels(halfs_of(w, at, offset + HALFS), totals, xi, 1, tile)
    codes = offset + (2 * HALFS if has_mins else HALFS)
    sums = dots(w, at, codes, xq, step, offsets, xi, has_mins, tile)
    return scale_rows(tile, sums, halfs_of(w, at, offset), xs, xi, 1)


@inline_kernel
def _tile(
    dots: Any, has_mins: Any, w: Any, at: Any, size: Any, xq: Any, step: Any, xs: Any, offsets: Any, totals: Any,
    columns: Any, places: Any, outliers: Any, first: Any, t: Any, side: Any, groups: Any, zeros: Any, out: Any,
    rows: Any, row: Any, count: Any,
) -> None:  # fmt: skip
    """The panels at ``at`` for the tokens from t on, as many as ``zeros`` has room for: out[t:, row : row + count]."""
    tile = zeros
    xi = t // side * groups * side + t % side
    for g in range(groups):
        tile = _add_block(dots, has_mins, w, at, g * size, xq, step, xs, offsets, totals, xi + g * side, tile)
    tile = add_outliers(columns, places, outliers, first, t, at, zeros, tile)
    to = t * rows + row
    if count >= len(at) * LANES:
        store_panels(out, to, rows, at, tile)
    else:
        height = len(tile) // len(at)
        for i in range(len(tile)):
            panel = i // height * LANES
            if panel < count:
                f32_store_first(out, to + i % height * rows + panel, tile[i], min(count - panel, LANES))


if DOT_PANELS == 2:

    @inline_kernel
    def _panels_at(p: Any, hi: Any, step: Any) -> Any:
        """Where panel p begins and the next one; p twice, and the work of two, if it is the last of an odd number."""
        return p * step, min(p + 1, hi - 1) * step

else:

    @inline_kernel
    def _panels_at(p: Any, hi: Any, step: Any) -> Any:
        """Where panel p begins."""
        return (p * step,)


def _panels_of(kind: int, dots: Any, column: Any, zero: Any) -> Any:
    """quant_matmul for one kind of weights: how it multiplies, what a column of it is, and its code of 0."""
    most = block_bytes(kind, True)  # a constant: what asks for these bytes is unrolled

    @part_kernel
    def _one_token(
        has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, turns: Any, counts: Any, share: Any, alone: Any,
    ) -> Any:  # fmt: skip
        """The only token times STREAMS runs of ``turns`` panels from lo on, read side by side: memory is the limit.

        A turn is one panel of each run. Returns the number that came after these: a turn of what is left, if any.
        """
        never_inline()
        groups, size = blocks.shape[1], blocks.shape[2]
        w, xq, xs, offsets, totals = flat(blocks), flat(xq), flat(xs), flat(offsets), flat(totals)
        outliers, out = flat(outliers), flat(out)
        apart = turns * groups * size
        turn = take_turn(counts, share, alone)
        while turn < turns:
            p = lo + turn
            a, b, c, d = f32_zeros(1), f32_zeros(1), f32_zeros(1), f32_zeros(1)
            a_kept, b_kept, c_kept, d_kept = f32_zero(), f32_zero(), f32_zero(), f32_zero()
            i, k = 0, np.int64(outliers[0])
            for g in range(groups):
                at = (p * groups + g) * size
                for line in range(0, most, LINE):
                    for run in range(STREAMS):
                        prefetch_l2(w, at + run * apart + _AHEAD + line)
                a = _add_block(dots, has_mins, w, (at,), 0, xq, GROUP, xs, offsets, totals, g, a)
                at += apart
                b = _add_block(dots, has_mins, w, (at,), 0, xq, GROUP, xs, offsets, totals, g, b)
                at += apart
                c = _add_block(dots, has_mins, w, (at,), 0, xq, GROUP, xs, offsets, totals, g, c)
                at += apart
                d = _add_block(dots, has_mins, w, (at,), 0, xq, GROUP, xs, offsets, totals, g, d)
                while k // GROUP == g:  # now, when the blocks are near: to come back would break the streams
                    x = splat_at(outliers, 2 * i + 1)
                    a_kept = fma(outlier_column(column, zero, has_mins, w, at - 3 * apart, k), x, a_kept)
                    b_kept = fma(outlier_column(column, zero, has_mins, w, at - 2 * apart, k), x, b_kept)
                    c_kept = fma(outlier_column(column, zero, has_mins, w, at - apart, k), x, c_kept)
                    d_kept = fma(outlier_column(column, zero, has_mins, w, at, k), x, d_kept)
                    i += 1
                    k = np.int64(outliers[2 * i] if i < OUTLIERS else _NONE)
            f32_store(out, p * LANES, a[0] + a_kept)
            f32_store(out, (p + turns) * LANES, b[0] + b_kept)
            f32_store(out, (p + 2 * turns) * LANES, c[0] + c_kept)
            f32_store(out, (p + 3 * turns) * LANES, d[0] + d_kept)
            turn = take_turn(counts, share, alone)
        return turn

    @part_kernel
    def _tokens(
        has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, hi: Any, turn: Any, turns: Any, counts: Any, share: Any, alone: Any,
    ) -> None:  # fmt: skip
        """All tokens times panels lo:hi, in tiles: _AT_ONCE tokens and DOT_PANELS panels a turn, from ``turn`` on.

        ``turns``: how many there were before.
        """
        never_inline()
        groups, size, tokens, rows, side = blocks.shape[1], blocks.shape[2], out.shape[0], out.shape[1], xs.shape[2]
        step = GROUP if UNROLLS else xq.shape[3]  # the same, which LLVM then does not know
        w, xq, xs, offsets, totals = flat(blocks), flat(xq), flat(xs), flat(offsets), flat(totals)
        outliers, out = flat(outliers), flat(out)
        found, places, columns = stack_f32(_LISTED), stack_i32(_LISTED), stack_f32(_UNPACKED)
        wide = (hi - lo + DOT_PANELS - 1) // DOT_PANELS
        last = turns + (tokens + _AT_ONCE - 1) // _AT_ONCE * wide
        listed, count = -1, 0
        while turn < last:
            first, p = (turn - turns) // wide * _AT_ONCE, lo + (turn - turns) % wide * DOT_PANELS
            end = min(first + _AT_ONCE, tokens)
            if first != listed:
                listed, count = first, list_columns(outliers, first, end, found, places)
            here, after = _panels_at(p, hi, groups * size), (p + DOT_PANELS) * groups * size
            for at in range(after, after + DOT_PANELS * groups * size, LINE):
                prefetch_l2(w, at)  # the next ones: columns are read here and there, which no machine foresees
            unpack_columns(column, zero, has_mins, w, here, size, found, count, columns)
            row, width = p * LANES, min(hi * LANES, rows) - p * LANES
            t = first
            while t < end:
                left = min(side - t % side, end - t)
                if left >= TILE and left not in (8, 9):  # of those, two of four leave less
                    _tile(
                        dots, has_mins, w, here, size, xq, step, xs, offsets, totals, columns, places, outliers,
                        first, t, side, groups, f32_zeros(_TILE_SUMS), out, rows, row, width,
                    )  # fmt: skip
                    t += TILE
                elif left >= _FEW:
                    _tile(
                        dots, has_mins, w, here, size, xq, step, xs, offsets, totals, columns, places, outliers,
                        first, t, side, groups, f32_zeros(_FEW_SUMS), out, rows, row, width,
                    )  # fmt: skip
                    t += _FEW
                else:
                    _tile(
                        dots, has_mins, w, here, size, xq, step, xs, offsets, totals, columns, places, outliers,
                        first, t, side, groups, f32_zeros(DOT_PANELS), out, rows, row, width,
                    )  # fmt: skip
                    t += 1
            turn = take_turn(counts, share, alone)

    @inline_kernel
    def _panels(
        has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, hi: Any, counts: Any, share: Any, alone: Any,
    ) -> None:  # fmt: skip
        """quant_matmul for one kind of weights, as many turns of it as there are left."""
        turns = 0
        if out.shape[0] == 1:
            turns = max(0, min(hi, out.shape[1] // LANES) - lo) // STREAMS
        if turns == 0:
            turn = take_turn(counts, share, alone)
        elif has_mins:  # constants, so that each has code of its own: one loop for both spills registers
            turn = _one_token(True, blocks, xq, xs, offsets, totals, outliers, out, lo, turns, counts, share, alone)
        else:
            turn = _one_token(False, blocks, xq, xs, offsets, totals, outliers, out, lo, turns, counts, share, alone)
        lo += STREAMS * turns
        if lo < hi:
            _tokens(
                has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi, turn, turns, counts, share, alone
            )  # fmt: skip

    return _panels


_PANELS = {
    INT4: _panels_of(INT4, _dots_int4, column_int4, ZERO4),
    INT5: _panels_of(INT5, _dots_int5, column_int5, ZERO5),
    INT8: _panels_of(INT8, _dots_int8, column_int8, ZERO8),
}


@cache
def quant_matmul_part(kinds: tuple[int, ...]) -> Any:
    """quant_matmul as a part of larger kernels, for these kinds alone: each takes seconds to compile.

    It computes the chunks of the panels lo:hi that are left; counts[share] numbers them (``threads.team``).
    """
    int4, int5, int8 = (_PANELS[kind] if kind in kinds else None for kind in (INT4, INT5, INT8))

    @part_kernel
    def products(
        kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
        out: Any, lo: Any, hi: Any, counts: Any, share: Any, alone: Any,
    ) -> None:  # fmt: skip
        if int4 is not None and kind == INT4:
            int4(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi, counts, share, alone)
        if int5 is not None and kind == INT5:
            int5(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi, counts, share, alone)
        if int8 is not None and kind == INT8:
            int8(has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi, counts, share, alone)

    return products


_matmul = quant_matmul_part((INT4, INT5, INT8))


@kernel(strict=True)
def quant_matmul(
    kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, outliers: Any,
    out: Any, lo: Any, hi: Any,
) -> None:  # fmt: skip
    """out (T, N) = x W^T for the rows of panels lo:hi, W quantised as ``kind``, x as quantize_activations left it."""
    counts = stack_i64(1)
    counts[0] = 0
    _matmul(kind, has_mins, blocks, xq, xs, offsets, totals, outliers, out, lo, hi, counts, 0, True)


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
