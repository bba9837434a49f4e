"""One step of AdamW (training)."""

from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.spec import KernelSpec
from ruvllm.kernels.threads.over_rows import over_elements, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

_MOST_STEPS = 1 << 53  # float64 is exact up to here


class AdamW(NamedTuple):
    """The settings of AdamW."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@kernel(strict=True)
def adamw_range(p, g, m, v, factors, lo, hi):
    """Elements lo:hi of adamw.

    factors (6,) float32: beta1, beta2, eps, 1 - lr decay, and with bias correction the step size lr / (1 - beta1^step)
    and the factor of sqrt(v), (1 - beta2^step)^-0.5.
    """
    beta1, beta2, eps, keep, step, root = factors[0], factors[1], factors[2], factors[3], factors[4], factors[5]
    one = np.float32(1)
    # Slices, because LLVM does not vectorise a loop over lo:hi, whose indices might be negative.
    p, g, m, v = p[lo:hi], g[lo:hi], m[lo:hi], v[lo:hi]
    for i in range(p.size):
        mean = beta1 * m[i] + (one - beta1) * g[i]
        square = beta2 * v[i] + (one - beta2) * g[i] * g[i]
        m[i], v[i] = mean, square
        p[i] = p[i] * keep - step * mean / (np.sqrt(square) * root + eps)


adamw_parallel = over_elements(adamw_range)
_DEFAULT = AdamW()


def adamw(
    parameters: np.ndarray, grad: Any, m: np.ndarray, v: np.ndarray, step: int, settings: AdamW = _DEFAULT
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = p (1 - lr decay) - lr m' / (sqrt(v') + eps), in place.

    m' = m / (1 - b1^step) and v' = v / (1 - b2^step).

    Args:
        parameters, m, v: (n,) float32, changed in place; m and v begin as zeros.
        grad: (n,) float32.
        step: counts from 1.
        settings: learning rate, running means and weight decay.

    Returns:
        parameters, m, v.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match, or step < 1.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    grad = check.float32("grad", grad, ndim=1)
    for name, array in (("parameters", parameters), ("m", m), ("v", v)):
        if array is None:
            raise TypeError(f"{name}: expected a float32 NumPy array, found None")
        check.output(name, array, grad.shape)
    if not 1 <= check.integer("step", step) <= _MOST_STEPS:
        raise ValueError(f"step: expected 1 to {_MOST_STEPS}, found {step}")
    if not isinstance(settings, tuple) or len(settings) != len(AdamW._fields):
        raise TypeError(f"settings: expected an AdamW, found {type(settings).__name__}")
    lr, beta1, beta2, eps, decay = map(check.number, AdamW._fields, settings)
    size, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    factors = np.array([beta1, beta2, eps, 1 - lr * decay, size, root], np.float32)
    count = grad.size
    run_rows(adamw_range, adamw_parallel, count, PARALLEL_ELEMENTS, count, parameters, grad, m, v, factors)
    return parameters, m, v


def _example(rng: np.random.Generator, n: int) -> dict[str, Any]:
    p, g, m = rng.standard_normal((3, n), np.float32)
    settings = AdamW(lr=0.1, weight_decay=0.5)
    return {"parameters": p, "grad": g, "m": m, "v": rng.random(n, np.float32), "step": 3, "settings": settings}


SPECS = [
    KernelSpec(
        name="adamw",
        function=adamw,
        compiled=(adamw_range, adamw_parallel),
        reference=reference.adamw,
        formula="p (1 - lr decay) - lr m' / (sqrt(v') + eps), with running means m of g and v of g^2",
        example=_example,
        flops=lambda n: 13.0 * n,
        bytes=lambda n: 28.0 * n,
        sizes=({"n": 4096}, {"n": 460800}),
    ),
]
