"""Packed weights transposed: dx = dy W, the gradient of a linear layer's input (training).

Weights lie in panels of 16 rows of W, whatever their precision (matmul/panels.py, quant/layout.py): 16 rows of one
column are a vector. So columns are dequantised to float32 in that order, and dy is transposed: its tokens become the
lanes, and dx^T = W^T dy^T is a tile of some columns of W against one or two panels of 16 tokens. The results are
transposed back when they are added to dx. dy is not rounded.
"""

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES, WIDE, put
from ruvllm.kernels.memory import scratch
from ruvllm.kernels.quant.layout import GROUP, INT4, INT5, INT8, LINE, SCALE_BYTES
from ruvllm.kernels.quant.panels import Panels
from ruvllm.kernels.simd.vectors import (
    bytes_to_f32,
    f16_load,
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    f32_zeros,
    fma,
    fma_rows,
    high_nibbles,
    load,
    load_rows,
    low_nibbles,
    splat,
    store_rows,
    u8_load,
    with_fifth_bit,
    zip_rows,
)
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, num_threads, threads_for

# Columns of a tile, which divide GROUP, and panels of tokens at a time, by the target's registers: see matmul/tile.py.
_COLUMNS, _PAIRS = (8, True) if WIDE else (4, False)
_ROWS = 512  # rows of W at a time
_TOKENS = 128  # tokens at a time: their dy^T, 256 KB, stays in the L2 cache
_STEP = _ROWS + LANES  # stride of the columns of W: they begin at different offsets in a page, so in other L1 sets
# Offsets in the scratch: columns of W, panels of dy^T, and blocks to be transposed.
_WEIGHTS = 0
_PANELS = _WEIGHTS + GROUP * _STEP
_STAGE = _PANELS + _TOKENS * _ROWS
SCRATCH = _STAGE + _TOKENS * GROUP  # floats per thread
_ZERO4, _ZERO5 = np.float32(-8), np.float32(-16)  # times the scale: the min of symmetric weights


@inline_kernel
def _transpose(scratch, at, to):
    """Transpose the 16 x 16 block at ``at`` to ``to``."""
    rows = load_rows(scratch, at, LANES, LANES)
    store_rows(scratch, to, LANES, zip_rows(zip_rows(zip_rows(zip_rows(rows)))))


@inline_kernel
def _transpose_dy(dy, rows, first, n, t, tokens, scratch, to):
    """scratch[to + 16 r + j] = dy[t + j, first + r] for r < n; tokens past the end are zero."""
    for r in range(0, n, LANES):
        for j in range(LANES):
            row, at = f32_zero(), (t + j) * rows + first + r
            if t + j < tokens:
                row = f32_load(dy, at) if r + LANES <= n else f32_load_first(dy, at, n - r)
            f32_store(scratch, _STAGE + j * LANES, row)
        _transpose(scratch, _STAGE, to + r * LANES)


@inline_kernel
def _columns_times_two(zeros, scratch, wi, at, other, n, to):
    """Columns of W at ``wi`` times the panels of dy^T at ``at`` and ``other``: sums at ``to``, and GROUP vectors on."""
    left = right = zeros
    for r in range(n):
        left = fma_rows(load(scratch, at + r * LANES), scratch, wi + r, _STEP, left)
        right = fma_rows(load(scratch, other + r * LANES), scratch, wi + r, _STEP, right)
    store_rows(scratch, to, LANES, left)
    store_rows(scratch, to + GROUP * LANES, LANES, right)


@inline_kernel
def _columns_times_one(zeros, scratch, wi, at, n, to):
    """_columns_times_two for one panel."""
    sums = zeros
    for r in range(n):
        sums = fma_rows(load(scratch, at + r * LANES), scratch, wi + r, _STEP, sums)
    store_rows(scratch, to, LANES, sums)


@inline_kernel
def _put_transposed(scratch, at, dx, columns, column, t, tokens, add):
    """dx[t : t + 16, column : column + 32] (+)= the group of sums at ``at``, within the bounds of dx."""
    for half in range(0, GROUP, LANES):
        _transpose(scratch, at + half * LANES, at + half * LANES)
        count = columns - column - half
        for j in range(min(LANES, tokens - t) if count > 0 else 0):
            put(dx, (t + j) * columns + column + half, f32_load(scratch, at + half * LANES + j * LANES), count, add)


@inline_kernel
def _multiply(scratch, n, dx, columns, g, start, tokens, add):
    """dx[start : start + _TOKENS, 32 g : 32 g + 32] (+)= the columns times the panels, both in the scratch buffer."""
    panels = (min(_TOKENS, tokens - start) + LANES - 1) // LANES
    paired = panels - panels % 2 if _PAIRS else 0
    for c in range(0, GROUP, _COLUMNS):
        wi, to = _WEIGHTS + c * _STEP, _STAGE + c * LANES
        for p in range(0, paired, 2):
            at = _PANELS + p * LANES * _ROWS
            _columns_times_two(f32_zeros(_COLUMNS), scratch, wi, at, at + LANES * _ROWS, n, to + p * GROUP * LANES)
        for p in range(paired, panels):
            at = _PANELS + p * LANES * _ROWS
            _columns_times_one(f32_zeros(_COLUMNS), scratch, wi, at, n, to + p * GROUP * LANES)
    for p in range(panels):
        _put_transposed(scratch, _STAGE + p * GROUP * LANES, dx, columns, g * GROUP, start + p * LANES, tokens, add)


