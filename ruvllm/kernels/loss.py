"""Cross-entropy of predicted tokens, with its gradient (training)."""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import kernel, parallel_kernel
from ruvllm.kernels._simd import LANES, f32_load, f32_load_first, f32_store, f32_store_first, splat
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, launch, threads_for
from ruvllm.kernels._views import flat
from ruvllm.kernels.activation import exp_shifted_sum, maximum


@kernel(strict=True)
def cross_entropy_rows(logits: Any, targets: Any, scale: Any, losses: Any, grad: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of cross_entropy. logits, grad (T, V), which may be one; targets (T,) int64; losses (T,)."""
    n = logits.shape[1]
    x, g = flat(logits), flat(grad)
    for row in range(lo, hi):
        at = row * n
        top = maximum(x, at, n)
        wanted = x[at + targets[row]]
        total = exp_shifted_sum(x, at, n, top, g, at)
        losses[row] = np.log(total) - np.float64(wanted - top)
        factor = np.float32(scale / total)
        whole = n - n % LANES
        for i in range(at, at + whole, LANES):
            f32_store(g, i, f32_load(g, i) * splat(factor))
        if whole < n:
            rest = f32_load_first(g, at + whole, n - whole) * splat(factor)
            f32_store_first(g, at + whole, rest, n - whole)
        g[at + targets[row]] -= np.float32(scale)


@parallel_kernel
def cross_entropy_parallel(logits: Any, targets: Any, scale: Any, losses: Any, grad: Any, threads: Any) -> None:
    """cross_entropy_rows with the rows split over threads."""
    rows = logits.shape[0]
    for t in prange(threads):
        cross_entropy_rows(logits, targets, scale, losses, grad, rows * t // threads, rows * (t + 1) // threads)


def cross_entropy(
    logits: Any, targets: Any, scale: float = 1.0, grad: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """loss[t] = log(sum(exp(logits[t]))) - logits[t, targets[t]]; grad[t] = scale (softmax(logits[t]) - onehot).

    Args:
        logits: (T, V) float32.
        targets: (T,) integers from 0 to V - 1.
        scale: of the gradient: 1 / T for that of the mean loss.
        grad: (T, V) float32 to write the gradient into; may be ``logits`` itself.

    Returns:
        losses (T,) float32 in nats, and grad.

    Raises:
        TypeError: logits are not float32, or targets no integers.
        ValueError: shapes do not match, or a target is outside the vocabulary.
    """
    scale = _check.number("scale", scale)
    logits = _check.float32("logits", logits, ndim=2)
    targets = _check.integers("targets", targets)
    rows, n = logits.shape
    if len(targets) != rows:
        raise ValueError(f"targets: expected {rows}, one per row of logits, found {len(targets)}")
    if rows and not 0 <= targets.min() <= targets.max() < n:
        raise ValueError(f"targets: expected 0 to {n - 1}, found {targets.min()} to {targets.max()}")
    grad = _check.output("grad", grad, logits.shape, logits)
    losses = np.empty(rows, np.float32)
    threads = threads_for(logits.size, PARALLEL_ELEMENTS, rows)
    if threads == 1:
        cross_entropy_rows(logits, targets, scale, losses, grad, 0, rows)
    else:
        launch(cross_entropy_parallel, logits, targets, scale, losses, grad, threads)
    return losses, grad


SPECS = [
    KernelSpec(
        name="cross_entropy",
        function=cross_entropy,
        compiled=(cross_entropy_rows, cross_entropy_parallel),
        reference=reference.cross_entropy,
        formula="log(sum(exp(x))) - x[target], and scale (softmax(x) - onehot(target))",
        example=lambda rng, rows, n: {
            "logits": 4 * rng.standard_normal((rows, n + 1), np.float32),
            "targets": rng.integers(0, n + 1, rows),
            "scale": 0.25,
        },
        flops=lambda rows, n: 6.0 * rows * n,
        bytes=lambda rows, n: 8.0 * rows * n,
        sizes=({"rows": 1, "n": 4096}, {"rows": 16, "n": 49152}),
    ),
]
