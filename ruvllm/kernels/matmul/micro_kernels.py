"""The micro-kernels: four 16-column panels times one row, and one panel times six rows (more rows: matmul/tile.py).

Linear layers, attention scores (blocks of cached keys are panels of 16 positions) and attention outputs (rows of
values are panels of 16 features) are all this one product: sums[r] += splat(x[r, k]) * panel[k]. With 6 rows, the
6 x 16 accumulators stay in registers (12 of AVX2's 16, 24 of NEON's 32), and each weight vector is loaded once for 6
uses.
"""

from typing import Any, NamedTuple

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.jit.private.target import target
from ruvllm.kernels.simd.dot_llvm import target_kind
from ruvllm.kernels.simd.vectors import (
    LANES,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    f32_zero,
    fma,
    load,
    prefetch_l2,
    splat_at,
)

__all__ = [
    "DOT_PANELS", "LANES", "STREAMS", "TILE", "UNROLLS", "WIDE", "Rows", "put", "tile_times_panel",
    "token_times_panels",
]  # fmt: skip

TILE = 6
WIDE = "+avx512f" in target().features.split(",")  # 32 registers of a whole vector
# Panels at a time in integer products of several tokens: each broadcast of four activations serves two dot products.
_DOTS = target_kind()
DOT_PANELS = 2 if _DOTS == "vnni512" else 1
UNROLLS = _DOTS != "neon"  # unrolled, integer products take more registers than NEON has
# Streams: runs of memory that one token's product reads in turn. A core of a Zen 2 then reads 26 GB/s, with one 18.
STREAMS = 4

_AHEAD = 2048  # prefetch distance, in bytes


class Rows(NamedTuple):
    """Rows in flat memory: element i of row r is elements[start + r step + i]. A panel is one row for each column."""

    elements: Any
    start: Any
    step: Any


@inline_kernel
def put(out, index, value, count, add):
    """Store 16 lanes (or the first ``count`` at a ragged end), or add them to what is there."""
    if count >= LANES:
        f32_store(out, index, f32_load(out, index) + value if add else value)
    else:
        f32_store_first(out, index, f32_load_first(out, index, count) + value if add else value, count)


@inline_kernel
def token_times_panels(panels, x, xi, count, out, p, p_step, add):
    """16 outputs each for panels p, p + p_step, ..: STREAMS whole panels; ``panels`` says where they lie (``Rows``).

    Weights are prefetched, because the hardware prefetcher stops at the end of each page.
    """
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    w, w0, step = panels
    w1, w2, w3 = w0 + step, w0 + 2 * step, w0 + 3 * step
    distance = _AHEAD // w.itemsize
    for k in range(count):
        v = splat_at(x, xi + k)
        ahead = k * LANES + distance
        prefetch_l2(w, w0 + ahead)
        prefetch_l2(w, w1 + ahead)
        prefetch_l2(w, w2 + ahead)
        prefetch_l2(w, w3 + ahead)
        s0 = fma(load(w, w0 + k * LANES), v, s0)
        s1 = fma(load(w, w1 + k * LANES), v, s1)
        s2 = fma(load(w, w2 + k * LANES), v, s2)
        s3 = fma(load(w, w3 + k * LANES), v, s3)
    put(out, p * LANES, s0, LANES, add)
    put(out, (p + p_step) * LANES, s1, LANES, add)
    put(out, (p + 2 * p_step) * LANES, s2, LANES, add)
    put(out, (p + 3 * p_step) * LANES, s3, LANES, add)


@inline_kernel
def tile_times_panel(panel, rows, count, out, width, add):
    """out[r, j] = sum_k rows[r, k] panel[k, j] for r < 6 and j < ``width``; or += with ``add``. All are ``Rows``."""
    s0, s1, s2, s3, s4, s5 = f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero()
    x, x0, step = rows
    x1, x2, x3, x4, x5 = x0 + step, x0 + 2 * step, x0 + 3 * step, x0 + 4 * step, x0 + 5 * step
    for k in range(count):
        v = load(panel.elements, panel.start + k * panel.step)
        s0 = fma(v, splat_at(x, x0 + k), s0)
        s1 = fma(v, splat_at(x, x1 + k), s1)
        s2 = fma(v, splat_at(x, x2 + k), s2)
        s3 = fma(v, splat_at(x, x3 + k), s3)
        s4 = fma(v, splat_at(x, x4 + k), s4)
        s5 = fma(v, splat_at(x, x5 + k), s5)
    to, oi, step = out
    put(to, oi, s0, width, add)
    put(to, oi + step, s1, width, add)
    put(to, oi + 2 * step, s2, width, add)
    put(to, oi + 3 * step, s3, width, add)
    put(to, oi + 4 * step, s4, width, add)
    put(to, oi + 5 * step, s5, width, add)
