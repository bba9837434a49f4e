"""Products of groups of rows, each with a matrix of its own: the experts of a mixture."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.matmul.gemm import gemm_parallel, gemm_part
from ruvllm.kernels.matmul.public import multiply
from ruvllm.kernels.spec import KernelSpec


def grouped_gemm(
    a: np.ndarray, b: np.ndarray, sizes: Any, transposed: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """C[r] = A[r] B[i] for the rows r of group i: rows sorted by expert, times the matrix of their expert.

    Args:
        a: (M, K) float32. The first sizes[0] rows are group 0, the next sizes[1] group 1, and so on.
        b: (X, K, N) float32, or (X, N, K) if transposed, as the weights of X linear layers lie.
        sizes: (X,) integers >= 0 whose sum is M.
        transposed: multiply by B[i]^T.
        out: (M, N) float32 to write into; not an input.

    Returns:
        (M, N) float32. A row's bits do not depend on the rows of other groups.

    Raises:
        TypeError: not float32, or sizes that are not integers.
        ValueError: shapes do not match, or sizes do not add up.

    Source: Gale et al. 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts".
    """
    if check.is_half(out):
        return check.rounded(out, grouped_gemm, a, b, sizes, transposed)
    a = check.float32("a", a, ndim=2)
    rows, inner = a.shape
    transposed = check.flag("transposed", transposed)
    b = check.float32("b", b, shape=(None, None, inner) if transposed else (None, inner, None))
    sizes = check.integers("sizes", sizes)
    if sizes.size != len(b) or (sizes.size and sizes.min() < 0) or sizes.sum() != rows:
        found = f"{sizes.size} sizes with sum {sizes.sum()}"
        raise ValueError(f"sizes: expected {len(b)}, each >= 0, that add up to {rows}, found {found}")
    out = check.apart("out", check.output("out", out, (rows, b.shape[1 if transposed else 2])), a, b)
    first = 0
    for matrix, size in zip(b, sizes.tolist(), strict=True):
        if size:
            multiply(a[first : first + size], matrix, transposed, out[first : first + size])
        first += size
    return out


def _groups_of_rows(rng: Any, m: int, experts: int, n: int, k: int) -> dict[str, Any]:
    return {
        "a": rng.standard_normal((m, k), np.float32),
        "b": rng.standard_normal((experts, k, n), np.float32),
        "sizes": rng.multinomial(m, np.full(experts, 1 / experts)),
    }


SPECS = [
    KernelSpec(
        name="grouped_gemm",
        function=grouped_gemm,
        compiled=(gemm_part, gemm_parallel),
        reference=reference.grouped_gemm,
        formula="A[r] B[i], rows r of group i",
        example=_groups_of_rows,
        flops=lambda m, experts, n, k: 2.0 * m * n * k,
        bytes=lambda m, experts, n, k: 4.0 * (m * k + experts * k * n + m * n),
        sizes=({"m": 64, "experts": 4, "n": 64, "k": 64}, {"m": 256, "experts": 8, "n": 768, "k": 256}),
    ),
]
