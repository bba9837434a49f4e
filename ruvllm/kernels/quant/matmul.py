"""Integer matmul: weights in 4, 5 or 8 bits times activations in 8 bits (see quant/layout.py), by integer dot products.

    y[r] = sum over groups g of  scale[r, g] xs[g] sum((code - zero) xq)  +  min[r, g] xs[g] sum(xq)
         + sum over outliers (k, x) of  W[r, k] x

Integer sums are exact, and float sums are taken in one order whatever the number of tokens: all instruction sets give
the same integers, and a token's result does not depend on its neighbours.

A share of the panels is cut into chunks, which members of a team take from a counter, and steal from each other
(``threads.team``). Of a few tokens, memory is the limit, so that a chunk prefetches the weights of the next one.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import DOT_PANELS, LANES, STREAMS, TILE, UNROLLS
from ruvllm.kernels.quant.layout import (
    GROUP,
    INT4,
    INT5,
    INT8,
    LINE,
    OUTLIERS,
    SIDE,
    ZERO4,
    ZERO5,
    ZERO8,
    Rounded,
    block_bytes,
)
from ruvllm.kernels.quant.outliers import (
    Columns,
    add_outliers,
    column_int4,
    column_int5,
    column_int8,
    list_columns,
    outlier_column,
    unpack_columns,
)
from ruvllm.kernels.quant.panels import Panels
from ruvllm.kernels.quant.tile import (
    Operands,
    add_block,
    dots_int4,
    dots_int5,
    dots_int8,
    panels_at,
    prefetch_block,
)
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_store,
    f32_store_first,
    f32_zero,
    f32_zeros,
    fma,
    never_inline,
    prefetch_l2,
    splat_at,
    stack_f32,
    stack_i32,
    stack_i64,
    store_panels,
)
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels.threads.team import Share, take_chunk

_SIX, _FOUR, _THREE, _TWO, _ONE = (tokens * DOT_PANELS for tokens in (TILE, 4, 3, 2, 1))  # accumulators of a tile
_WIDTH = DOT_PANELS * LANES
_AT_ONCE = 10 * SIDE  # tokens whose outliers' columns are listed together
_RAGGED = _AT_ONCE * _WIDTH  # floats
_LISTED = _AT_ONCE * OUTLIERS
_UNPACKED = _LISTED * _WIDTH  # floats: 30 or 60 KB, of which little is used
# Prefetch distance of one token in bytes. Hardware prefetchers stop at the end of a page; 2048 was slower than 512.
_AHEAD = 512
_NONE = np.float32(-1)  # no column either, and a whole number


class _Outputs(NamedTuple):
    """Where a tile's outputs go: those of token t to numbers[start + t step:]."""

    numbers: Any
    start: Any
    step: Any


@inline_kernel
def _operands(has_mins, blocks, x, step):
    return Operands(
        has_mins != 0, flat(blocks), blocks.shape[1], blocks.shape[2], flat(x.xq), step, flat(x.xs), flat(x.offsets),
        flat(x.totals), x.xs.shape[2],
    )  # fmt: skip


