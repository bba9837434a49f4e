"""Integer matmul: weights in 4 or 8 bits, activations rounded to 8 bits on the fly, integer dot products.

Weights W (N, K) lie in panels of 16 rows, like float weights (see panels.py), in groups of 32 columns. Within a group
column k belongs to quad k // 4: a vector of 64 bytes holds one quad of 16 rows, so that one integer dot-product
instruction serves 16 rows with four activations in a broadcast.

    w = scale (code - zero)      symmetric        or      w = scale code + min
    y[r] = sum over groups g of  scale[r, g] xs[g] sum(code xq)  +  min[r, g] xs[g] sum(xq)

- ``INT4``: codes 0..15, (P, G, 4, 64) bytes; byte i of line j holds quad j in its low and quad j + 4 in its high bits.
- ``INT8``: signed codes, (P, G, 8, 64) bytes, one quad a line; zero is 0.

scales and mins are IEEE half bits (P, G, 16); where mins is empty, min = -zero scale.
Activations: xq (T, 32 G) int8, xs (T, G) = max|x| / 127, sums (T, G) int32 = sum(xq), totals = xs sums.
Integer sums are exact, so all instruction sets give the same bits.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._simd import (
    dot_add,
    dot_begin,
    dot_end,
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    fma,
    fmax,
    high_nibbles,
    hmax,
    hsum,
    i8_store,
    i32_hsum,
    load,
    low_nibbles,
    prefetch,
    quad_at,
    round_to_i32,
    sdot_add,
    sdot_begin,
    splat,
    splat_at,
    to_f32,
    u8_load,
)
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, PARALLEL_MACS, launch, threads_for
from ruvllm.kernels._tile import LANES, STREAMS, TILE, put
from ruvllm.kernels._views import flat

GROUP = 32
INT4, INT8 = 0, 1
_MINUS_ZERO_CODE = np.float32(-8)  # a symmetric 4-bit weight is scale (code - 8)
_SMALLEST = np.float32(2.0**-120)  # of max|x|: 127 / max|x| stays finite
_AHEAD = 512  # bytes that one token asks for beforehand: the hardware prefetcher stops at each page of 4 KB
_LINE = 64  # bytes of one line: 16 rows x 4 columns


@kernel(strict=True)
def quantize_activations(x: Any, xq: Any, xs: Any, sums: Any, totals: Any, lo: Any, hi: Any) -> None:
    """Round rows lo:hi of x (T, K) to int8 in groups of 32: xs = max|x| / 127, xq = round(x / xs).

    xq (T, 32 G); xs, sums, totals (T, G). A NaN or infinity makes its group's scale NaN, so that it is not lost.
    Groups of numbers below 2^-120 become zeros.
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
            zero = f32_zero()
            largest = hmax(fmax(fmax(a, zero - a), fmax(b, zero - b)))
            not_finite = hsum(a * zero + b * zero)
            inverse = splat(np.float32(127) / largest if largest > _SMALLEST else np.float32(0))
            qa, qb = round_to_i32(a * inverse), round_to_i32(b * inverse)
            at = (t * groups + g) * GROUP
            i8_store(codes, at, qa)
            i8_store(codes, at + LANES, qb)
            xs[t, g] = largest / np.float32(127) + not_finite
            sums[t, g] = i32_hsum(qa + qb)
            totals[t, g] = xs[t, g] * np.float32(sums[t, g])


@inline_kernel
def _group_int4(codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, totals: Any, at: Any, xi: Any, acc: Any) -> Any:
    """acc + group ``at`` of 16 rows times group ``xi`` of the activations."""
    s = dot_begin()
    for j in range(4):
        prefetch(codes, (at * 4 + j) * _LINE + _AHEAD)
        v = u8_load(codes, (at * 4 + j) * _LINE)
        s = dot_add(s, low_nibbles(v), quad_at(xq, xi * GROUP + 4 * j))
        s = dot_add(s, high_nibbles(v), quad_at(xq, xi * GROUP + 4 * j + 16))
    scale = load(scales, at * LANES)
    low = load(mins, at * LANES) if mins.size > 0 else scale * splat(_MINUS_ZERO_CODE)
    acc = fma(low, splat_at(totals, xi), acc)
    return fma(to_f32(dot_end(s)), scale * splat_at(xs, xi), acc)


@inline_kernel
def _group_int8(
    codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, sums: Any, totals: Any, at: Any, xi: Any, acc: Any
) -> Any:
    s = sdot_begin(sums[xi])
    for j in range(8):
        prefetch(codes, (at * 8 + j) * _LINE + _AHEAD)
        s = sdot_add(s, u8_load(codes, (at * 8 + j) * _LINE), quad_at(xq, xi * GROUP + 4 * j))
    scale = load(scales, at * LANES)
    if mins.size > 0:
        acc = fma(load(mins, at * LANES), splat_at(totals, xi), acc)
    return fma(to_f32(s), scale * splat_at(xs, xi), acc)


@inline_kernel
def _token_int4(codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, totals: Any, p: Any, t: Any, groups: Any) -> Any:
    """The 16 outputs of panel p for token t."""
    acc = f32_zero()
    for g in range(groups):
        acc = _group_int4(codes, scales, mins, xq, xs, totals, p * groups + g, t * groups + g, acc)
    return acc


