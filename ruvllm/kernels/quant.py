"""Integer matmul: weights in 4, 5 or 8 bits, activations rounded to 8 bits on the fly, integer dot products.

Weights W (N, K) lie in panels of 16 rows, like float weights (see panels.py), in groups of 32 columns. Within a group
column k belongs to quad k // 4: a vector of 64 bytes holds one quad of 16 rows, so that one integer dot-product
instruction serves 16 rows with four activations in a broadcast.

    w = scale (code - zero)      symmetric        or      w = scale code + min
    y[r] = sum over groups g of  scale[r, g] xs[g] sum((code - zero) xq)  +  min[r, g] xs[g] sum(xq)

A block holds one group of one panel: 16 scales and perhaps 16 mins as IEEE halfs, then lines of 64 bytes of codes.

- ``INT4``: codes 0..15 in 4 lines; byte i of line j holds quad j in its low and quad j + 4 in its high bits.
- ``INT5``: codes 0..31 in 5 lines; four as above, bit j of byte i of the fifth is that of quad j.
- ``INT8``: signed codes in 8 lines, one quad a line.

Weights are blocks (P, G, block_bytes), one stream of memory for each panel; zero is 8, 16, 0.
Activations: xq (T, 32 G) int8, xs (T, G) = max|x| / 127, totals (T, G) = xs sum(xq), and offsets (T, G, 4) int32 =
sum(xq) times -8, -16, -128, 0: what an integer sum begins with, so that taking off the zero costs nothing.
Integer sums are exact, so all instruction sets give the same bits.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._simd import (
    dot_rows,
    end_rows,
    f32_load,
    f32_load_first,
    f32_store_first,
    f32_zero,
    f32_zeros,
    fma_rows,
    halfs_load,
    high_nibbles,
    i8_store,
    i32_hsum,
    largest_magnitude,
    low_nibbles,
    offset_rows,
    round_to_i32,
    scale_rows,
    sdot_rows,
    signed_offset_rows,
    splat,
    start_rows,
    store_rows,
    tile_zeros,
    u8_load,
    with_fifth_bit,
)
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, PARALLEL_MACS, launch, threads_for
from ruvllm.kernels._tile import LANES, STREAMS
from ruvllm.kernels._views import flat

GROUP = 32
INT4, INT5, INT8 = 0, 1, 2
LINES = (4, 5, 8)  # lines of codes in one block, by kind
OFFSETS = 4  # numbers of one group in ``offsets``
_FEW = 4  # tokens of the smaller tile, for those that do not fill a whole one
_NO_ZERO = 3  # the offset that is always 0
_SMALLEST = np.float32(2.0**-120)  # of max|x|: 127 / max|x| stays finite
_LINE = 64  # bytes of one line: 16 rows x 4 columns
_HALFS = 32  # bytes of 16 scales or mins


def block_bytes(kind: int, has_mins: bool) -> int:
    """Bytes of one group of 16 rows."""
    return LINES[kind] * _LINE + (2 if has_mins else 1) * _HALFS


@kernel(strict=True)
def quantize_activations(x: Any, xq: Any, xs: Any, offsets: Any, totals: Any, lo: Any, hi: Any) -> None:
    """Round rows lo:hi of x (T, K) to int8 in groups of 32: xs = max|x| / 127, xq = round(x / xs).

    xq (T, 32 G); xs, totals (T, G); offsets (T, G, 4). A NaN or infinity makes its group's scale NaN, so that it is not
    lost. Groups of numbers below 2^-120 become zeros.
    """
    columns = x.shape[1]
    groups = xs.shape[1]
    xf, codes = flat(x), flat(xq)
    for t in range(lo, hi):
        for g in range(groups):
            at, left = t * columns + g * GROUP, columns - g * GROUP
            if left >= GROUP:
                a, b = f32_load(xf, at), f32_load(xf, at + LANES)
            else:
                a = f32_load_first(xf, at, left)
                b = f32_load_first(xf, at + LANES, left - LANES) if left > LANES else f32_zero()
            largest = largest_magnitude(a, b)
            inverse = splat(np.float32(127) / largest if largest > _SMALLEST else np.float32(0))
            qa, qb = round_to_i32(a * inverse), round_to_i32(b * inverse)
            at = (t * groups + g) * GROUP
            i8_store(codes, at, qa)
            i8_store(codes, at + LANES, qb)
            xs[t, g] = largest / np.float32(127) + (largest - largest)  # NaN for infinity too
            total = i32_hsum(qa + qb)
            totals[t, g] = xs[t, g] * np.float32(total)
            offsets[t, g, 0], offsets[t, g, 1], offsets[t, g, 2] = -8 * total, -16 * total, -128 * total
            offsets[t, g, _NO_ZERO] = 0


# For each token of a tile (as many as ``rows`` has vectors), the codes at byte ``at`` times group ``xi`` of the
# activations, sum((code - zero) xq); the next token's group is ``groups`` further.


@inline_kernel
def _dots_int4(w: Any, at: Any, xq: Any, offsets: Any, xi: Any, groups: Any, has_mins: Any, rows: Any) -> Any:
    zero = offset_rows(offsets, xi * OFFSETS + (_NO_ZERO if has_mins else 0), groups * OFFSETS, rows)
    sums = start_rows(zero)
    q, step = xi * GROUP, groups * GROUP
    for j in range(4):
        line = u8_load(w, at + j * _LINE)
        sums = dot_rows(sums, low_nibbles(line), xq, q + 4 * j, step)
        sums = dot_rows(sums, high_nibbles(line), xq, q + 4 * j + 16, step)
    return end_rows(sums, zero)


@inline_kernel
def _dots_int5(w: Any, at: Any, xq: Any, offsets: Any, xi: Any, groups: Any, has_mins: Any, rows: Any) -> Any:
    sums = offset_rows(offsets, xi * OFFSETS + (_NO_ZERO if has_mins else 1), groups * OFFSETS, rows)
    q, step = xi * GROUP, groups * GROUP
    fifth = u8_load(w, at + 4 * _LINE)
    for half in range(0, 4, 2):  # in halves: no accumulator of any target overflows
        so_far = sums
        sums = start_rows(so_far)
        for j in range(half, half + 2):
            line = u8_load(w, at + j * _LINE)
            sums = dot_rows(sums, with_fifth_bit(low_nibbles(line), fifth, j), xq, q + 4 * j, step)
            sums = dot_rows(sums, with_fifth_bit(high_nibbles(line), fifth, j + 4), xq, q + 4 * j + 16, step)
        sums = end_rows(sums, so_far)
    return sums


@inline_kernel
def _dots_int8(w: Any, at: Any, xq: Any, offsets: Any, xi: Any, groups: Any, has_mins: Any, rows: Any) -> Any:
    sums = signed_offset_rows(offsets, xi * OFFSETS, groups * OFFSETS, rows)
    for j in range(8):
        sums = sdot_rows(sums, u8_load(w, at + j * _LINE), xq, xi * GROUP + 4 * j, groups * GROUP)
    return sums


@inline_kernel
def _add_block(
    dots: Any, has_mins: Any, w: Any, at: Any, xq: Any, xs: Any, offsets: Any, totals: Any,
    xi: Any, groups: Any, acc: Any,
) -> Any:  # fmt: skip
    """acc + the block at byte ``at`` times group ``xi`` of the activations, for each token of the tile."""
    if has_mins:  # first, as they lie: memory is read fastest in order
        acc = fma_rows(halfs_load(w, at + _HALFS), totals, xi, groups, acc)
    sums = dots(w, at + (2 * _HALFS if has_mins else _HALFS), xq, offsets, xi, groups, has_mins, acc)
    return scale_rows(acc, sums, halfs_load(w, at), xs, xi, groups)


@inline_kernel
def _tile(
    dots: Any, has_mins: Any, w: Any, size: Any, xq: Any, xs: Any, offsets: Any, totals: Any,
    p: Any, t: Any, groups: Any, acc: Any, out: Any, rows: Any,
) -> None:  # fmt: skip
    """The 16 outputs of panel p for the tokens from t on, as many as ``acc`` has zeros: weights are unpacked once."""
    for g in range(groups):
        at, xi = (p * groups + g) * size, t * groups + g
        acc = _add_block(dots, has_mins, w, at, xq, xs, offsets, totals, xi, groups, acc)
    at, count = t * rows + p * LANES, rows - p * LANES
    if count >= LANES:
        store_rows(out, at, rows, acc)
    else:
        for r in range(len(acc)):
            f32_store_first(out, at + r * rows, acc[r], count)


@inline_kernel
def _panels(
    dots: Any, has_mins: Any, w: Any, size: Any, xq: Any, xs: Any, offsets: Any, totals: Any, groups: Any,
    out: Any, tokens: Any, rows: Any, lo: Any, hi: Any,
) -> None:  # fmt: skip
    """quant_matmul for one kind of weights, on flat arrays; ``size``: bytes of a block."""
    height = len(tile_zeros())
    if tokens == 1:
        # Memory is the limit: four panels that lie far apart are read side by side.
        step = max(0, min(hi, rows // LANES) - lo) // STREAMS
        for p in range(lo, lo + step):
            a, b, c, d = f32_zeros(1), f32_zeros(1), f32_zeros(1), f32_zeros(1)
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
            store_rows(out, p * LANES, rows, a)
            store_rows(out, (p + step) * LANES, rows, b)
            store_rows(out, (p + 2 * step) * LANES, rows, c)
            store_rows(out, (p + 3 * step) * LANES, rows, d)
        lo += STREAMS * step
    for p in range(lo, hi):
        t = 0
        while t + height <= tokens:
            _tile(dots, has_mins, w, size, xq, xs, offsets, totals, p, t, groups, tile_zeros(), out, rows)
            t += height
        while t + _FEW <= tokens:
            _tile(dots, has_mins, w, size, xq, xs, offsets, totals, p, t, groups, f32_zeros(_FEW), out, rows)
            t += _FEW
        while t < tokens:
            _tile(dots, has_mins, w, size, xq, xs, offsets, totals, p, t, groups, f32_zeros(1), out, rows)
            t += 1


@kernel(strict=True)
def quant_matmul(
    kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, out: Any, lo: Any, hi: Any
) -> None:
    """out (T, N) = x W^T for the rows of panels lo:hi, W quantised as ``kind``, x as quantize_activations left it."""
    tokens, rows = out.shape
    _, groups, size = blocks.shape
    w, o, q, s, z, t = flat(blocks), flat(out), flat(xq), flat(xs), flat(offsets), flat(totals)
    if kind == INT4:
        _panels(_dots_int4, has_mins, w, size, q, s, z, t, groups, o, tokens, rows, lo, hi)
    elif kind == INT5:
        _panels(_dots_int5, has_mins, w, size, q, s, z, t, groups, o, tokens, rows, lo, hi)
    else:
        _panels(_dots_int8, has_mins, w, size, q, s, z, t, groups, o, tokens, rows, lo, hi)


@parallel_kernel
def quant_matmul_parallel(
    kind: Any, has_mins: Any, blocks: Any, xq: Any, xs: Any, offsets: Any, totals: Any, out: Any, threads: Any
) -> None:
    """quant_matmul with the panels split over threads: each output is one thread's, so any split gives the same."""
    panels = blocks.shape[0]
    for t in prange(threads):
        lo, hi = panels * t // threads, panels * (t + 1) // threads
        quant_matmul(kind, has_mins, blocks, xq, xs, offsets, totals, out, lo, hi)


