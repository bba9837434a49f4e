"""Cross-entropy of next-token predictions, with its gradient (training)."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.simd.sums import exp_and_sum, maximum
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.over_rows import over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS


@kernel(independent=True)
def cross_entropy_rows(logits, targets, scale, losses, grad, lo, hi):
    """Rows lo:hi of cross_entropy. logits, grad (T, V), which may be one array; targets (T,) int64; losses (T,)."""
    n = logits.shape[1]
    for row in range(lo, hi):
        x, g, target = logits[row], grad[row], targets[row]
        top = maximum(x)
        wanted = x[target] - top
        total = exp_and_sum(x, top, g)
        losses[row] = np.log(total) - np.float64(wanted)
        factor = np.float32(scale / total)
        for i in range(n):
            g[i] *= factor
        g[target] -= np.float32(scale)


cross_entropy_parallel = over_rows(cross_entropy_rows)


def cross_entropy(
    logits: Any, targets: Any, scale: float = 1.0, grad: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """loss[t] = log(sum(exp(logits[t]))) - logits[t, targets[t]]; grad[t] = scale (softmax(logits[t]) - onehot).

    Args:
        logits: (T, V) float32.
        targets: (T,) integers from 0 to V - 1.
        scale: factor of the gradient: 1 / T for the gradient of the mean loss.
        grad: (T, V) float32 to write the gradient into; may be ``logits`` itself.

    Returns:
        losses (T,) float32 in nats, and grad.

    Raises:
        TypeError: logits are not float32, or targets are not integers.
        ValueError: shapes do not match, or a target is outside the vocabulary.
    """
    scale = check.number("scale", scale)
    logits = check.float32("logits", logits, ndim=2)
    targets = check.integers("targets", targets)
    rows, n = logits.shape
    if len(targets) != rows:
        raise ValueError(f"targets: expected {rows}, one per row of logits, found {len(targets)}")
    if rows and not 0 <= targets.min() <= targets.max() < n:
        raise ValueError(f"targets: expected 0 to {n - 1}, found {targets.min()} to {targets.max()}")
    grad = check.output("grad", grad, logits.shape, logits)
    losses = np.empty(rows, np.float32)
    arguments = logits, targets, scale, losses, grad
    run_rows(cross_entropy_rows, cross_entropy_parallel, logits.size, PARALLEL_ELEMENTS, rows, *arguments)
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
