"""Adapters on packed layers: out += (s * (x down^T)) up^T, after the layer's own product in the same parallel region.

down (R, K) and up (N, R) are panels like all weights (matmul/panels.py), float32 or int8; s has one scale for each
rank: for int8 the product of the scales of both matrices, for float32 1. The adapter's scaling is part of ``up``.
Several adapters are concatenated into one, whose rank is the sum of theirs. A token's result depends neither on its
neighbours nor on the number of threads.
"""

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES, put
from ruvllm.kernels.simd.vectors import f32_load, f32_store, f32_zero, fma, load, splat_at
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for

PARTS = 4  # a token's product with ``down`` is summed in so many ranges of columns, which threads can share (split-K)


@inline_kernel
def _down_part(w, wi, xs, xi, columns, part):
    """A panel's product with one of the PARTS ranges of a row of x."""
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    first, end = columns * part // PARTS, columns * (part + 1) // PARTS
    whole = end - (end - first) % 4
    for k in range(first, whole, 4):
        at = wi + k * LANES
        s0 = fma(load(w, at), splat_at(xs, xi + k), s0)
        s1 = fma(load(w, at + LANES), splat_at(xs, xi + k + 1), s1)
        s2 = fma(load(w, at + 2 * LANES), splat_at(xs, xi + k + 2), s2)
        s3 = fma(load(w, at + 3 * LANES), splat_at(xs, xi + k + 3), s3)
    for k in range(whole, end):
        s0 = fma(load(w, wi + k * LANES), splat_at(xs, xi + k), s0)
    return (s0 + s1) + (s2 + s3)


@kernel(strict=True)
def low_rank_down(down, scales, x, h, lo, hi):
    """Rows lo:hi of h (T, 16 P) = scales * (x down^T). down (P, K, 16) panels; scales (16 P,); x (T, K)."""
    panels, columns = down.shape[0], down.shape[1]
    w, xs, hs = flat(down), flat(x), flat(h)
    for t in range(lo, hi):
        for p in range(panels):
            total = f32_zero()
            for i in range(PARTS):
                total = total + _down_part(w, p * columns * LANES, xs, t * columns, columns, i)
            f32_store(hs, (t * panels + p) * LANES, total * f32_load(scales, p * LANES))


@kernel(strict=True)
def low_rank_down_parts(down, x, parts, lo, hi):
    """The partial sums of low_rank_down for one token: part u % PARTS of panel u // PARTS, for the units u in lo:hi.

    x (1, K); parts (PARTS, 16 P).
    """
    panels, columns = down.shape[0], down.shape[1]
    w, xs, sums = flat(down), flat(x), flat(parts)
    for unit in range(lo, hi):
        p, i = unit // PARTS, unit % PARTS
        total = _down_part(w, p * columns * LANES, xs, 0, columns, i)
        f32_store(sums, (i * panels + p) * LANES, total)


@inline_kernel
def join_parts(parts, scales, h):
    """h (1, 16 P) = scales * the sum of low_rank_down_parts (PARTS, 16 P)."""
    sums, hs = flat(parts), flat(h)
    for at in range(0, h.shape[1], LANES):
        total = f32_zero()
        for i in range(PARTS):
            total = total + f32_load(sums, i * h.shape[1] + at)
        f32_store(hs, at, total * f32_load(scales, at))


@kernel(strict=True)
def low_rank_up(up, h, out, lo, hi):
    """out (T, N) += h up^T for the rows of panels lo:hi of up (ceil(N / 16), R, 16). h (T, 16 P), 16 P >= R."""
    tokens, rows = out.shape
    rank, wide = up.shape[1], h.shape[1]
    w, hs, outs = flat(up), flat(h), flat(out)
    for p in range(lo, hi):
        for t in range(tokens):
            s0, s1 = f32_zero(), f32_zero()
            even = rank - rank % 2
            for r in range(0, even, 2):
                at = (p * rank + r) * LANES
                s0 = fma(load(w, at), splat_at(hs, t * wide + r), s0)
                s1 = fma(load(w, at + LANES), splat_at(hs, t * wide + r + 1), s1)
            if even < rank:
                s0 = fma(load(w, (p * rank + even) * LANES), splat_at(hs, t * wide + even), s0)
            put(outs, t * rows + p * LANES, s0 + s1, rows - p * LANES, True)


@parallel_kernel
def low_rank_parallel(down, scales, up, x, h, out, threads):
    """Both products: the first with the tokens split over threads, the second with the panels."""
    tokens, panels = x.shape[0], up.shape[0]
    for t in prange(threads):
        low_rank_down(down, scales, x, h, tokens * t // threads, tokens * (t + 1) // threads)
    for t in prange(threads):
        low_rank_up(up, h, out, panels * t // threads, panels * (t + 1) // threads)


def add_low_rank(down: np.ndarray, scales: np.ndarray, up: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out (T, N) += (scales * (x down^T)) up^T for packed down (P, K, 16) and up (ceil(N / 16), R, 16), x (T, K).

    For callers that own their buffers (``model.Linear``) and guarantee their sizes.
    """
    tokens = len(x)
    h = np.empty((tokens, down.shape[0] * LANES), np.float32)
    threads = threads_for(tokens * (down.size + up.size), PARALLEL_MACS, up.shape[0])
    if threads == 1:
        low_rank_down(down, scales, x, h, 0, tokens)
        low_rank_up(up, h, out, 0, len(up))
    else:
        launch(low_rank_parallel, down, scales, up, x, h, out, threads)
