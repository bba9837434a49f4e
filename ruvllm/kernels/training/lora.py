"""Gradients of a low-rank adapter y = scaling (x A) B, accumulated over batches."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.small_calls import FEW, apart, rows_of, small_call
from ruvllm.kernels.jit.views import address, array_at
from ruvllm.kernels.lora.public import ADAPTER_MACS, checked_adapter, example, first_of, lora_down_rows, require_given
from ruvllm.kernels.matmul.micro_kernels import put
from ruvllm.kernels.simd.sums import sum_of_products
from ruvllm.kernels.simd.vectors import (
    LANES,
    f32_load,
    f32_zero,
    fma,
    low_halves,
    splat,
    splat_at,
    stack_f32,
    zip_high,
    zip_low,
)
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.pool import launch, threads_for


@kernel(strict=True)
def lora_back_rows(dy, b, g, lo, hi):
    """Rows lo:hi of g = dy B^T. dy (T, E_out); b (R, E_out); g (T, R)."""
    for row in range(lo, hi):
        for r in range(b.shape[0]):
            g[row, r] = sum_of_products(dy[row], b[r])


@kernel(strict=True)
def lora_grad_b_columns(h, dy, scaling, grad_b, lo, hi):
    """Columns lo:hi of grad_b += scaling h^T dy. h (T, R); dy (T, E_out); grad_b (R, E_out)."""
    rows, rank = h.shape
    n = dy.shape[1]
    factor = splat(np.float32(scaling))
    whole = lo + (hi - lo) // (2 * LANES) * (2 * LANES)
    for r in range(rank):
        for j in range(lo, whole, 2 * LANES):
            s0, s1 = f32_zero(), f32_zero()
            for t in range(rows):
                v = splat_at(h, t * rank + r)
                s0 = fma(v, f32_load(dy, t * n + j), s0)
                s1 = fma(v, f32_load(dy, t * n + j + LANES), s1)
            put(grad_b, r * n + j, s0 * factor, LANES, True)
            put(grad_b, r * n + j + LANES, s1 * factor, LANES, True)
        for j in range(whole, hi, LANES):
            s0 = f32_zero()
            for t in range(rows):
                s0 = fma(splat_at(h, t * rank + r), first_of(dy, t * n + j, hi - j), s0)
            put(grad_b, r * n + j, s0 * factor, hi - j, True)


@kernel(strict=True)
def lora_grad_a_rows(x, g, scaling, grad_a, lo, hi):
    """Rows lo:hi of grad_a += scaling x^T g. x (T, E_in); g (T, R); grad_a (E_in, R)."""
    rank = g.shape[1]
    if rank == 1:  # grad_a is one vector (E_in,)
        lora_grad_b_columns(g, x, scaling, grad_a.reshape(1, -1), lo, hi)
    elif rank == 2:
        grad_a_rank_two(x, g, scaling, grad_a, lo, hi)
    elif rank == 8:
        grad_a_rank_eight(x, g, scaling, grad_a, lo, hi)
    else:
        rows, n = x.shape
        factor = splat(np.float32(scaling))
        for i in range(lo, hi):
            for r in range(0, rank, LANES):
                s = f32_zero()
                for t in range(rows):
                    s = fma(splat_at(x, t * n + i), first_of(g, t * rank + r, rank - r), s)
                put(grad_a, i * rank + r, s * factor, rank - r, True)


@inline_kernel
def grad_a_rank_two(x, g, scaling, grad_a, lo, hi):
    """lora_grad_a_rows for R = 2: two columns of 16 rows are summed and then interleaved."""
    rows, n = x.shape
    factor = splat(np.float32(scaling))
    for i in range(lo, hi, LANES):
        count = hi - i
        even, odd = f32_zero(), f32_zero()
        for t in range(rows):
            v = first_of(x, t * n + i, count)
            even = fma(v, splat_at(g, 2 * t), even)
            odd = fma(v, splat_at(g, 2 * t + 1), odd)
        even, odd = even * factor, odd * factor
        put(grad_a, 2 * i, zip_low(even, odd), 2 * count, True)
        put(grad_a, 2 * i + LANES, zip_high(even, odd), 2 * count - LANES, True)


@inline_kernel
def grad_a_rank_eight(x, g, scaling, grad_a, lo, hi):
    """lora_grad_a_rows for R = 8: two rows share a vector."""
    rows, n = x.shape
    factor = splat(np.float32(scaling))
    for i in range(lo, hi, 2):
        count = min(hi - i, 2)
        s = f32_zero()
        for t in range(rows):
            v = first_of(g, t * 8, 8)
            s = fma(low_halves(splat_at(x, t * n + i), splat_at(x, t * n + i + count - 1)), low_halves(v, v), s)
        put(grad_a, i * 8, s * factor, count * 8, True)


@parallel_kernel
def lora_grad_parallel(x, dy, a, b, scaling, grads, hidden, threads):
    """lora_accumulate_grad: h and g split by tokens, then the gradients by their own rows and columns."""
    (grad_a, grad_b), h, g = grads, hidden[0], hidden[1]
    rows = x.shape[0]
    blocks, vectors = (a.shape[0] + LANES - 1) // LANES, (b.shape[1] + LANES - 1) // LANES
    for t in prange(threads):
        lo, hi = rows * t // threads, rows * (t + 1) // threads
        lora_down_rows(x, a, h, lo, hi)
        lora_back_rows(dy, b, g, lo, hi)
    for t in prange(threads):
        end = min(blocks * (t + 1) // threads * LANES, a.shape[0])
        lora_grad_a_rows(x, g, scaling, grad_a, blocks * t // threads * LANES, end)
        end = min(vectors * (t + 1) // threads * LANES, b.shape[1])
        lora_grad_b_columns(h, dy, scaling, grad_b, vectors * t // threads * LANES, end)


@kernel(strict=True)
def lora_grad(x, dy, a, b, scaling, grad_a, grad_b, hidden):
    """lora_accumulate_grad on one thread. hidden (2, T, R) float32 of scratch, left holding x A and dy B^T."""
    h, g = hidden[0], hidden[1]
    lora_down_rows(x, a, h, 0, x.shape[0])
    lora_back_rows(dy, b, g, 0, x.shape[0])
    lora_grad_a_rows(x, g, scaling, grad_a, 0, a.shape[0])
    lora_grad_b_columns(h, dy, scaling, grad_b, 0, b.shape[1])


@small_call((2, 2, 2, 2, float, 2, 2), (1, 1, 2, 2, float, 2, 2))
def lora_grad_small(x, dy, a, b, scaling, grad_a, grad_b):
    """lora_accumulate_grad of fewer multiply-adds than ADAPTER_MACS."""
    (n, rank), width = a.shape, b.shape[1]
    if x.shape[-1] != n or b.shape[0] != rank or dy.shape[-1] != width or dy.shape[:-1] != x.shape[:-1]:
        return False
    if grad_a.shape != a.shape or grad_b.shape != b.shape or not x.size or not dy.size:
        return False
    rows = x.size // n
    if not 0 < 2 * rows * rank <= FEW or 2 * rows * rank * (n + width) >= ADAPTER_MACS:
        return False
    for grad in (grad_a, grad_b):
        if not (apart(grad, x) and apart(grad, dy) and apart(grad, a) and apart(grad, b)):
            return False
    if not apart(grad_a, grad_b):
        return False
    hidden = array_at(address(stack_f32(FEW)), (2, rows, rank), np.float32)
    lora_grad(rows_of(x), rows_of(dy), a, b, scaling, grad_a, grad_b, hidden)
    return True


def lora_accumulate_grad(
    x: Any, dy: Any, a: Any, b: Any, scaling: float, grad_a: np.ndarray, grad_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """grad_a += scaling x^T (dy B^T); grad_b += scaling (x A)^T dy: summed over all rows of x and dy.

    Args:
        x: (..., E_in) float32, the layer's input.
        dy: (..., E_out) float32, gradient of the loss with respect to its output; leading dimensions of x.
        a, b: (E_in, R) and (R, E_out) float32.
        scaling: as in the forward pass.
        grad_a, grad_b: float32 of the shapes of a and b, added to in place.

    Returns:
        (grad_a, grad_b).

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: the chain rule on y = scaling (x A) B.
    """
    if lora_grad_small(x, dy, a, b, scaling, grad_a, grad_b):
        return grad_a, grad_b
    x, a, b = checked_adapter(x, a, b)
    dy = check.float32("dy", dy, shape=(*x.shape[:-1], b.shape[1]))
    require_given("grad_a", grad_a)
    require_given("grad_b", grad_b)
    grad_a = check.output("grad_a", grad_a, a.shape)
    grad_b = check.output("grad_b", grad_b, b.shape)
    scaling = check.number("scaling", scaling)
    if x.size and dy.size:
        rows, dys = check.rows(x), check.rows(dy)
        count, rank = rows.shape[0], a.shape[1]
        hidden = np.empty((2, count, rank), np.float32)
        threads = threads_for(2 * count * rank * (a.shape[0] + b.shape[1]), ADAPTER_MACS, a.shape[0])
        if threads == 1:
            lora_grad(rows, dys, a, b, scaling, grad_a, grad_b, hidden)
        else:
            launch(lora_grad_parallel, rows, dys, a, b, scaling, (grad_a, grad_b), hidden, threads)
    return grad_a, grad_b


def _example(rng: np.random.Generator, rows: int, dim: int, rank: int) -> dict[str, Any]:
    return {
        **example(rng, rows, dim, rank),
        "dy": rng.standard_normal((rows, dim), np.float32),
        "grad_a": rng.standard_normal((dim, rank), np.float32),
        "grad_b": rng.standard_normal((rank, dim), np.float32),
    }


SPECS = [
    KernelSpec(
        name="lora_accumulate_grad",
        function=lora_accumulate_grad,
        compiled=(lora_grad, lora_grad_parallel),
        reference=reference.lora_accumulate_grad,
        formula="grad_a += scaling x^T (dy B^T); grad_b += scaling (x A)^T dy",
        example=_example,
        flops=lambda rows, dim, rank: rows * (8.0 * dim * rank + 4 * dim),
        bytes=lambda rows, dim, rank: 24.0 * dim * rank + 8.0 * rows * dim,
        sizes=grid(rows=1, dim=(768, 2048, 4096), rank=(1, 2, 8, 64)),
    ),
]
