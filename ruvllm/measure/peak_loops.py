"""Loops of nothing but multiply-adds, integer dot products, or reads: their rate is the machine's limit.

How many accumulators a loop needs depends on the processor: enough to hide the latency of an instruction (8, or 12 for
dot products, where two 512-bit instructions issue per cycle), few enough for its registers (6 or 4 where a vector of 16
lanes takes two or four). Each loop comes with several numbers of accumulators; the fastest counts.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.simd.vectors import (
    LANES,
    dot_add,
    dot_begin,
    dot_end,
    f32_load,
    f32_zero,
    fma,
    hsum,
    i32_hsum,
    quad_at,
    splat,
    u8_load,
)

FMA_CHAINS = (6, 8)  # multiply-adds per iteration
DOT_CHAINS = (4, 8, 12)  # dot products per iteration


@kernel(strict=True)
def fma_loop(repeats: Any, chains: Any, out: Any, lo: Any, hi: Any) -> None:
    """``repeats`` times 6 or 8 independent chains of multiply-adds on 16 lanes; out[lo:hi] gets the sums."""
    half, one = splat(np.float32(0.5)), splat(np.float32(1))
    for i in range(lo, hi):
        s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        s4, s5, s6, s7 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        if chains == 6:
            for _ in range(repeats):
                s0, s1, s2 = fma(s0, half, one), fma(s1, half, one), fma(s2, half, one)
                s3, s4, s5 = fma(s3, half, one), fma(s4, half, one), fma(s5, half, one)
        else:
            for _ in range(repeats):
                s0, s1, s2, s3 = fma(s0, half, one), fma(s1, half, one), fma(s2, half, one), fma(s3, half, one)
                s4, s5, s6, s7 = fma(s4, half, one), fma(s5, half, one), fma(s6, half, one), fma(s7, half, one)
        out[i] = hsum(((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)))


@kernel(strict=True)
def dot_loop(repeats: Any, chains: Any, weights: Any, quads: Any, out: Any, lo: Any, hi: Any) -> None:
    """``repeats`` times 4, 8 or 12 integer dot products of 64 bytes; each two share a quad from the L1 cache.

    weights (128,) uint8: two vectors, so that no two products are alike; quads (1024,) int8. Sums of 16 bits (AVX2)
    wrap; nothing reads them.
    """
    for i in range(lo, hi):
        s0, s1, s2, s3 = dot_begin(), dot_begin(), dot_begin(), dot_begin()
        s4, s5, s6, s7 = dot_begin(), dot_begin(), dot_begin(), dot_begin()
        s8, s9, s10, s11 = dot_begin(), dot_begin(), dot_begin(), dot_begin()
        v, w = u8_load(weights, 0), u8_load(weights, 64)
        for repeat in range(repeats):
            at = (repeat & 31) * 32
            a, b = quad_at(quads, at), quad_at(quads, at + 4)
            s0, s1, s2, s3 = dot_add(s0, v, a), dot_add(s1, w, a), dot_add(s2, v, b), dot_add(s3, w, b)
            if chains > 4:
                a, b = quad_at(quads, at + 8), quad_at(quads, at + 12)
                s4, s5, s6, s7 = dot_add(s4, v, a), dot_add(s5, w, a), dot_add(s6, v, b), dot_add(s7, w, b)
            if chains > 8:
                a, b = quad_at(quads, at + 16), quad_at(quads, at + 20)
                s8, s9, s10, s11 = dot_add(s8, v, a), dot_add(s9, w, a), dot_add(s10, v, b), dot_add(s11, w, b)
        low = i32_hsum(dot_end(s0) + dot_end(s1)) + i32_hsum(dot_end(s2) + dot_end(s3))
        high = i32_hsum(dot_end(s4) + dot_end(s5)) + i32_hsum(dot_end(s6) + dot_end(s7))
        low += i32_hsum(dot_end(s8) + dot_end(s9)) + i32_hsum(dot_end(s10) + dot_end(s11))
        out[i] = np.float32(low) + np.float32(high)


@kernel(strict=True)
def read_loop(repeats: Any, x: Any, out: Any, lo: Any, hi: Any) -> None:
    """Sum each of the rows lo:hi of x (threads, n), n a multiple of 128, ``repeats`` times over."""
    n = x.shape[1]
    xf = flat(x)
    for i in range(lo, hi):
        s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        s4, s5, s6, s7 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        for _ in range(repeats):
            for at in range(i * n, (i + 1) * n, 8 * LANES):
                s0 = s0 + f32_load(xf, at)
                s1 = s1 + f32_load(xf, at + LANES)
                s2 = s2 + f32_load(xf, at + 2 * LANES)
                s3 = s3 + f32_load(xf, at + 3 * LANES)
                s4 = s4 + f32_load(xf, at + 4 * LANES)
                s5 = s5 + f32_load(xf, at + 5 * LANES)
                s6 = s6 + f32_load(xf, at + 6 * LANES)
                s7 = s7 + f32_load(xf, at + 7 * LANES)
        out[i] = hsum(((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)))


@parallel_kernel
def fma_parallel(repeats: Any, chains: Any, out: Any, threads: Any) -> None:
    """fma_loop on each thread."""
    for t in prange(threads):
        fma_loop(repeats, chains, out, t, t + 1)


@parallel_kernel
def dot_parallel(repeats: Any, chains: Any, weights: Any, quads: Any, out: Any, threads: Any) -> None:
    """dot_loop on each thread."""
    for t in prange(threads):
        dot_loop(repeats, chains, weights, quads, out, t, t + 1)


@parallel_kernel
def read_parallel(repeats: Any, x: Any, out: Any, threads: Any) -> None:
    """read_loop on each thread, each on its own row."""
    for t in prange(threads):
        read_loop(repeats, x, out, t, t + 1)
