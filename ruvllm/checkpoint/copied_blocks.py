"""Packing of block types whose codes have the same order in a file as in panels: whole words of four codes are moved.

A block of Q4_0, Q4_1 or Q8_0 is a scale, perhaps a min, and 16 or 32 bytes of codes. Its word j is the word of its row
in line j of a panel's block (``kernels.quant.layout``): in both, a byte of Q4_0 has codes i and i + 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.quant.panels import Panels

# Storage type -> 16-bit floats before its codes. Their panels are int4, int4 with mins, and int8.
_HEADS = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1}
COPIED = frozenset(_HEADS)

_HALF = np.uint32(16)
_INFINITE_BITS = np.uint16(0x7C00)


@kernel(strict=True)
def copy_block_rows(raw: Any, size: Any, head: Any, words: Any, halves: Any, lo: Any, hi: Any) -> Any:
    """Panels lo:hi of rows of blocks, raw (n, size G) uint16, of which the first ``head`` are scale and min.

    words, halves: the panels (P, G, ...) as uint32 and as uint16. Rows past n become zeros. Returns whether all scales
    and mins are finite.
    """
    count, groups = raw.shape[0], words.shape[1]
    quads = (size - head) // 8  # of lines
    start = head * LANES // 2  # words of scales and mins, before the codes
    infinite = False
    for p in range(lo, hi):
        first = p * LANES
        rows = min(LANES, count - first)
        for g in range(groups):
            to, scaling = words[p, g, start:], halves[p, g]
            for r in range(rows):
                x = raw[first + r, g * size : g * size + size]
                scaling[r] = x[0]
                infinite |= (x[0] & _INFINITE_BITS) == _INFINITE_BITS
                if head == 2:
                    scaling[LANES + r] = x[1]
                    infinite |= (x[1] & _INFINITE_BITS) == _INFINITE_BITS
                for q in range(quads):  # in slices of known length: Numba then asks for no negative index
                    codes, lines = x[head + 8 * q : head + 8 * q + 8], to[64 * q + r : 64 * q + r + 49]
                    lines[0] = np.uint32(codes[0]) | (np.uint32(codes[1]) << _HALF)
                    lines[16] = np.uint32(codes[2]) | (np.uint32(codes[3]) << _HALF)
                    lines[32] = np.uint32(codes[4]) | (np.uint32(codes[5]) << _HALF)
                    lines[48] = np.uint32(codes[6]) | (np.uint32(codes[7]) << _HALF)
            for r in range(rows, LANES):
                for i in range(head):
                    scaling[i * LANES + r] = 0
                for j in range(4 * quads):
                    to[j * LANES + r] = 0
    return not infinite


def copy_blocks(dtype: str, raw: np.ndarray, to: Panels) -> bool:
    """Pack stored rows (n, bytes) uint8 of a type of COPIED into the panels of these rows.

    Returns whether all scales and mins are finite.
    """
    stored, blocks = raw.view(np.uint16), to.blocks
    words, halves = blocks.view(np.uint32), blocks.view(np.uint16)
    size = stored.shape[1] // blocks.shape[1]
    return bool(copy_block_rows(stored, size, _HEADS[dtype], words, halves, 0, len(blocks)))
