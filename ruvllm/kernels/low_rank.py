"""Adapters on packed layers: out += (x down^T) up^T, beside the layer's own product in the same parallel region.

down (R, K) and up (N, R) are panels as all weights are (see panels.py), float32 or IEEE half bits; the adapter's
scaling is part of ``up``. Several adapters at once are one of the sum of their ranks. A token's result does not depend
on its neighbours, nor on the number of threads.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._jit import kernel, parallel_kernel
from ruvllm.kernels._simd import f32_zero, fma, load, splat_at
from ruvllm.kernels._threads import PARALLEL_MACS, launch, threads_for
from ruvllm.kernels._tile import LANES, put
from ruvllm.kernels._views import flat


@kernel(strict=True)
def low_rank_down(down: Any, x: Any, h: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of h (T, 16 P) = x down^T. down (P, K, 16) panels; x (T, K)."""
    panels, columns = down.shape[0], down.shape[1]
    w, xs, hs = flat(down), flat(x), flat(h)
    whole = columns - columns % 4
    for t in range(lo, hi):
        xi = t * columns
        for p in range(panels):
            s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
            wi = p * columns * LANES
            for k in range(0, whole, 4):
                at = wi + k * LANES
                s0 = fma(load(w, at), splat_at(xs, xi + k), s0)
                s1 = fma(load(w, at + LANES), splat_at(xs, xi + k + 1), s1)
                s2 = fma(load(w, at + 2 * LANES), splat_at(xs, xi + k + 2), s2)
                s3 = fma(load(w, at + 3 * LANES), splat_at(xs, xi + k + 3), s3)
            for k in range(whole, columns):
                s0 = fma(load(w, wi + k * LANES), splat_at(xs, xi + k), s0)
            put(hs, (t * panels + p) * LANES, (s0 + s1) + (s2 + s3), LANES, False)


@kernel(strict=True)
def low_rank_up(up: Any, h: Any, out: Any, lo: Any, hi: Any) -> None:
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
def low_rank_parallel(down: Any, up: Any, x: Any, h: Any, out: Any, threads: Any) -> None:
    """Both products: the first with the tokens split over threads, the second with the panels."""
    tokens, panels = x.shape[0], up.shape[0]
    for t in prange(threads):
        low_rank_down(down, x, h, tokens * t // threads, tokens * (t + 1) // threads)
    for t in prange(threads):
        low_rank_up(up, h, out, panels * t // threads, panels * (t + 1) // threads)


def add_low_rank(down: np.ndarray, up: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out (T, N) += (x down^T) up^T for packed down (P, K, 16) and up (ceil(N / 16), R, 16), x (T, K).

    For callers that own their buffers (``model.Linear``): sizes are theirs to guarantee.
    """
    tokens = len(x)
    h = np.empty((tokens, down.shape[0] * LANES), np.float32)
    threads = threads_for(tokens * (down.size + up.size), PARALLEL_MACS, up.shape[0])
    if threads == 1:
        low_rank_down(down, x, h, 0, tokens)
        low_rank_up(up, h, out, 0, len(up))
    else:
        launch(low_rank_parallel, down, up, x, h, out, threads)
