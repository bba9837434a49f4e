"""Operations on rows: norms, activations, rotary embedding, rounding to 8 bits, copies."""

import numpy as np

from ruvllm.kernels import activation, bounded, vector
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, view_kernel
from ruvllm.kernels.jit.views import array_at, flat
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.norm import rms_norm_part
from ruvllm.kernels.quant import activations as rounding
from ruvllm.kernels.quant.layout import GROUP, OFFSETS, OUTLIERS, Rounded, token_blocks
from ruvllm.kernels.rope import rotate as rotary
from ruvllm.kernels.tape import (
    CAPACITY,
    CHOSEN,
    ROPE_PAIRS,
    TOKENS,
    address_for,
    address_of,
    matrix,
    number,
    operation,
    row_range,
)
from ruvllm.kernels.threads.team import part

rope_rows = as_part(rotary.rope_rows)
quantize_activations = as_part(rounding.quantize_activations)
silu_mul_range = as_part(activation.silu_mul_range)
gelu_mul_range = as_part(activation.gelu_mul_range)
add_range = as_part(vector.add_range)
scale_range = as_part(vector.scale_range)
clamped_swiglu_range = as_part(bounded.clamped_swiglu_range)
softcap_range = as_part(bounded.softcap_range)
_token_blocks = inline_kernel(token_blocks)

QUANTIZED_GROUP_BYTES = GROUP + 4 + 4 + 4 * OFFSETS  # codes, scale, total and offsets of one group of one row
QUANTIZED_ROW_BYTES = 4 * 2 * OUTLIERS  # outliers of one row


@operation
def broadcast(m, x, columns):
    """Copy x (rows, columns) from member 0's copy to this member's: for members that start their replay here."""
    if m.rank:
        size = m.rows * columns
        source = array_at(address_for(m, x, np.int64(0)), size, np.float32)
        target = array_at(address_of(m, x), size, np.float32)
        for i in range(size):
            target[i] = source[i]


@operation
def last_rows(m, x, out, columns):
    """out (rows, columns) = the last rows of x (TOKENS, columns)."""
    tokens = m.header[TOKENS]
    source, target = matrix(m, x, tokens, columns), matrix(m, out, m.rows, columns)
    lo, hi = row_range(m)
    for i in range(lo, hi):
        for j in range(columns):
            target[i, j] = source[tokens - m.rows + i, j]


@operation
def chosen_rows(m, x, out, columns):
    """out (rows, columns) = the rows of x (TOKENS, columns) that CHOSEN lists."""
    source, target = matrix(m, x, m.header[TOKENS], columns), matrix(m, out, m.rows, columns)
    chosen = array_at(address_of(m, np.int64(CHOSEN)), m.rows, np.int64)
    lo, hi = row_range(m)
    for i in range(lo, hi):
        for j in range(columns):
            target[i, j] = source[chosen[i], j]


@operation
def rms_norm(m, x, weight, eps, out, columns, vectors):
    """out = rms_norm(x) * weight over each of the ``vectors`` vectors (columns,) of a row."""
    lo, hi = row_range(m)
    rows_in, rows_out = matrix(m, x, m.rows * vectors, columns), matrix(m, out, m.rows * vectors, columns)
    scale = array_at(address_of(m, weight), columns, np.float32)
    rms_norm_part(rows_in, scale, number(m, eps), rows_out, lo * vectors, hi * vectors)


@view_kernel
def _elements(m, operand, columns):
    return flat(matrix(m, operand, m.rows, columns))


@operation
def add(m, a, b, out, columns):
    """out (rows, columns) = a + b."""
    lo, hi = row_range(m)
    first, second, result = _elements(m, a, columns), _elements(m, b, columns), _elements(m, out, columns)
    add_range(first, second, result, lo * columns, hi * columns)


@operation
def silu_mul(m, gate, up, out, columns):
    """out (rows, columns) = silu(gate) * up."""
    lo, hi = row_range(m)
    first, second, result = _elements(m, gate, columns), _elements(m, up, columns), _elements(m, out, columns)
    silu_mul_range(first, second, result, lo * columns, hi * columns)