def _panels_of(kind: int, dots: Any, column: Any, zero: Any) -> Any:
    """quant_matmul for one kind of weights: how it multiplies, what a column of it is, and its code of 0."""
    most = block_bytes(kind, True)  # a constant: what prefetches these bytes is unrolled

    @part_kernel
    def _one_token(has_mins, blocks, x, out, chunks, share):
        """The only token times STREAMS runs of ``chunks`` panels, read side by side: memory is the limit.

        A chunk is one panel of each run. Returns the number that came after these: a chunk of what is left, if any.
        """
        never_inline()
        p, outliers, out = _operands(has_mins, blocks, x, np.int64(GROUP)), flat(x.outliers), flat(out)
        apart, here = chunks * p.groups * p.size, np.int64(0)  # a literal would be compiled apart
        chunk = take_chunk(share)
        while chunk < chunks:
            panel = share.lo + chunk
            a, b, c, d = f32_zeros(1), f32_zeros(1), f32_zeros(1), f32_zeros(1)
            a_kept, b_kept, c_kept, d_kept = f32_zero(), f32_zero(), f32_zero(), f32_zero()
            i, k = 0, np.int64(outliers[0])
            for g in range(p.groups):
                at = (panel * p.groups + g) * p.size
                for line in range(0, most, LINE):
                    for run in range(STREAMS):
                        prefetch_l2(p.w, at + run * apart + _AHEAD + line)
                a = add_block(dots, p, (at,), here, g, a)
                at += apart
                b = add_block(dots, p, (at,), here, g, b)
                at += apart
                c = add_block(dots, p, (at,), here, g, c)
                at += apart
                d = add_block(dots, p, (at,), here, g, d)
                while k // GROUP == g:  # now, when the blocks are near: to come back would break the streams
                    v = splat_at(outliers, 2 * i + 1)
                    a_kept = fma(outlier_column(column, zero, p.has_mins, p.w, at - 3 * apart, k), v, a_kept)
                    b_kept = fma(outlier_column(column, zero, p.has_mins, p.w, at - 2 * apart, k), v, b_kept)
                    c_kept = fma(outlier_column(column, zero, p.has_mins, p.w, at - apart, k), v, c_kept)
                    d_kept = fma(outlier_column(column, zero, p.has_mins, p.w, at, k), v, d_kept)
                    i += 1
                    k = np.int64(outliers[2 * i] if i < OUTLIERS else _NONE)
            f32_store(out, panel * LANES, a[0] + a_kept)
            f32_store(out, (panel + chunks) * LANES, b[0] + b_kept)
            f32_store(out, (panel + 2 * chunks) * LANES, c[0] + c_kept)
            f32_store(out, (panel + 3 * chunks) * LANES, d[0] + d_kept)
            chunk = take_chunk(share)
        return chunk

    @part_kernel
    def _unpack(p, at, columns):
        """unpack_columns, which tiles of all sizes call."""
        never_inline()
        unpack_columns(column, zero, p, at, columns)

    @inline_kernel
    def _tile(p, columns, at, ahead, t, xi, zeros, out):
        """The panels at ``at`` times the tokens from t on, as many as ``zeros`` has accumulators for.

        Their first group is at place ``xi`` of the activations.

        The first tile of a chunk prefetches the panels ``ahead`` bytes later, those of the next chunk, a block with
        each block: so memory and products overlap, where all lines at once would fill the core's list of misses.
        Before the products, not after: then AVX-512's accumulators stay in registers. It also unpacks the outliers'
        columns, which its products have brought near. In the other tiles ``ahead`` is 0.
        """
        tile, offset = zeros, np.int64(0)
        for _ in range(p.groups):
            prefetch_block(p, at, offset + ahead, most)
            tile = add_block(dots, p, at, offset, xi, tile)
            offset += p.size
            xi += p.side
        if ahead:
            _unpack(p, at, columns)
        tile = add_outliers(columns, t, at, zeros, tile)
        store_panels(out.numbers, out.start + t * out.step, out.step, at, tile)

    @part_kernel
    def _tokens(has_mins, blocks, x, out, lo, chunk, before, share):
        """All tokens times panels from lo to the share's end, in tiles, from ``chunk`` on.

        A chunk is DOT_PANELS panels and _AT_ONCE tokens; ``before``: how many chunks of another kind there were.
        """
        never_inline()
        tokens, rows = out.shape
        step = np.int64(GROUP) if UNROLLS else x.xq.shape[3]  # the same, which LLVM then does not know
        p = _operands(has_mins, blocks, x, step)
        outliers, out = flat(x.outliers), flat(out)
        found, places, unpacked = stack_f32(_LISTED), stack_i32(_LISTED), stack_f32(_UNPACKED)
        ragged = stack_f32(_RAGGED)
        wide = (share.hi - lo + DOT_PANELS - 1) // DOT_PANELS
        last = before + (tokens + _AT_ONCE - 1) // _AT_ONCE * wide
        listed, count = -1, 0
        while chunk < last:
            first, panel = (chunk - before) // wide * _AT_ONCE, lo + (chunk - before) % wide * DOT_PANELS
            end = min(first + _AT_ONCE, tokens)
            if first != listed:
                listed, count = first, list_columns(outliers, first, end, found, places)
            columns = Columns(outliers, first, found, count, places, unpacked)
            at, ahead = panels_at(panel, share.hi, p.groups * p.size), DOT_PANELS * p.groups * p.size
            width = min(share.hi * LANES, rows) - panel * LANES
            whole = width >= _WIDTH
            to = _Outputs(out, panel * LANES, rows) if whole else _Outputs(ragged, -first * _WIDTH, _WIDTH)
            t = first
            while t < end:
                place = t % p.side
                left, xi = min(p.side - place, end - t), (t - place) * p.groups + place
                if left >= 6 and left != 9:  # of 9, two of four leave less
                    _tile(p, columns, at, ahead, t, xi, f32_zeros(_SIX), to)
                    t += 6
                elif left >= 4:
                    _tile(p, columns, at, ahead, t, xi, f32_zeros(_FOUR), to)
                    t += 4
                elif left == 3:
                    _tile(p, columns, at, ahead, t, xi, f32_zeros(_THREE), to)
                    t += 3
                elif left == 2:
                    _tile(p, columns, at, ahead, t, xi, f32_zeros(_TWO), to)
                    t += 2
                else:
                    _tile(p, columns, at, ahead, t, xi, f32_zeros(_ONE), to)
                    t += 1
                ahead = 0
            if not whole:
                for t in range(first, end):
                    for i in range(0, width, LANES):
                        v = f32_load(ragged, (t - first) * _WIDTH + i)
                        f32_store_first(out, t * rows + panel * LANES + i, v, width - i)
            chunk = take_chunk(share)

    @inline_kernel
    def _panels(has_mins, blocks, x, out, share):
        """quant_matmul for one kind of weights, as many chunks of it as there are left."""
        chunks = 0
        if out.shape[0] == 1:
            chunks = max(0, min(share.hi, out.shape[1] // LANES) - share.lo) // STREAMS
        if chunks == 0:
            chunk = take_chunk(share)
        elif has_mins:  # constants, so that each has code of its own: one loop for both spills registers
            chunk = _one_token(True, blocks, x, out, chunks, share)
        else:
            chunk = _one_token(False, blocks, x, out, chunks, share)
        lo = share.lo + STREAMS * chunks
        if lo < share.hi:
            _tokens(has_mins, blocks, x, out, lo, chunk, chunks, share)

    return _panels


_PANELS = {
    INT4: _panels_of(INT4, dots_int4, column_int4, ZERO4),
    INT5: _panels_of(INT5, dots_int5, column_int5, ZERO5),
    INT8: _panels_of(INT8, dots_int8, column_int8, ZERO8),
}


@cache
def quant_matmul_part(kinds: tuple[int, ...]) -> Any:
    """quant_matmul as a part of larger kernels, for these kinds alone: each takes seconds to compile.

    It computes chunks of a ``Share`` until there are none left.
    """
    int4, int5, int8 = (_PANELS[kind] if kind in kinds else None for kind in (INT4, INT5, INT8))

    @part_kernel
    def products(kind, has_mins, blocks, x, out, share):
        if int4 is not None and kind == INT4:
            int4(has_mins, blocks, x, out, share)
        if int5 is not None and kind == INT5:
            int5(has_mins, blocks, x, out, share)
        if int8 is not None and kind == INT8:
            int8(has_mins, blocks, x, out, share)

    return products


_matmul = quant_matmul_part((INT4, INT5, INT8))


@kernel(strict=True)
def quant_matmul(w, x, out, lo, hi):
    """out (T, N) = x W^T for the rows of panels lo:hi; w: ``Panels``, x: ``Rounded``."""
    counts = stack_i64(1)
    counts[0] = 0
    _matmul(w.kind, w.has_mins, w.blocks, x, out, Share(lo, hi, counts, 0, True))


@parallel_kernel
def quant_matmul_parallel(w, x, out, threads):
    """quant_matmul with the panels split over threads: each output is one thread's, so any split gives the same."""
    panels = w.blocks.shape[0]
    for t in prange(threads):
        quant_matmul(w, x, out, panels * t // threads, panels * (t + 1) // threads)


def linear_quant(w: Panels, x: Rounded, out: np.ndarray) -> np.ndarray:
    """out (T, N) = x W^T for callers that own their buffers (``model.Linear``): sizes are theirs to guarantee."""
    panels = len(w.blocks)
    threads = threads_for(len(out) * w.blocks.size, PARALLEL_MACS, panels)
    if threads == 1:
        quant_matmul(w, x, out, 0, panels)
    else:
        launch(quant_matmul_parallel, w, x, out, threads)
    return out
