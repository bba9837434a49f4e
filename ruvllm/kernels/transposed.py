"""Packed weights transposed: dx = dy W, what a linear layer hands back to the layer before it (training).

Weights lie in panels of 16 rows of W, whatever their precision (see panels.py and quant.py). 32 columns at a time are
unpacked to float32, 16 x 16 numbers are turned over by four rounds of shuffles, and panels of W^T result, small enough
for the second-level cache, which the same tile multiplies as in the forward product. Integer weights count as
the numbers that they stand for; dy is not rounded.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels._simd import f16_to_f32, f32_load, f32_store, f32_zero, load, zip_high, zip_low
from ruvllm.kernels._threads import PARALLEL_MACS, launch, num_threads, threads_for
from ruvllm.kernels._tile import LANES, TILE, tile_times_panel, token_times_panel
from ruvllm.kernels._views import flat
from ruvllm.kernels.quant import GROUP, INT4, INT5, INT8

_BLOCK = LANES * LANES
_HALVES = GROUP // LANES
_ROWS = 512  # rows of W at a time: two panels of W^T, 64 KB
_SCALES = 2 * GROUP * LANES  # where scales and mins of 16 rows stand in the scratch, behind two times 32 x 16 numbers
_PANELS = _SCALES + 2 * LANES  # and where the panels of W^T begin
SCRATCH = _PANELS + _HALVES * _ROWS * LANES  # floats that one thread needs
_BYTE, _NIBBLE, _ONE = np.uint32(0xFF), np.uint32(0xF), np.uint32(1)
_ZERO4, _ZERO5 = np.float32(-8), np.float32(-16)  # times the scale: the min of symmetric weights


@inline_kernel
def _shuffle(source: Any, si: Any, target: Any, ti: Any) -> None:
    """One round: rows i and i + 8 of 16 are zipped into rows 2i and 2i + 1; four rounds transpose."""
    for i in range(LANES // 2):
        a, b = f32_load(source, si + i * LANES), f32_load(source, si + i * LANES + _BLOCK // 2)
        f32_store(target, ti + 2 * i * LANES, zip_low(a, b))
        f32_store(target, ti + (2 * i + 1) * LANES, zip_high(a, b))


@inline_kernel
def _transpose(scratch: Any, at: Any, to: Any) -> None:
    """The 16 x 16 numbers at ``at`` turned over, to ``to``; the block that lies 32 x 16 behind is used up."""
    other = at + GROUP * LANES
    _shuffle(scratch, at, scratch, other)
    _shuffle(scratch, other, scratch, at)
    _shuffle(scratch, at, scratch, other)
    _shuffle(scratch, other, scratch, to)


@inline_kernel
def _multiply(
    scratch: Any, dy: Any, dx: Any, tokens: Any, rows: Any, columns: Any, first: Any, n: Any, g: Any, add: Any
) -> None:
    """dx[:, 32 g:] (+)= dy[:, first : first + n] times the panels of W^T in the scratch."""
    tiled = tokens - tokens % TILE
    for half in range(_HALVES):
        column = g * GROUP + half * LANES
        wi, count = _PANELS + half * _ROWS * LANES, columns - column
        if count > 0:
            for t in range(0, tiled, TILE):
                tile_times_panel(
                    scratch, wi, LANES, dy, t * rows + first, rows, n, dx, t * columns + column, columns, count, add
                )
            for t in range(tiled, tokens):
                token_times_panel(scratch, wi, LANES, dy, t * rows + first, n, dx, t * columns + column, count, add)


@kernel(strict=True)
def transposed_float(w: Any, dy: Any, add: Any, dx: Any, scratch: Any, lo: Any, hi: Any) -> None:
    """dx (T, K) = dy (T, N) W, or dx += with ``add``, for columns 32 lo : 32 hi of W. w (P, K, 16) float panels."""
    tokens, rows = dy.shape
    columns = w.shape[1]
    panels, dys, dxs = flat(w), flat(dy), flat(dx)
    for g in range(lo, hi):
        here = min(GROUP, columns - g * GROUP)
        for first in range(0, rows, _ROWS):
            n = min(_ROWS, rows - first)
            for p in range(first // LANES, (first + n + LANES - 1) // LANES):
                at = (p * columns + g * GROUP) * LANES
                for c in range(here):
                    f32_store(scratch, c * LANES, load(panels, at + c * LANES))
                for c in range(here, GROUP):
                    f32_store(scratch, c * LANES, f32_zero())
                to = _PANELS + (p * LANES - first) * LANES
                for half in range(_HALVES):
                    _transpose(scratch, half * _BLOCK, to + half * _ROWS * LANES)
            _multiply(scratch, dys, dxs, tokens, rows, columns, first, n, g, add or first > 0)


@inline_kernel
def _unpack_group(kind: Any, quads: Any, at: Any, scratch: Any) -> None:
    """The 32 columns of a group of 16 rows to scratch[16 column + row]; scale and min of each row are at _SCALES.

    quads are uint32: four columns of a row. Inner loops run over the rows, 16 lanes of a vector.
    """
    for j in range(GROUP // 4):
        for c in range(4):
            to, shift = (4 * j + c) * LANES, np.uint32(8 * c)
            for r in range(LANES):
                if kind == INT8:
                    code = np.int32(np.uint32(quads[at + j * LANES + r] >> shift) & _BYTE)
                    code = code - np.int32((code & np.int32(128)) << np.int32(1))
                else:
                    word = quads[at + (j % 4) * LANES + r] >> (shift + np.uint32(4 * (j // 4)))
                    code = np.int32(np.uint32(word) & _NIBBLE)
                    if kind == INT5:
                        bit = np.uint32(quads[at + 4 * LANES + r] >> (shift + np.uint32(j))) & _ONE
                        code = code + np.int32(bit << np.uint32(4))
                scratch[to + r] = np.float32(code) * scratch[_SCALES + r] + scratch[_SCALES + LANES + r]


@kernel(strict=True)
def transposed_quant(
    kind: Any, has_mins: Any, words: Any, halfs: Any, dy: Any, add: Any, dx: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """transposed_float for 4, 5 or 8 bits: words and halfs are the blocks (P, G, ...) of quant.py in those units."""
    tokens, rows = dy.shape
    columns = dx.shape[1]
    groups, size = words.shape[1], words.shape[2]
    head = LANES // 2 * (2 if has_mins else 1)  # words of scales and mins before the codes
    codes, dys, dxs = flat(words), flat(dy), flat(dx)
    for g in range(lo, hi):
        for first in range(0, rows, _ROWS):
            n = min(_ROWS, rows - first)
            for p in range(first // LANES, (first + n + LANES - 1) // LANES):
                for r in range(LANES):
                    scale = f16_to_f32(halfs[p, g, r])
                    scratch[_SCALES + r] = scale
                    if has_mins:
                        scratch[_SCALES + LANES + r] = f16_to_f32(halfs[p, g, LANES + r])
                    elif kind == INT8:
                        scratch[_SCALES + LANES + r] = np.float32(0)
                    else:
                        scratch[_SCALES + LANES + r] = scale * (_ZERO4 if kind == INT4 else _ZERO5)
                at = (p * groups + g) * size + head
                if kind == INT4:
                    _unpack_group(INT4, codes, at, scratch)
                elif kind == INT5:
                    _unpack_group(INT5, codes, at, scratch)
                else:
                    _unpack_group(INT8, codes, at, scratch)
                to = _PANELS + (p * LANES - first) * LANES
                for half in range(_HALVES):
                    _transpose(scratch, half * _BLOCK, to + half * _ROWS * LANES)
            _multiply(scratch, dys, dxs, tokens, rows, columns, first, n, g, add or first > 0)


@parallel_kernel
def transposed_float_parallel(w: Any, dy: Any, add: Any, dx: Any, scratch: Any, threads: Any) -> None:
    """transposed_float with the columns of W split over threads; scratch (threads, SCRATCH)."""
    units = (dx.shape[1] + GROUP - 1) // GROUP
    for t in prange(threads):
        transposed_float(w, dy, add, dx, scratch[t], units * t // threads, units * (t + 1) // threads)


@parallel_kernel
def transposed_quant_parallel(
    kind: Any, has_mins: Any, words: Any, halfs: Any, dy: Any, add: Any, dx: Any, scratch: Any, threads: Any
) -> None:
    """transposed_quant with the columns of W split over threads; scratch (threads, SCRATCH)."""
    units = (dx.shape[1] + GROUP - 1) // GROUP
    for t in prange(threads):
        lo, hi = units * t // threads, units * (t + 1) // threads
        transposed_quant(kind, has_mins, words, halfs, dy, add, dx, scratch[t], lo, hi)


def linear_transposed(w: np.ndarray, dy: np.ndarray, dx: np.ndarray, add: bool = False) -> np.ndarray:
    """dx (T, K) = dy (T, N) W, or dx += with ``add``, for packed float weights w (ceil(N / 16), K, 16).

    For callers that own their buffers (``model.Linear``): sizes are theirs to guarantee.
    """
    units = -(-dx.shape[1] // GROUP)
    threads = threads_for(len(dy) * w.size, PARALLEL_MACS, units)
    if threads == 1:
        transposed_float(w, dy, add, dx, aligned_empty(SCRATCH), 0, units)
    else:
        launch(transposed_float_parallel, w, dy, add, dx, aligned_empty((num_threads(), SCRATCH)), threads)
    return dx


def quant_transposed(
    kind: int, has_mins: bool, blocks: np.ndarray, dy: np.ndarray, dx: np.ndarray, add: bool = False
) -> np.ndarray:
    """linear_transposed for panels of integers, see ``quant_panels.Panels``."""
    words, halfs = blocks.view(np.uint32), blocks.view(np.uint16)
    units = blocks.shape[1]
    threads = threads_for(len(dy) * dx.shape[1] * dy.shape[1], PARALLEL_MACS, units)
    if threads == 1:
        transposed_quant(kind, has_mins, words, halfs, dy, add, dx, aligned_empty(SCRATCH), 0, units)
    else:
        scratch = aligned_empty((num_threads(), SCRATCH))
        launch(transposed_quant_parallel, kind, has_mins, words, halfs, dy, add, dx, scratch, threads)
    return dx