@inline_kernel
def _token_int8(
    codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, sums: Any, totals: Any, p: Any, t: Any, groups: Any
) -> Any:
    acc = f32_zero()
    for g in range(groups):
        acc = _group_int8(codes, scales, mins, xq, xs, sums, totals, p * groups + g, t * groups + g, acc)
    return acc


@inline_kernel
def _scaled(sums: Any, scale: Any, low: Any, xs: Any, totals: Any, xi: Any, acc: Any) -> Any:
    """acc + scale xs sums + min totals, of one group and token."""
    return fma(to_f32(sums), scale * splat_at(xs, xi), fma(low, splat_at(totals, xi), acc))


@inline_kernel
def _tile_int4(
    codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, totals: Any, p: Any, t: Any, groups: Any,
    out: Any, oi: Any, rows: Any, count: Any,
) -> None:  # fmt: skip
    """The outputs of panel p for six tokens t .. t+5: each line of codes is loaded and unpacked once."""
    has_mins = mins.size > 0
    a0, a1, a2, a3, a4, a5 = f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero()
    step = groups * GROUP
    for g in range(groups):
        at, xi = p * groups + g, t * groups + g
        s0, s1, s2, s3, s4, s5 = dot_begin(), dot_begin(), dot_begin(), dot_begin(), dot_begin(), dot_begin()
        for j in range(4):
            v = u8_load(codes, (at * 4 + j) * _LINE)
            w, q = low_nibbles(v), xi * GROUP + 4 * j
            s0 = dot_add(s0, w, quad_at(xq, q))
            s1 = dot_add(s1, w, quad_at(xq, q + step))
            s2 = dot_add(s2, w, quad_at(xq, q + 2 * step))
            s3 = dot_add(s3, w, quad_at(xq, q + 3 * step))
            s4 = dot_add(s4, w, quad_at(xq, q + 4 * step))
            s5 = dot_add(s5, w, quad_at(xq, q + 5 * step))
            w, q = high_nibbles(v), q + 16
            s0 = dot_add(s0, w, quad_at(xq, q))
            s1 = dot_add(s1, w, quad_at(xq, q + step))
            s2 = dot_add(s2, w, quad_at(xq, q + 2 * step))
            s3 = dot_add(s3, w, quad_at(xq, q + 3 * step))
            s4 = dot_add(s4, w, quad_at(xq, q + 4 * step))
            s5 = dot_add(s5, w, quad_at(xq, q + 5 * step))
        scale = load(scales, at * LANES)
        low = load(mins, at * LANES) if has_mins else scale * splat(_MINUS_ZERO_CODE)
        a0 = _scaled(dot_end(s0), scale, low, xs, totals, xi, a0)
        a1 = _scaled(dot_end(s1), scale, low, xs, totals, xi + groups, a1)
        a2 = _scaled(dot_end(s2), scale, low, xs, totals, xi + 2 * groups, a2)
        a3 = _scaled(dot_end(s3), scale, low, xs, totals, xi + 3 * groups, a3)
        a4 = _scaled(dot_end(s4), scale, low, xs, totals, xi + 4 * groups, a4)
        a5 = _scaled(dot_end(s5), scale, low, xs, totals, xi + 5 * groups, a5)
    put(out, oi, a0, count, False)
    put(out, oi + rows, a1, count, False)
    put(out, oi + 2 * rows, a2, count, False)
    put(out, oi + 3 * rows, a3, count, False)
    put(out, oi + 4 * rows, a4, count, False)
    put(out, oi + 5 * rows, a5, count, False)


@inline_kernel
def _tile_int8(
    codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, sums: Any, totals: Any, p: Any, t: Any, groups: Any,
    out: Any, oi: Any, rows: Any, count: Any,
) -> None:  # fmt: skip
    has_mins = mins.size > 0
    a0, a1, a2, a3, a4, a5 = f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero()
    step = groups * GROUP
    for g in range(groups):
        at, xi = p * groups + g, t * groups + g
        s0, s1, s2 = sdot_begin(sums[xi]), sdot_begin(sums[xi + groups]), sdot_begin(sums[xi + 2 * groups])
        s3, s4 = sdot_begin(sums[xi + 3 * groups]), sdot_begin(sums[xi + 4 * groups])
        s5 = sdot_begin(sums[xi + 5 * groups])
        for j in range(8):
            w, q = u8_load(codes, (at * 8 + j) * _LINE), xi * GROUP + 4 * j
            s0 = sdot_add(s0, w, quad_at(xq, q))
            s1 = sdot_add(s1, w, quad_at(xq, q + step))
            s2 = sdot_add(s2, w, quad_at(xq, q + 2 * step))
            s3 = sdot_add(s3, w, quad_at(xq, q + 3 * step))
            s4 = sdot_add(s4, w, quad_at(xq, q + 4 * step))
            s5 = sdot_add(s5, w, quad_at(xq, q + 5 * step))
        scale = load(scales, at * LANES)
        low = load(mins, at * LANES) if has_mins else f32_zero()
        a0 = _scaled(s0, scale, low, xs, totals, xi, a0)
        a1 = _scaled(s1, scale, low, xs, totals, xi + groups, a1)
        a2 = _scaled(s2, scale, low, xs, totals, xi + 2 * groups, a2)
        a3 = _scaled(s3, scale, low, xs, totals, xi + 3 * groups, a3)
        a4 = _scaled(s4, scale, low, xs, totals, xi + 4 * groups, a4)
        a5 = _scaled(s5, scale, low, xs, totals, xi + 5 * groups, a5)
    put(out, oi, a0, count, False)
    put(out, oi + rows, a1, count, False)
    put(out, oi + 2 * rows, a2, count, False)
    put(out, oi + 3 * rows, a3, count, False)
    put(out, oi + 4 * rows, a4, count, False)
    put(out, oi + 5 * rows, a5, count, False)