@kernel(strict=True)
def transposed_float(w, dy, add, dx, scratch, lo, hi):
    """dx (T, K) = dy (T, N) W, or dx += with ``add``, for columns 32 lo : 32 hi of W. w (P, K, 16) float panels."""
    tokens, rows = dy.shape
    columns = w.shape[1]
    panels, dys, dxs = flat(w), flat(dy), flat(dx)
    for start in range(0, tokens, _TOKENS):
        for first in range(0, rows, _ROWS):
            n = min(_ROWS, rows - first)
            for t in range(start, min(start + _TOKENS, tokens), LANES):
                _transpose_dy(dys, rows, first, n, t, tokens, scratch, _PANELS + (t - start) * _ROWS)
            for g in range(lo, hi):
                for p in range(first // LANES, (first + n + LANES - 1) // LANES):
                    at, to = (p * columns + g * GROUP) * LANES, _WEIGHTS + p * LANES - first
                    for c in range(min(GROUP, columns - g * GROUP)):
                        f32_store(scratch, to + c * _STEP, load(panels, at + c * LANES))
                _multiply(scratch, n, dxs, columns, g, start, tokens, add or first > 0)


@inline_kernel
def _unpack_group(kind, has_mins, blocks, at, scratch, to):
    """The block at byte ``at``, 32 columns of 16 rows: scratch[to + column _STEP + row]."""
    scale = f16_load(blocks, at)
    if has_mins:
        low = f16_load(blocks, at + SCALE_BYTES)
    elif kind == INT8:
        low = f32_zero()
    else:
        low = scale * splat(_ZERO4 if kind == INT4 else _ZERO5)
    at += 2 * SCALE_BYTES if has_mins else SCALE_BYTES
    for j in range(GROUP // 4):
        line = u8_load(blocks, at + (j if kind == INT8 else j % 4) * LINE)
        if kind != INT8:
            line = low_nibbles(line) if j < 4 else high_nibbles(line)
        if kind == INT5:
            line = with_fifth_bit(line, u8_load(blocks, at + 4 * LINE), j)
        for c in range(4):
            f32_store(scratch, to + (4 * j + c) * _STEP, fma(bytes_to_f32(line, c), scale, low))


@kernel(strict=True)
def transposed_quant(w, dy, add, dx, scratch, lo, hi):
    """transposed_float for weights of 4, 5 or 8 bits: quantised ``Panels``."""
    kind, has_mins, blocks = w
    tokens, rows = dy.shape
    columns = dx.shape[1]
    groups, size = blocks.shape[1], blocks.shape[2]
    codes, dys, dxs = flat(blocks), flat(dy), flat(dx)
    for start in range(0, tokens, _TOKENS):
        for first in range(0, rows, _ROWS):
            n = min(_ROWS, rows - first)
            for t in range(start, min(start + _TOKENS, tokens), LANES):
                _transpose_dy(dys, rows, first, n, t, tokens, scratch, _PANELS + (t - start) * _ROWS)
            for g in range(lo, hi):
                for p in range(first // LANES, (first + n + LANES - 1) // LANES):
                    at, to = (p * groups + g) * size, _WEIGHTS + p * LANES - first
                    if kind == INT4:
                        _unpack_group(INT4, has_mins, codes, at, scratch, to)
                    elif kind == INT5:
                        _unpack_group(INT5, has_mins, codes, at, scratch, to)
                    else:
                        _unpack_group(INT8, has_mins, codes, at, scratch, to)
                _multiply(scratch, n, dxs, columns, g, start, tokens, add or first > 0)


@parallel_kernel
def transposed_float_parallel(w, dy, add, dx, scratch, threads):
    """transposed_float with the columns of W split over threads; scratch (threads, SCRATCH)."""
    units = (dx.shape[1] + GROUP - 1) // GROUP
    for t in prange(threads):
        transposed_float(w, dy, add, dx, scratch[t], units * t // threads, units * (t + 1) // threads)


@parallel_kernel
def transposed_quant_parallel(w, dy, add, dx, scratch, threads):
    """transposed_quant with the columns of W split over threads; scratch (threads, SCRATCH)."""
    units = (dx.shape[1] + GROUP - 1) // GROUP
    for t in prange(threads):
        transposed_quant(w, dy, add, dx, scratch[t], units * t // threads, units * (t + 1) // threads)


def _scratch_of_all() -> np.ndarray:
    return scratch(num_threads() * SCRATCH).reshape(-1, SCRATCH)


def linear_transposed(w: np.ndarray, dy: np.ndarray, dx: np.ndarray, add: bool = False) -> np.ndarray:
    """dx (T, K) = dy (T, N) W, or dx += with ``add``, for packed float weights w (ceil(N / 16), K, 16).

    For callers that own their buffers (``model.Linear``) and guarantee their sizes.
    """
    units = -(-dx.shape[1] // GROUP)
    threads = threads_for(len(dy) * w.size, PARALLEL_MACS, units)
    if threads == 1:
        transposed_float(w, dy, add, dx, scratch(SCRATCH), 0, units)
    else:
        launch(transposed_float_parallel, w, dy, add, dx, _scratch_of_all(), threads)
    return dx


def quant_transposed(w: Panels, dy: np.ndarray, dx: np.ndarray, add: bool = False) -> np.ndarray:
    """linear_transposed for quantised weights."""
    units = w.blocks.shape[1]
    threads = threads_for(len(dy) * dx.shape[1] * dy.shape[1], PARALLEL_MACS, units)
    if threads == 1:
        transposed_quant(w, dy, add, dx, scratch(SCRATCH), 0, units)
    else:
        launch(transposed_quant_parallel, w, dy, add, dx, _scratch_of_all(), threads)
    return dx
