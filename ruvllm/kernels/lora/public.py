"""Low-rank adapters (LoRA): y = scaling (x A) B.

A is (E_in, R) and B is (R, E_out), so a rank-1 or rank-2 adapter (MicroLoRA) is two or four vectors. Each body reads
each matrix once per token; h = x A, R elements per token, is a scratch buffer that the caller provides.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.small_calls import FEW, apart, new_output, rows_of, small_call
from ruvllm.kernels.jit.views import address, array_at, flat
from ruvllm.kernels.matmul.micro_kernels import put
from ruvllm.kernels.simd.sums import sum_of_products
from ruvllm.kernels.simd.vectors import (
    LANES,
    evens,
    f32_load,
    f32_load_first,
    f32_zero,
    fma,
    hsum,
    odds,
    splat,
    splat_at,
    stack_f32,
    zip_high,
    zip_low,
)
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for

ADAPTER_MACS = 3 * PARALLEL_MACS  # multiply-adds from which threads pay off: h B waits at a barrier for h = x A
_STREAMS = 8  # rows of B that are read side by side: hardware prefetchers follow no more streams
_BLOCK = 128  # rows of A in one partial sum: long float32 sums lose digits
_STRIP = 4 * LANES  # columns per pass: four independent accumulators


@inline_kernel
def first_of(x, index, count):
    """Load 16 elements, or the first ``count`` at a ragged end."""
    return f32_load(x, index) if count >= LANES else f32_load_first(x, index, count)


@inline_kernel
def down_rank_two(x, xi, a, n, h, hi):
    """h[0:2] = x A for A (n, 2), whose two interleaved columns are separated in registers."""
    even0, even1, odd0, odd1 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    whole = n - n % (2 * LANES)
    for i in range(0, whole, 2 * LANES):
        v, w = f32_load(x, xi + i), f32_load(x, xi + i + LANES)
        p, q = f32_load(a, 2 * i), f32_load(a, 2 * i + LANES)
        r, s = f32_load(a, 2 * i + 2 * LANES), f32_load(a, 2 * i + 3 * LANES)
        even0 = fma(v, evens(p, q), even0)
        odd0 = fma(v, odds(p, q), odd0)
        even1 = fma(w, evens(r, s), even1)
        odd1 = fma(w, odds(r, s), odd1)
    for i in range(whole, n, LANES):
        count = n - i
        v = f32_load_first(x, xi + i, count)
        p = f32_load_first(a, 2 * i, 2 * count)
        q = f32_load_first(a, 2 * i + LANES, 2 * count - LANES)
        even0 = fma(v, evens(p, q), even0)
        odd0 = fma(v, odds(p, q), odd0)
    h[hi] = hsum(even0 + even1)
    h[hi + 1] = hsum(odd0 + odd1)


@inline_kernel
def down_rank_eight(x, xi, a, lo, end, h, hi, add):
    """down_columns for R = 8: two rows of A share a vector, which multiplies eight lanes each of two elements of x."""
    s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
    for i in range(lo, end, LANES):
        count = 8 * (end - i)
        v, at = first_of(x, xi + i, end - i), 8 * i
        low, high = zip_low(v, v), zip_high(v, v)
        a0, a1, a2, a3 = zip_low(low, low), zip_high(low, low), zip_low(high, high), zip_high(high, high)
        s0 = fma(zip_low(a0, a0), first_of(a, at, count), s0)
        s1 = fma(zip_high(a0, a0), first_of(a, at + LANES, count - LANES), s1)
        s2 = fma(zip_low(a1, a1), first_of(a, at + 2 * LANES, count - 2 * LANES), s2)
        s3 = fma(zip_high(a1, a1), first_of(a, at + 3 * LANES, count - 3 * LANES), s3)
        s0 = fma(zip_low(a2, a2), first_of(a, at + 4 * LANES, count - 4 * LANES), s0)
        s1 = fma(zip_high(a2, a2), first_of(a, at + 5 * LANES, count - 5 * LANES), s1)
        s2 = fma(zip_low(a3, a3), first_of(a, at + 6 * LANES, count - 6 * LANES), s2)
        s3 = fma(zip_high(a3, a3), first_of(a, at + 7 * LANES, count - 7 * LANES), s3)
    total = (s0 + s1) + (s2 + s3)
    other = zip_high(total, total)
    put(h, hi, total + evens(other, other), 8, add)


@inline_kernel
def down_columns(x, xi, a, lo, end, h, hi, add):
    """h[0:R] = x A over rows lo:end of A, or += with ``add``: 64 columns at a time, then 16 in four accumulators."""
    rank = a.shape[1]
    wide = rank - rank % _STRIP
    for r in range(0, wide, _STRIP):
        s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        for i in range(lo, end):
            v = splat_at(x, xi + i)
            at = i * rank + r
            s0 = fma(v, f32_load(a, at), s0)
            s1 = fma(v, f32_load(a, at + LANES), s1)
            s2 = fma(v, f32_load(a, at + 2 * LANES), s2)
            s3 = fma(v, f32_load(a, at + 3 * LANES), s3)
        put(h, hi + r, s0, LANES, add)
        put(h, hi + r + LANES, s1, LANES, add)
        put(h, hi + r + 2 * LANES, s2, LANES, add)
        put(h, hi + r + 3 * LANES, s3, LANES, add)
    for r in range(wide, rank, LANES):
        count = rank - r
        s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
        whole = end - (end - lo) % 4
        for i in range(lo, whole, 4):
            at = i * rank + r
            s0 = fma(splat_at(x, xi + i), first_of(a, at, count), s0)
            s1 = fma(splat_at(x, xi + i + 1), first_of(a, at + rank, count), s1)
            s2 = fma(splat_at(x, xi + i + 2), first_of(a, at + 2 * rank, count), s2)
            s3 = fma(splat_at(x, xi + i + 3), first_of(a, at + 3 * rank, count), s3)
        for i in range(whole, end):
            s0 = fma(splat_at(x, xi + i), first_of(a, i * rank + r, count), s0)
        put(h, hi + r, (s0 + s1) + (s2 + s3), count, add)


@kernel(strict=True)
def lora_down_rows(x, a, h, lo, hi):
    """Rows lo:hi of h = x A. x (T, E_in); a (E_in, R); h (T, R)."""
    n, rank = a.shape
    sums = flat(h)
    for row in range(lo, hi):
        if rank == 1:
            sums[row] = sum_of_products(x[row], flat(a))
        elif rank == 2:
            down_rank_two(x, row * n, a, n, sums, row * 2)
        else:
            for i in range(0, max(n, 1), _BLOCK):
                end = min(i + _BLOCK, n)
                if rank == 8:
                    down_rank_eight(x, row * n, a, i, end, sums, row * rank, i > 0)
                else:
                    down_columns(x, row * n, a, i, end, sums, row * rank, i > 0)


@kernel(strict=True)
def lora_up_columns(h, b, scaling, add, out, lo, hi):
    """Columns lo:hi of out = scaling h B, or of out += scaling h B with ``add``.

    h (T, R); b (R, E_out); out (T, E_out).
    """
    rank, n = b.shape
    factor = np.float32(scaling)
    whole = lo + (hi - lo) // _STRIP * _STRIP
    for row in range(h.shape[0]):
        for first in range(0, rank, _STREAMS):
            last, more = min(first + _STREAMS, rank), add or first > 0
            for j in range(lo, whole, _STRIP):
                s0, s1, s2, s3 = f32_zero(), f32_zero(), f32_zero(), f32_zero()
                for r in range(first, last):
                    v = splat(h[row, r] * factor)
                    at = r * n + j
                    s0 = fma(v, f32_load(b, at), s0)
                    s1 = fma(v, f32_load(b, at + LANES), s1)
                    s2 = fma(v, f32_load(b, at + 2 * LANES), s2)
                    s3 = fma(v, f32_load(b, at + 3 * LANES), s3)
                at = row * n + j
                put(out, at, s0, LANES, more)
                put(out, at + LANES, s1, LANES, more)
                put(out, at + 2 * LANES, s2, LANES, more)
                put(out, at + 3 * LANES, s3, LANES, more)
            for j in range(whole, hi, LANES):
                s0 = f32_zero()
                for r in range(first, last):
                    s0 = fma(splat(h[row, r] * factor), first_of(b, r * n + j, hi - j), s0)
                put(out, row * n + j, s0, hi - j, more)


@kernel(strict=True)
def lora_serial(x, a, b, scaling, add, h, out):
    """lora_forward, or lora_forward_add with ``add``. h (T, R) float32 scratch, left holding x A."""
    lora_down_rows(x, a, h, 0, x.shape[0])
    lora_up_columns(h, b, scaling, add, out, 0, b.shape[1])


@parallel_kernel
def lora_parallel(x, a, b, scaling, add, h, out, threads):
    """lora_serial with x A split by rows and h B by columns, so that several threads can share even one row."""
    rows, vectors = x.shape[0], (b.shape[1] + LANES - 1) // LANES
    for t in prange(threads):
        lora_down_rows(x, a, h, rows * t // threads, rows * (t + 1) // threads)
    for t in prange(threads):
        end = min(vectors * (t + 1) // threads * LANES, b.shape[1])
        lora_up_columns(h, b, scaling, add, out, vectors * t // threads * LANES, end)


@small_call((2, 2, 2, float, bool, 2), (1, 2, 2, float, bool, 1))
def lora_small(x, a, b, scaling, add, out):
    """lora_forward of fewer multiply-adds than ADAPTER_MACS, or lora_forward_add."""
    (n, rank), width = a.shape, b.shape[1]
    if x.shape[-1] != n or b.shape[0] != rank or out.shape[-1] != width or out.shape[:-1] != x.shape[:-1]:
        return False
    if not x.size or not out.size:
        return False
    rows = x.size // n
    if not 0 < rows * rank <= FEW or rows * rank * (n + width) >= ADAPTER_MACS:
        return False
    if not (apart(out, x) and apart(out, a) and apart(out, b)):
        return False
    h = array_at(address(stack_f32(FEW)), (rows, rank), np.float32)
    lora_serial(rows_of(x), a, b, scaling, add, h, rows_of(out))
    return True


def lora_forward(x: Any, a: Any, b: Any, scaling: float = 1.0, out: np.ndarray | None = None) -> np.ndarray:
    """y = scaling (x A) B.

    Args:
        x: (..., E_in) float32.
        a: (E_in, R) float32, any rank R >= 1.
        b: (R, E_out) float32.
        scaling: alpha / R as a rule.
        out: (..., E_out) float32 to write into; not an input.

    Returns:
        (..., E_out) float32.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    plain = type(x) is np.ndarray and type(b) is np.ndarray
    y: Any = new_output(x.shape[:-1] + b.shape[-1:]) if out is None and plain else out
    if lora_small(x, a, b, scaling, False, y):
        return y
    x, a, b = checked_adapter(x, a, b)
    out = check.apart("out", check.output("out", out, (*x.shape[:-1], b.shape[1])), x, a, b)
    return _forward(x, a, b, scaling, False, out)


