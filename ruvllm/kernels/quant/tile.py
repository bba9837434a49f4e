"""The micro-kernel of integer products: one or two panels of quantised weights times a few tokens, in registers.

quant/layout.py describes weights and activations. A tile is a tuple of accumulators, one for each panel and token:
those of all tokens for the first panel, then those for the second.
"""

from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.matmul.micro_kernels import DOT_PANELS
from ruvllm.kernels.quant.layout import GROUP, LINE, NO_ZERO, OFFSETS, SCALE_BYTES
from ruvllm.kernels.simd.vectors import (
    dot_rows,
    end_rows,
    f16_of,
    fma_panels,
    high_nibbles,
    lines_of,
    low_nibbles,
    offset_rows,
    prefetch_stream,
    scale_rows,
    sdot_rows,
    signed_offset_rows,
    start_rows,
    with_fifth_bit,
)


class Operands(NamedTuple):
    """Weights and activations of a product, flat.

    A panel is ``groups`` blocks of ``size`` bytes. A block of activations holds ``block_tokens`` tokens, whose codes of
    a group are ``step`` = GROUP apart.
    """

    has_mins: Any
    w: Any
    groups: Any
    size: Any
    xq: Any
    step: Any
    xs: Any
    offsets: Any
    totals: Any
    block_tokens: Any


# These compute sum((code - zero) xq) for the blocks ``offset`` bytes after those in the tuple ``at``, one for each
# panel, and for the tokens whose codes of the group are contiguous from index ``xi`` on, as many as ``tile`` has.


@inline_kernel
def dots_int4(p, at, offset, xi, tile):
    """The sums of 4-bit weights."""
    zero = offset_rows(p.offsets, xi * OFFSETS + (NO_ZERO if p.has_mins else 0), OFFSETS, at, tile)
    sums = start_rows(zero)
    q = xi * GROUP
    for j in range(p.step // 8):  # = 4; LLVM unrolls these loops only where p.step is a constant (see UNROLLS)
        lines = lines_of(p.w, at, offset + j * LINE)
        sums = dot_rows(sums, low_nibbles(lines), p.xq, q + 4 * j, p.step)
        sums = dot_rows(sums, high_nibbles(lines), p.xq, q + 4 * j + 16, p.step)
    return end_rows(sums, zero)


@inline_kernel
def _two_of_int5(p, at, offset, fifth, j, q, sums):
    """The sums plus the products of quads j and j + 4; ``fifth`` is the line of highest bits."""
    lines = lines_of(p.w, at, offset + j * LINE)
    sums = dot_rows(sums, with_fifth_bit(low_nibbles(lines), fifth, j), p.xq, q + 4 * j, p.step)
    return dot_rows(sums, with_fifth_bit(high_nibbles(lines), fifth, j + 4), p.xq, q + 4 * j + 16, p.step)


@inline_kernel
def dots_int5(p, at, offset, xi, tile):
    """The sums of 5-bit weights."""
    sums = offset_rows(p.offsets, xi * OFFSETS + (NO_ZERO if p.has_mins else 1), OFFSETS, at, tile)
    q = xi * GROUP
    fifth = lines_of(p.w, at, offset + 4 * LINE)
    if DOT_PANELS == 2:  # by hand: LLVM does not unroll so long a loop, and would shift by variable distances
        sums = _two_of_int5(p, at, offset, fifth, np.int64(0), q, sums)
        sums = _two_of_int5(p, at, offset, fifth, np.int64(1), q, sums)
        sums = _two_of_int5(p, at, offset, fifth, np.int64(2), q, sums)
        return _two_of_int5(p, at, offset, fifth, np.int64(3), q, sums)
    for half in range(0, 4, 2):  # in halves: no accumulator of any target overflows
        so_far = sums
        sums = start_rows(so_far)
        for j in range(half, half + p.step // 16):
            sums = _two_of_int5(p, at, offset, fifth, j, q, sums)
        sums = end_rows(sums, so_far)
    return sums


@inline_kernel
def dots_int8(p, at, offset, xi, tile):
    """The sums of 8-bit weights."""
    sums = signed_offset_rows(p.offsets, xi * OFFSETS, OFFSETS, at, tile)
    for j in range(p.step // 4):
        sums = sdot_rows(sums, lines_of(p.w, at, offset + j * LINE), p.xq, xi * GROUP + 4 * j, p.step)
    return sums


@inline_kernel
def add_block(dots, p, at, offset, xi, tile):
    """The tile plus its blocks of weights at ``offset`` times the group of activations at index ``xi``, in float32."""
    if p.has_mins:  # before the codes, as in memory, which is read fastest in order
        tile = fma_panels(f16_of(p.w, at, offset + SCALE_BYTES), p.totals, xi, tile)
    codes = offset + (2 * SCALE_BYTES if p.has_mins else SCALE_BYTES)
    sums = dots(p, at, codes, xi, tile)
    return scale_rows(tile, sums, f16_of(p.w, at, offset), p.xs, xi)


@inline_kernel
def prefetch_block(p, at, offset, size):
    """Prefetch ``size`` bytes of each panel, ``offset`` bytes after its block in ``at``."""
    for line in range(0, size, LINE):
        for i in range(len(at)):
            prefetch_stream(p.w, at[i] + offset + line)


if DOT_PANELS == 2:

    @inline_kernel
    def panels_from(p, apart, hi):
        """Panels p and p + apart; p twice, computed twice, if the other one is past the end."""
        return p, p + apart if p + apart < hi else p

    @inline_kernel
    def offsets_of(panels, size):
        """The offsets of panels of this size."""
        return panels[0] * size, panels[1] * size

else:

    @inline_kernel
    def panels_from(p, apart, hi):
        """Panel p."""
        return (p,)

    @inline_kernel
    def offsets_of(panels, size):
        """The offset of a panel of this size."""
        return (panels[0] * size,)