@operation
def gelu_mul(m, gate, up, out, columns):
    """out (rows, columns) = gelu(gate) * up."""
    lo, hi = row_range(m)
    first, second, result = _elements(m, gate, columns), _elements(m, up, columns), _elements(m, out, columns)
    gelu_mul_range(first, second, result, lo * columns, hi * columns)


@operation
def clamped_swiglu(m, gate, up, limit, alpha, out, columns):
    """out (rows, columns) = the clamped SwiGLU of gate and up."""
    lo, hi = row_range(m)
    first, second, result = _elements(m, gate, columns), _elements(m, up, columns), _elements(m, out, columns)
    clamped_swiglu_range(first, second, number(m, limit), number(m, alpha), result, lo * columns, hi * columns)


@operation
def scale(m, x, factor, out, columns):
    """out (rows, columns) = factor * x."""
    lo, hi = row_range(m)
    scale_range(_elements(m, x, columns), number(m, factor), _elements(m, out, columns), lo * columns, hi * columns)


@operation
def softcap(m, x, cap, columns):
    """x (rows, columns) = cap tanh(x / cap), split over members by panels: logits have few, but long rows."""
    lo, hi = part((columns + LANES - 1) // LANES, m.rank, m.size)
    rows = matrix(m, x, m.rows, columns)
    for i in range(m.rows):
        softcap_range(rows[i], number(m, cap), rows[i], lo * LANES, min(hi * LANES, columns))


@operation
def rope(m, x, cos, sin, out, heads, dim):
    """out (rows, heads, dim) = x rotated by the angles whose cosines and sines are (rows, ROPE_PAIRS)."""
    lo, hi = row_range(m)
    source = array_at(address_of(m, x), (m.rows, heads, dim), np.float32)
    target = array_at(address_of(m, out), (m.rows, heads, dim), np.float32)
    pairs = m.header[ROPE_PAIRS]
    cosines, sines = matrix(m, cos, m.rows, pairs), matrix(m, sin, m.rows, pairs)
    rope_rows(source, cosines, sines, np.float32(1), target, lo * heads, hi * heads)


@view_kernel
def quantized(m, operand, columns):
    """An operand as rows rounded to 8 bits (quant/layout.py)."""
    return quantized_rows(m, operand, columns, m.header[CAPACITY], np.int64(0), np.int64(0), m.rows)


@view_kernel
def quantized_rows(m, operand, columns, capacity, offset, lo, hi):
    """Rows lo:hi of an operand in 8 bits, in token blocks of their own, which begin ``offset`` rows into the arrays.

    The five arrays follow each other, each with capacity for ``capacity`` rows; that of outliers is by row.
    """
    groups = (columns + GROUP - 1) // GROUP
    blocks, block_tokens = _token_blocks(hi - lo)
    first, all_groups = offset * groups, capacity * groups
    codes = address_of(m, operand)
    offsets = codes + all_groups * GROUP
    scales = offsets + all_groups * 4 * OFFSETS
    totals = scales + all_groups * 4
    outliers = totals + all_groups * 4
    return Rounded(
        array_at(codes + first * GROUP, (blocks, groups, block_tokens, GROUP), np.int8),
        array_at(scales + first * 4, (blocks, groups, block_tokens), np.float32),
        array_at(offsets + first * 4 * OFFSETS, (blocks, groups, block_tokens, OFFSETS), np.int32),
        array_at(totals + first * 4, (blocks, groups, block_tokens), np.float32),
        array_at(outliers + lo * 4 * 2 * OUTLIERS, (hi - lo, OUTLIERS, 2), np.float32),
    )


@operation
def quantize(m, x, out, columns):
    """out = x (rows, columns) rounded to 8 bits."""
    lo, hi = row_range(m)
    quantize_activations(matrix(m, x, m.rows, columns), quantized(m, out, columns), np.int64(0), lo, hi)
