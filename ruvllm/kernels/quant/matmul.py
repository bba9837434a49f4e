"""Linear layers on quantised weights: out = x W^T, with W in 4, 5 or 8 bits and x rounded to 8 bits.

W is cut into quantisation groups of 32 columns. In a group each row of W has integer codes, a scale and perhaps a min,
and each row of x integer codes xq and a scale xs (both layouts: quant/layout.py). So most of the work is integer dot
products:

    out[t, r] = sum over groups  scale xs sum((code - zero) xq) + min xs sum(xq)
              + sum over outliers (k, x) of token t  W[r, k] x

Integer sums are exact, and float sums are taken in one order: all instruction sets and any number of threads give the
same bits, and a token's result does not depend on its neighbours.

16 rows of W are a panel, one row for each lane of a vector. A thread has a share of the panels, cut into chunks, which
in a model's parallel region other threads may steal (``threads.team``). There are two loops over a share:

- One token (decoding) reads each weight once, so memory bandwidth is the limit. ``_one_token`` cuts the share into four
  runs of consecutive panels and reads them in turn, as four streams, each of which it prefetches. It is not used where
  two streams are as fast (``_ONE_TOKEN_LOOP``).
- Several tokens (a prompt) reuse each weight. ``_tokens`` multiplies one or two panels by up to six tokens with the
  accumulators in registers, a tile (quant/tile.py), and moves on to the next panels after 132 tokens. The two panels
  are from two runs: with few tokens, memory is the limit here too, and two adjacent panels are read more slowly.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import DOT_PANELS, LANES, STREAMS, TILE, UNROLLS
from ruvllm.kernels.quant.layout import (
    BLOCK_TOKENS,
    GROUP,
    INT4,
    INT5,
    INT8,
    OUTLIERS,
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
    offsets_of,
    panels_from,
    prefetch_block,
)
from ruvllm.kernels.simd.vectors import (
    STREAMS_THROUGH_L1,
    f32_load,
    f32_store,
    f32_store_first,
    f32_zero,
    f32_zeros,
    fma,
    never_inline,
    splat_at,
    stack_f32,
    stack_i32,
    stack_i64,
    store_panels,
)
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels.threads.team import Share, take_chunk

# Accumulators of a tile of so many tokens.
_SIX, _FOUR, _THREE, _TWO, _ONE = (tokens * DOT_PANELS for tokens in (TILE, 4, 3, 2, 1))
_WIDTH = DOT_PANELS * LANES  # outputs of a tile's panels
_CHUNK_TOKENS = 11 * BLOCK_TOKENS  # tokens whose outlier columns are unpacked together
_RAGGED = _CHUNK_TOKENS * _WIDTH  # floats: the outputs of a chunk whose last panel is not full
_LISTED = _CHUNK_TOKENS * OUTLIERS  # the most outlier columns of a chunk
_UNPACKED = _LISTED * _WIDTH  # floats: 33 or 66 KB, of which usually little is used
# Prefetch distances in each run, in bytes, because hardware prefetchers stop at the end of a page. Each block is
# prefetched before the block of its own run that is multiplied: blocks of all runs at once would be more outstanding
# misses than a core can track, for which later loads wait. Measured: a Zen 4 for one token, a Zen 5 for tiles.
_ONE_AHEAD = 768
_TILE_AHEAD = 6144
# Whether one token has a loop of its own. A Zen 5 decodes 1.00 to 1.06 times as fast with a tile, which reads two runs.
_ONE_TOKEN_LOOP = not STREAMS_THROUGH_L1
_NONE = np.float32(-1)  # sentinel: matches no column


class _Outputs(NamedTuple):
    """Where a tile stores its outputs: those of token t and panel i at elements[starts[i] + (t - first) step:]."""

    elements: Any
    starts: Any
    first: Any
    step: Any


@inline_kernel
def _single_chunks(tokens, outputs, share):
    """How many chunks of a share ``_one_token`` computes: STREAMS whole panels each."""
    single = tokens == 1 and _ONE_TOKEN_LOOP
    return max(0, min(share.hi, outputs // LANES) - share.lo) // STREAMS if single else 0


@inline_kernel
def chunks_of(tokens, outputs, share):
    """How many chunks a share of the panels is cut into."""
    single = _single_chunks(tokens, outputs, share)
    wide = (share.hi - share.lo - STREAMS * single + DOT_PANELS - 1) // DOT_PANELS
    return single + (tokens + _CHUNK_TOKENS - 1) // _CHUNK_TOKENS * wide


@inline_kernel
def _operands(has_mins, blocks, x, step):
    return Operands(
        has_mins != 0, flat(blocks), blocks.shape[1], blocks.shape[2], flat(x.xq), step, flat(x.xs), flat(x.offsets),
        flat(x.totals), x.xs.shape[2],
    )  # fmt: skip


def _product_of(kind: int, dots: Any, column: Any, zero: Any) -> Any:
    """quant_matmul for one kind of weights, given its dot products, how to unpack a column, and its zero point."""
    most = block_bytes(kind, True)  # the most bytes of a block: a constant, to unroll the loop that prefetches it

    @part_kernel
    def _one_token(has_mins, blocks, x, out, chunks, chunk, share):
        """One token times STREAMS runs of ``chunks`` consecutive panels, which are read in turn.

        A chunk is one panel of each run; ``chunk`` is the first one claimed. Returns the first claimed number that is
        past these chunks: ``_tokens`` computes it, as a chunk of the remaining panels.
        """
        never_inline()
        p, outliers, out = _operands(has_mins, blocks, x, np.int64(GROUP)), flat(x.outliers), flat(out)
        apart = chunks * p.groups * p.size
        here, ahead = np.int64(0), np.int64(_ONE_AHEAD)  # typed, because a literal would compile a second version
        while chunk < chunks:
            panel = share.lo + chunk
            a, b, c, d = f32_zeros(1), f32_zeros(1), f32_zeros(1), f32_zeros(1)
            a_kept, b_kept, c_kept, d_kept = f32_zero(), f32_zero(), f32_zero(), f32_zero()
            i, k = 0, np.int64(outliers[0])
            for g in range(p.groups):
                at = (panel * p.groups + g) * p.size
                prefetch_block(p, (at,), ahead, most)
                a = add_block(dots, p, (at,), here, g, a)
                at += apart
                prefetch_block(p, (at,), ahead, most)
                b = add_block(dots, p, (at,), here, g, b)
                at += apart
                prefetch_block(p, (at,), ahead, most)
                c = add_block(dots, p, (at,), here, g, c)
                at += apart
                prefetch_block(p, (at,), ahead, most)
                d = add_block(dots, p, (at,), here, g, d)
                while k // GROUP == g:  # now, while the blocks are in the cache: another pass would break the streams
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
        """unpack_columns, shared by tiles of all sizes."""
        never_inline()
        unpack_columns(column, zero, p, at, columns)

    @inline_kernel
    def _tile(p, columns, at, ahead, t, xi, zeros, out):
        """The panels at ``at`` times the tokens from t on, as many as ``zeros`` has accumulators for.

        xi: the index of their first group in the activations.

        The first tile of a chunk prefetches, for each block that it multiplies, the one ``ahead`` bytes later in its
        run. The prefetch comes before the products, so that AVX-512's accumulators stay in registers. This tile also
        unpacks the outlier columns, whose blocks are then in the cache. In the other tiles ``ahead`` is 0.
        """
        tile, offset = zeros, np.int64(0)
        for _ in range(p.groups):
            if ahead:
                prefetch_block(p, at, offset + ahead, most)
            tile = add_block(dots, p, at, offset, xi, tile)
            offset += p.size
            xi += p.block_tokens
        if ahead:
            _unpack(p, at, columns)
        tile = add_outliers(columns, t, at, zeros, tile)
        store_panels(out.elements, out.starts, (t - out.first) * out.step, out.step, tile)

    @part_kernel
    def _tokens(has_mins, blocks, x, out, lo, chunk, before, share):
        """All tokens times the panels from lo to the end of the share, in tiles; ``chunk`` is the first one claimed.

        The panels are DOT_PANELS runs; a chunk is a panel of each run and _CHUNK_TOKENS tokens, and its number is
        counted after those of _one_token. Returns the first claimed number that is past all chunks of the share.
        """
        never_inline()
        tokens, rows = out.shape
        step = np.int64(GROUP) if UNROLLS else x.xq.shape[3]  # the same value, hidden from LLVM to prevent unrolling
        p = _operands(has_mins, blocks, x, step)
        outliers, out = flat(x.outliers), flat(out)
        found, offsets, unpacked = stack_f32(_LISTED), stack_i32(_LISTED), stack_f32(_UNPACKED)
        ragged = stack_f32(_RAGGED)
        wide = (share.hi - lo + DOT_PANELS - 1) // DOT_PANELS
        last = before + (tokens + _CHUNK_TOKENS - 1) // _CHUNK_TOKENS * wide
        listed, count = -1, 0
        while chunk < last:
            first, panel = (chunk - before) // wide * _CHUNK_TOKENS, lo + (chunk - before) % wide
            end = min(first + _CHUNK_TOKENS, tokens)
            if first != listed:
                listed, count = first, list_columns(outliers, first, end, found, offsets)
            columns = Columns(outliers, first, found, count, offsets, unpacked)
            panels = panels_from(panel, wide, share.hi)
            at, ahead = offsets_of(panels, p.groups * p.size), _TILE_AHEAD
            whole = (panels[-1] + 1) * LANES <= rows
            if whole:
                to = _Outputs(out, offsets_of(panels, LANES), np.int64(0), rows)
            else:
                to = _Outputs(ragged, offsets_of(panels_from(0, 1, DOT_PANELS), LANES), first, np.int64(_WIDTH))
            t = first
            while t < end:
                inner = t % p.block_tokens  # index in its block of tokens
                left, xi = min(p.block_tokens - inner, end - t), (t - inner) * p.groups + inner
                if left >= TILE:
                    _tile(p, columns, at, ahead, t, xi, f32_zeros(_SIX), to)
                    t += TILE
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
                    for i in range(len(panels)):
                        v, to_row = f32_load(ragged, (t - first) * _WIDTH + i * LANES), panels[i] * LANES
                        f32_store_first(out, t * rows + to_row, v, min(LANES, rows - to_row))
            chunk = take_chunk(share)
        return chunk

    @inline_kernel
    def _product(has_mins, blocks, x, out, share, chunk):
        """quant_matmul for one kind of weights: ``chunk``, and the chunks of a share that no thread has claimed."""
        chunks = _single_chunks(out.shape[0], out.shape[1], share)
        if _ONE_TOKEN_LOOP and chunks > 0:  # a constant: where it is False, _one_token is not compiled
            if has_mins:  # a constant in each call, to compile two versions: one loop for both spills registers
                chunk = _one_token(True, blocks, x, out, chunks, chunk, share)
            else:
                chunk = _one_token(False, blocks, x, out, chunks, chunk, share)
        lo = share.lo + STREAMS * chunks
        if lo < share.hi:
            chunk = _tokens(has_mins, blocks, x, out, lo, chunk, chunks, share)
        return chunk

    return _product


_PRODUCTS = {
    INT4: _product_of(INT4, dots_int4, column_int4, ZERO4),
    INT5: _product_of(INT5, dots_int5, column_int5, ZERO5),
    INT8: _product_of(INT8, dots_int8, column_int8, ZERO8),
}


@cache
def quant_matmul_part(kinds: tuple[int, ...]) -> Any:
    """quant_matmul of a ``Share`` as a part of larger kernels, for these kinds alone: each takes seconds to compile.

    It computes ``chunk``, then claims others until none is left, and returns the first claimed number past the last.
    """
    int4, int5, int8 = (_PRODUCTS[kind] if kind in kinds else None for kind in (INT4, INT5, INT8))

    @part_kernel
    def products(kind, has_mins, blocks, x, out, share, chunk):
        if int4 is not None and kind == INT4:
            chunk = int4(has_mins, blocks, x, out, share, chunk)
        if int5 is not None and kind == INT5:
            chunk = int5(has_mins, blocks, x, out, share, chunk)
        if int8 is not None and kind == INT8:
            chunk = int8(has_mins, blocks, x, out, share, chunk)
        return chunk

    return products


_matmul = quant_matmul_part((INT4, INT5, INT8))


@kernel(strict=True)
def quant_matmul(w, x, out, lo, hi):
    """out (T, N) = x W^T for the rows of panels lo:hi; w: ``Panels``, x: ``Rounded``."""
    counts = stack_i64(1)
    counts[0] = 0
    share = Share(lo, hi, counts, 0, True, 0)
    _matmul(w.kind, w.has_mins, w.blocks, x, out, share, take_chunk(share))


@parallel_kernel
def quant_matmul_parallel(w, x, out, threads):
    """quant_matmul with the panels split over threads. One thread computes an output: any split gives the same bits."""
    panels = w.blocks.shape[0]
    for t in prange(threads):
        quant_matmul(w, x, out, panels * t // threads, panels * (t + 1) // threads)


def linear_quant(w: Panels, x: Rounded, out: np.ndarray) -> np.ndarray:
    """out (T, N) = x W^T for callers that own their buffers (``model.Linear``) and guarantee their sizes."""
    panels = len(w.blocks)
    threads = threads_for(len(out) * w.blocks.size, PARALLEL_MACS, panels)
    if threads == 1:
        quant_matmul(w, x, out, 0, panels)
    else:
        launch(quant_matmul_parallel, w, x, out, threads)
    return out