@kernel(strict=True)
def quant_matmul(
    kind: Any, codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, sums: Any, totals: Any, out: Any, lo: Any, hi: Any
) -> None:
    """out (T, N) = x W^T for the rows of panels lo:hi, W quantised as ``kind``, x as quantize_activations left it."""
    tokens, rows = out.shape
    groups = scales.shape[1]
    c, sc, mn, o = flat(codes), flat(scales), flat(mins), flat(out)
    q, qs, qt, qn = flat(xq), flat(xs), flat(totals), flat(sums)
    if tokens == 1:
        # Memory is the limit: panels that lie far apart take turns, group by group; their sums wait in ``out``.
        step = (min(hi, rows // LANES) - lo) // STREAMS
        for p in range(lo, lo + step):
            for g in range(groups):
                for panel in range(p, p + STREAMS * step, step):
                    at, to = panel * groups + g, panel * LANES
                    acc = f32_load(o, to) if g > 0 else f32_zero()
                    if kind == INT4:
                        acc = _group_int4(c, sc, mn, q, qs, qt, at, g, acc)
                    else:
                        acc = _group_int8(c, sc, mn, q, qs, qn, qt, at, g, acc)
                    f32_store(o, to, acc)
        lo += STREAMS * step
    tiled = tokens - tokens % TILE
    for p in range(lo, hi):
        count = rows - p * LANES
        if kind == INT4:
            for t in range(0, tiled, TILE):
                _tile_int4(c, sc, mn, q, qs, qt, p, t, groups, o, t * rows + p * LANES, rows, count)
            for t in range(tiled, tokens):
                put(o, t * rows + p * LANES, _token_int4(c, sc, mn, q, qs, qt, p, t, groups), count, False)
        else:
            for t in range(0, tiled, TILE):
                _tile_int8(c, sc, mn, q, qs, qn, qt, p, t, groups, o, t * rows + p * LANES, rows, count)
            for t in range(tiled, tokens):
                put(o, t * rows + p * LANES, _token_int8(c, sc, mn, q, qs, qn, qt, p, t, groups), count, False)


@parallel_kernel
def quant_matmul_parallel(
    kind: Any, codes: Any, scales: Any, mins: Any, xq: Any, xs: Any, sums: Any, totals: Any, out: Any, threads: Any
) -> None:
    """quant_matmul with the panels split over threads: each output is one thread's, so any split gives the same."""
    panels = scales.shape[0]
    for t in prange(threads):
        lo, hi = panels * t // threads, panels * (t + 1) // threads
        quant_matmul(kind, codes, scales, mins, xq, xs, sums, totals, out, lo, hi)


@parallel_kernel
def quantize_activations_parallel(x: Any, xq: Any, xs: Any, sums: Any, totals: Any, threads: Any) -> None:
    """quantize_activations with the rows split over threads."""
    rows = x.shape[0]
    for t in prange(threads):
        quantize_activations(x, xq, xs, sums, totals, rows * t // threads, rows * (t + 1) // threads)


def round_activations(x: np.ndarray, xq: np.ndarray, xs: np.ndarray, sums: np.ndarray, totals: np.ndarray) -> None:
    """Fill xq (T, 32 G), xs, sums, totals (T, G) from x (T, K); buffers are the caller's (``model.Activations``)."""
    threads = threads_for(x.size, PARALLEL_ELEMENTS, len(x))
    if threads == 1:
        quantize_activations(x, xq, xs, sums, totals, 0, len(x))
    else:
        launch(quantize_activations_parallel, x, xq, xs, sums, totals, threads)


def linear_quant(
    kind: int, codes: np.ndarray, scales: np.ndarray, mins: np.ndarray,
    xq: np.ndarray, xs: np.ndarray, sums: np.ndarray, totals: np.ndarray, out: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """out (T, N) = x W^T for callers that own their buffers (``model.Linear``): sizes are theirs to guarantee."""
    threads = threads_for(len(out) * codes.size, PARALLEL_MACS, len(scales))
    if threads == 1:
        quant_matmul(kind, codes, scales, mins, xq, xs, sums, totals, out, 0, len(scales))
    else:
        launch(quant_matmul_parallel, kind, codes, scales, mins, xq, xs, sums, totals, out, threads)
    return out