@parallel_kernel
def quantize_activations_parallel(x: Any, xq: Any, xs: Any, offsets: Any, totals: Any, threads: Any) -> None:
    """quantize_activations with the rows split over threads."""
    rows = x.shape[0]
    for t in prange(threads):
        quantize_activations(x, xq, xs, offsets, totals, rows * t // threads, rows * (t + 1) // threads)


def round_activations(x: np.ndarray, xq: np.ndarray, xs: np.ndarray, offsets: np.ndarray, totals: np.ndarray) -> None:
    """quantize_activations where callers own their buffers (``model.Activations``); sizes are theirs to guarantee."""
    threads = threads_for(x.size, PARALLEL_ELEMENTS, len(x))
    if threads == 1:
        quantize_activations(x, xq, xs, offsets, totals, 0, len(x))
    else:
        launch(quantize_activations_parallel, x, xq, xs, offsets, totals, threads)


def linear_quant(
    kind: int, has_mins: bool, blocks: np.ndarray,
    xq: np.ndarray, xs: np.ndarray, offsets: np.ndarray, totals: np.ndarray, out: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """out (T, N) = x W^T for callers that own their buffers (``model.Linear``): sizes are theirs to guarantee."""
    threads = threads_for(len(out) * blocks.size, PARALLEL_MACS, len(blocks))
    if threads == 1:
        quant_matmul(kind, has_mins, blocks, xq, xs, offsets, totals, out, 0, len(blocks))
    else:
        launch(quant_matmul_parallel, kind, has_mins, blocks, xq, xs, offsets, totals, out, threads)
    return out
