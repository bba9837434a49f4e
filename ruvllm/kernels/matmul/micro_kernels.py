"""The micro-kernels: 16-column panels times one row, or one panel times six rows at once (more rows: _float_tile).

Linear layers, attention scores (K cache blocks are panels of 16 positions) and attention outputs (V rows are
panels of 16 features) are all this one product: sums[r] += splat_at(x, r, k) * panel[k]. With 6 rows, 6 x 16
sums stay in registers (12 of AVX2's 16, 24 of NEON's 32) and each weight vector is loaded once for 6 uses.
"""

from typing import Any

from numba.core.registry import cpu_target

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.simd.dot_llvm import target_kind
from ruvllm.kernels.simd.vectors import (
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

LANES = 16
TILE = 6
WIDE = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")  # 32 registers of a whole vector
# Panels at a time in integer products of several tokens: each broadcast of four activations serves two dot products.
_DOTS = target_kind(cpu_target.target_context)
DOT_PANELS = 2 if _DOTS == "vnni512" else 1
UNROLLS = _DOTS != "neon"  # there unrolled integer products take more registers than there are
STREAMS = 4  # runs of memory that one token's product reads by turns: one core of a Zen 2 reads 26 GB/s so, from one 18

_AHEAD = 32  # columns


@inline_kernel
def put(out: Any, index: Any, value: Any, count: Any, add: Any) -> None:
    """Store 16 lanes (or the first ``count`` at a ragged end), or add them to what is there."""
    if count >= LANES:
        f32_store(out, index, f32_load(out, index) + value if add else value)
    else:
        f32_store_first(out, index, f32_load_first(out, index, count) + value if add else value, count)


@inline_kernel
def token_times_panels(
    w: Any, wi: Any, w_step: Any, x: Any, xi: Any, k_count: Any, out: Any, p: Any, p_step: Any, add: Any
) -> None:
    """The outputs of one token for panels p, p + p_step, ..: STREAMS whole panels, ``w_step`` weights apart.

    Weights are asked for ahead: a machine's own prefetching ends with each page.
    """
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    w1, w2, w3 = wi + w_step, wi + 2 * w_step, wi + 3 * w_step
    for k in range(k_count):
        v = splat_at(x, xi + k)
        ahead = (k + _AHEAD) * LANES
        prefetch_l2(w, wi + ahead)
        prefetch_l2(w, w1 + ahead)
        prefetch_l2(w, w2 + ahead)
        prefetch_l2(w, w3 + ahead)
        s0 = fma(load(w, wi + k * LANES), v, s0)
        s1 = fma(load(w, w1 + k * LANES), v, s1)
        s2 = fma(load(w, w2 + k * LANES), v, s2)
        s3 = fma(load(w, w3 + k * LANES), v, s3)
    put(out, p * LANES, s0, LANES, add)
    put(out, (p + p_step) * LANES, s1, LANES, add)
    put(out, (p + 2 * p_step) * LANES, s2, LANES, add)
    put(out, (p + 3 * p_step) * LANES, s3, LANES, add)


@inline_kernel
def tile_times_panel(
    w: Any, wi: Any, w_step: Any, x: Any, xi: Any, x_row: Any, k_count: Any,
    out: Any, oi: Any, out_row: Any, count: Any, add: Any,
) -> None:  # fmt: skip
    """out[oi + r out_row + j] = sum_k x[xi + r x_row + k] w[wi + k w_step + j], r < 6, j < 16; or += with ``add``."""
    s0, s1, s2, s3, s4, s5 = f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero(), f32_zero()
    x1, x2, x3, x4, x5 = xi + x_row, xi + 2 * x_row, xi + 3 * x_row, xi + 4 * x_row, xi + 5 * x_row
    for k in range(k_count):
        v = load(w, wi + k * w_step)
        s0 = fma(v, splat_at(x, xi + k), s0)
        s1 = fma(v, splat_at(x, x1 + k), s1)
        s2 = fma(v, splat_at(x, x2 + k), s2)
        s3 = fma(v, splat_at(x, x3 + k), s3)
        s4 = fma(v, splat_at(x, x4 + k), s4)
        s5 = fma(v, splat_at(x, x5 + k), s5)
    put(out, oi, s0, count, add)
    put(out, oi + out_row, s1, count, add)
    put(out, oi + 2 * out_row, s2, count, add)
    put(out, oi + 3 * out_row, s3, count, add)
    put(out, oi + 4 * out_row, s4, count, add)
    put(out, oi + 5 * out_row, s5, count, add)