def lora_forward_add(x: Any, a: Any, b: Any, scaling: float, out: np.ndarray) -> np.ndarray:
    """out += scaling (x A) B: an adapter on top of the layer that has written ``out``. Arguments of lora_forward.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.
    """
    if lora_small(x, a, b, scaling, True, out):
        return out
    x, a, b = checked_adapter(x, a, b)
    require_given("out", out)
    out = check.apart("out", check.output("out", out, (*x.shape[:-1], b.shape[1])), x, a, b)
    return _forward(x, a, b, scaling, True, out)


def checked_adapter(x: Any, a: Any, b: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, a and b as float32 arrays whose shapes fit each other."""
    x = check.float32("x", x, min_ndim=1)
    a = check.float32("a", a, ndim=2)
    n, rank = a.shape
    if n != x.shape[-1] or not rank:
        raise ValueError(f"a: expected shape ({x.shape[-1]}, R) with R >= 1, found {a.shape}")
    b = check.float32("b", b, ndim=2)
    if len(b) != rank:
        raise ValueError(f"b: expected shape ({rank}, E_out), found {b.shape}")
    return x, a, b


def require_given(name: str, array: Any) -> None:
    """Raise TypeError where there is no array to add to."""
    if array is None:
        raise TypeError(f"{name}: expected a float32 NumPy array to add to, found None")


def _forward(x: np.ndarray, a: np.ndarray, b: np.ndarray, scaling: float, add: bool, out: np.ndarray) -> np.ndarray:
    scaling = check.number("scaling", scaling)
    if not out.size:
        return out
    to = check.rows(out)
    count, width = to.shape
    n, rank = a.shape
    rows = x if x.ndim == 2 else x.reshape(count, n)
    h = np.empty((count, rank), np.float32)
    threads = threads_for(count * rank * (n + width), ADAPTER_MACS, count * width)
    if threads == 1:
        lora_serial(rows, a, b, scaling, add, h, to)
    else:
        launch(lora_parallel, rows, a, b, scaling, add, h, to, threads)
    return out


def example(rng: np.random.Generator, rows: int, dim: int, rank: int) -> dict[str, Any]:
    """Arguments of lora_forward for a square layer."""
    return {
        "x": rng.standard_normal((rows, dim), np.float32),
        "a": rng.standard_normal((dim, rank), np.float32),
        "b": rng.standard_normal((rank, dim), np.float32),
        "scaling": 2.0,
    }


def example_add(rng: np.random.Generator, rows: int, dim: int, rank: int) -> dict[str, Any]:
    """Arguments of lora_forward_add."""
    return {**example(rng, rows, dim, rank), "out": rng.standard_normal((rows, dim), np.float32)}


SPECS = [
    KernelSpec(
        name="lora_forward",
        function=lora_forward,
        compiled=(lora_serial, lora_parallel),
        reference=reference.lora_forward,
        formula="scaling (x A) B",
        example=example,
        flops=lambda rows, dim, rank: rows * (4.0 * dim * rank + dim),
        bytes=lambda rows, dim, rank: 8.0 * dim * rank + 8.0 * rows * dim,
        sizes=grid(rows=1, dim=(768, 2048, 4096), rank=(1, 2, 8, 64)),
    ),
    KernelSpec(
        name="lora_forward_add",
        function=lora_forward_add,
        compiled=(lora_serial, lora_parallel),
        reference=reference.lora_forward_add,
        formula="out + scaling (x A) B, in place",
        example=example_add,
        flops=lambda rows, dim, rank: rows * (4.0 * dim * rank + 2.0 * dim),
        bytes=lambda rows, dim, rank: 8.0 * dim * rank + 12.0 * rows * dim,
        sizes=grid(rows=1, dim=(768, 2048, 4096), rank=(1, 2, 8, 64)),
    ),
]
