"""Quantised matrices for your own code: pack them once, then multiply; and the rounding of activations by itself.

    w = pack_quantized(*quantize_int4(weights))  # once
    y = quant_matmul(x, w)                       # y ~ x weights^T

The models' linear layers run on the same kernels (``quant.matmul``), which say how the product is computed.
"""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.quant import activations, matmul
from ruvllm.kernels.quant.layout import GROUP, INT4, INT8, OFFSETS, OUTLIERS, Rounded, block_bytes, token_blocks
from ruvllm.kernels.quant.panels import Panels, empty_panels, pack_groups, take_quant_rows
from ruvllm.kernels.quant.weights import quantize_int4, quantize_int8
from ruvllm.kernels.spec import KernelSpec, grid


class QuantMatrix:
    """A matrix W (N, K) in 4 or 8 bits, packed as ``quant_matmul`` reads it; made by ``pack_quantized``.

    Args:
        panels: the packed groups.
        shape: (N, K).
    """

    def __init__(self, panels: Panels, shape: tuple[int, int]) -> None:
        self.panels, self.shape = panels, shape

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 8 if self.panels.kind == INT8 else 4

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and mins, with the padding to 16 rows and 32 columns."""
        return self.panels.nbytes

    def rows(self, ids: Any = None) -> np.ndarray:
        """Rows ``ids`` (T,), or all, as (T, K) float32.

        Raises:
            TypeError: ids are not integers.
            ValueError: there is no such row.
        """
        count = self.shape[0]
        ids = np.arange(count) if ids is None else check.integers("ids", ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < count:
            raise ValueError(f"ids: expected rows 0 to {count - 1}, found {ids.min()} to {ids.max()}")
        return take_quant_rows(self.panels, ids, np.empty((len(ids), self.shape[1]), np.float32))

    def __repr__(self) -> str:
        mins = ", mins" if self.panels.has_mins else ""
        return f"QuantMatrix({self.shape[0]} x {self.shape[1]}, {self.bits} bits{mins}, {self.nbytes:,} bytes)"


def pack_quantized(
    codes: Any, scales: Any, mins: np.ndarray | None = None, columns: int | None = None
) -> QuantMatrix:
    """A matrix in groups of 32, rearranged for ``quant_matmul``: 16 rows side by side, codes and scales in one stream.

    Args:
        codes: (N, 32 G): int8, or uint8 of 0..15, as ``quantize_int8`` and ``quantize_int4`` return them.
        scales: (N, G) uint16, bits of IEEE half floats.
        mins: (N, G) uint16, or None.
        columns: K, at most 32 G; 32 G if None.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not match, or codes of 4 bits above 15.
    """
    codes, scales = check.codes(codes, scales, GROUP)
    if codes.ndim != 2:
        raise ValueError(f"codes: expected a matrix, found shape {codes.shape}")
    if mins is not None:
        mins = check.bits("mins", mins, scales.shape)
    columns = check.columns(columns, scales.shape[1], GROUP)
    kind = INT8 if codes.dtype == np.int8 else INT4
    if kind == INT4 and codes.size and codes.max() > 15:
        raise ValueError(f"codes: expected 0 to 15, found {codes.max()}")
    panels = empty_panels(kind, len(codes), columns, mins is not None)
    pack_groups(codes, scales, mins, panels)
    return QuantMatrix(panels, (len(codes), columns))


def _rounded(x: np.ndarray) -> Rounded:
    """x (T, K) in 8 bits, laid out for the product."""
    tokens, groups = len(x), -(-x.shape[1] // GROUP)
    blocks, block_tokens = token_blocks(tokens)
    shape = blocks, groups, block_tokens
    to = Rounded(
        aligned_empty((*shape, GROUP), np.int8), aligned_empty(shape), aligned_empty((*shape, OFFSETS), np.int32),
        aligned_empty(shape), aligned_empty((tokens, OUTLIERS, 2)),
    )  # fmt: skip
    activations.round_activations(x, to)
    return to


def quantize_activations(x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """code = round(x / scale), scale = max|x| / 127 of its group of 32, without the four largest of a row.

    Those four outliers are kept in float32, and their codes are 0. This is what ``quant_matmul`` does with x.

    Args:
        x: (..., K) float32. A last group shorter than 32 is padded with zeros. Outliers are sought in the first 65536
            columns.

    Returns:
        codes (..., 32 G) int8 of -127..127; scales (..., G) float32; outliers (..., 4, 2) float32, pairs of column and
        x in the order of columns, (0, 0) where a row has fewer elements that are not 0. NaN or infinity in a group
        makes its scale NaN.

    Raises:
        TypeError: ``x`` is not a float32 array.
        ValueError: ``x`` is zero-dimensional.

    Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale".
    """
    x = check.float32("x", x, min_ndim=1)
    lead, columns = x.shape[:-1], x.shape[-1]
    groups = -(-columns // GROUP)
    if not x.size:
        outliers = np.zeros((*lead, OUTLIERS, 2), np.float32)
        return np.zeros((*lead, groups * GROUP), np.int8), np.zeros((*lead, groups), np.float32), outliers
    rows = check.rows(x)
    to = _rounded(rows)
    codes, scales = (np.moveaxis(a, 2, 1).reshape(-1, *a.shape[1:2], *a.shape[3:])[: len(rows)] for a in (to.xq, to.xs))
    return codes.reshape(*lead, -1), scales.reshape(*lead, groups), to.outliers.reshape(*lead, OUTLIERS, 2)


def quant_matmul(x: Any, w: QuantMatrix, out: np.ndarray | None = None) -> np.ndarray:
    """y = x W^T with W in 4 or 8 bits; x is rounded to 8 bits, except the four largest of each row.

    Products and sums within a group of 32 are of integers, and exact; groups are added in float32, in one order: the
    bits are the same for any number of threads and on every processor.

    Args:
        x: (..., K) float32.
        w: (N, K), from ``pack_quantized``.
        out: (..., N) float32 to write into; not an input.

    Returns:
        (..., N) float32.

    Raises:
        TypeError: ``x`` is not a float32 array, or ``w`` not a QuantMatrix.
        ValueError: shapes do not match.
    """
    if not isinstance(w, QuantMatrix):
        raise TypeError(f"w: expected a QuantMatrix, from pack_quantized, found {type(w).__name__}")
    if check.is_half(out):
        return check.rounded(out, quant_matmul, x, w)
    x = check.float32("x", x, min_ndim=1)
    rows, columns = w.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x: expected rows of {columns}, found shape {x.shape}")
    out = check.apart("out", check.output("out", out, (*x.shape[:-1], rows)), x)
    if out.size and columns:
        matmul.linear_quant(w.panels, _rounded(check.rows(x)), out.reshape(-1, rows))
    else:
        out[...] = 0
    return out


def _weights(rng: np.random.Generator, n: int, k: int, bits: int) -> QuantMatrix:
    w = rng.standard_normal((n, k), np.float32)
    codes, scales = quantize_int8(w) if bits == 8 else quantize_int4(w)[:2]
    return pack_quantized(codes, scales, columns=k)


def _product(rng: np.random.Generator, tokens: int, n: int, k: int, bits: int) -> dict[str, Any]:
    return {"x": rng.standard_normal((tokens, k), np.float32), "w": _weights(rng, n, k, bits)}


SPECS = [
    KernelSpec(
        name="quantize_activations",
        function=quantize_activations,
        compiled=(activations.quantize_activations, activations.quantize_activations_parallel),
        reference=reference.quantize_activations,
        formula="round(x / scale), scale = max|x| / 127 of 32, four outliers of a row apart",
        example=lambda rng, rows, n: {"x": rng.standard_normal((rows, n), np.float32)},
        flops=lambda rows, n: 4.0 * rows * n,
        bytes=lambda rows, n: (5.0 + 4 / GROUP) * rows * n,
        sizes=({"rows": 1, "n": 4096}, {"rows": 64, "n": 576}, {"rows": 64, "n": 4096}),
        tolerance=1e-6,  # ties that float32 and float64 round differently
    ),
    KernelSpec(
        name="quant_matmul",
        function=quant_matmul,
        compiled=(matmul.quant_matmul, matmul.quant_matmul_parallel),
        reference=reference.quant_matmul,
        formula="x W^T, W in groups of 32 codes with a scale",
        example=_product,
        flops=lambda tokens, n, k, bits: 2.0 * tokens * n * k,
        bytes=lambda tokens, n, k, bits: n * k / GROUP * block_bytes(INT8 if bits == 8 else INT4, False) / 16
        + 4.0 * tokens * (n + k),
        sizes=(
            {"tokens": 1, "n": 576, "k": 576, "bits": 4},
            *grid(tokens=(1, 4, 64), n=2048, k=2048, bits=(4, 8)),
            {"tokens": 1, "n": 4096, "k": 4096, "bits": 4},
        ),
        tolerance=1e-6,  # ties of activations, as above
    ),
]
