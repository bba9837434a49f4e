"""Operations of a mixture of experts: route tokens, multiply each expert's rows by its weights, add the results up.

How many rows an expert has is known only at replay: ``route`` writes runs of rows (``kernels.experts``). A product
takes the runs one after the other: each member has a range of panels in each run, and one counter numbers the chunks of
all its runs, so that other members can steal them. Weights of experts without rows are not read.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels import experts
from ruvllm.kernels.experts import PADDED, RUN, Routing
from ruvllm.kernels.jit.decorators import as_part, inline_kernel, view_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.matmul.panels import panels_matmul_share, share_chunks
from ruvllm.kernels.operations.matmul import Stealing, member_share
from ruvllm.kernels.operations.rows import quantize_activations, quantized_rows
from ruvllm.kernels.quant.layout import GROUP, block_bytes
from ruvllm.kernels.quant.matmul import chunks_of, quant_matmul_part
from ruvllm.kernels.tape import CAPACITY, TOKENS, Operation, address_of, matrix, operation, row_range
from ruvllm.kernels.threads.team import part, share_after, take_chunk

route_tokens = as_part(experts.route_tokens)
combine_rows = as_part(experts.combine_rows)
sigmoid_scale_rows = as_part(experts.sigmoid_scale_rows)
_block_bytes = inline_kernel(block_bytes)


class Routed(NamedTuple):
    """Routed rows x, k for each token. ``alike``: there is one token, and x its one row, the same for all k experts."""

    x: Any
    routing: Any
    k: Any
    alike: Any


def routing_bytes(k: int) -> int:
    """Bytes of a ``Routing`` for one token: k entries each of its tokens, slots, runs and weights."""
    return (8 + 8 + 8 * RUN + 4) * k + 4 * (k % 2)  # padded to 8 bytes


@view_kernel
def _routing(m, operand, k):
    """An operand as a ``Routing``, with capacity for as many runs as routed rows."""
    tokens, capacity, start = m.header[TOKENS], m.header[CAPACITY] * k, address_of(m, operand)
    rows = tokens * k
    return Routing(
        array_at(start, rows, np.int64),
        array_at(start + capacity * 8, (tokens, k), np.int64),
        array_at(start + capacity * (16 + 8 * RUN), (tokens, k), np.float32),
        array_at(start + capacity * 16, (rows, np.int64(RUN)), np.int64),
    )


@operation
def route(m, scores, routing, k, count, normalised):
    """routing = the k best of ``count`` experts by scores (rows, count): by member 0, or by each if replicated."""
    if m.rank == 0 or m.replicated:
        route_tokens(matrix(m, scores, m.rows, count), normalised, _routing(m, routing, k))


@operation
def gather(m, x, routing, out, columns, k):
    """out (rows, columns) = the routed rows of x (TOKENS, columns)."""
    lo, hi = row_range(m)
    tokens = _routing(m, routing, k).tokens
    source, target = matrix(m, x, m.header[TOKENS], columns), matrix(m, out, m.rows, columns)
    for i in range(lo, hi):
        row, to = source[tokens[i]], target[i]
        for j in range(columns):
            to[j] = row[j]


@operation
def quantize_runs(m, x, routing, out, columns, k, gathers):
    """out = the routed rows of x rounded to 8 bits, each run in blocks of its own.

    gathers: x is (TOKENS, columns), of which routed rows are taken; else x has routed rows.
    """
    lo, hi = row_range(m)
    found = _routing(m, routing, k)
    source = matrix(m, x, m.header[TOKENS] if gathers else m.rows, columns)
    capacity, run, end = m.header[CAPACITY] * k * PADDED, 0, 0
    while end < m.rows:
        first, end = found.runs[run, 1], found.runs[run, 1] + found.runs[run, 2]
        rounded = quantized_rows(m, out, columns, capacity, found.runs[run, 3], first, end)
        for i in range(max(lo, first), min(hi, end)):
            t = found.tokens[i] if gathers else i
            quantize_activations(source, rounded, i - first - t, t, t + 1)
        run += 1


@view_kernel
def _weights_at(m, table, expert):
    """The address of an expert's weights, from a table of addresses."""
    return array_at(address_of(m, table) + 8 * expert, 1, np.int64)[0]


@cache
def grouped_integer_matmul(kind: int) -> Operation:
    """out (rows, outputs) = each routed row times the weights of its expert, all of one kind (quant/layout.py).

    weights: a table of addresses. Rows are rounded to 8 bits.
    """
    products = quant_matmul_part((kind,))

    @operation
    def grouped_integers(m, rows: Routed, weights, out, has_mins, outputs, columns, stealing: Stealing):
        panels, groups = (outputs + LANES - 1) // LANES, (columns + GROUP - 1) // GROUP
        shape = panels, groups, _block_bytes(np.int64(kind), has_mins)
        runs, result = _routing(m, rows.routing, rows.k).runs, matrix(m, out, m.rows, outputs)
        capacity = m.header[CAPACITY] if rows.alike else m.header[CAPACITY] * rows.k * PADDED
        for i in range(m.size if stealing.steal else 1):
            share = member_share(m, panels, stealing, i)
            chunk, before, run, end = take_chunk(share), np.int64(0), 0, 0
            while end < m.rows:
                first, end = runs[run, 1], runs[run, 1] + runs[run, 2]
                chunks = chunks_of(end - first, outputs, share)
                if chunk < chunks:
                    w = array_at(_weights_at(m, weights, runs[run, 0]), shape, np.uint8)
                    offset, row = (np.int64(0), np.int64(0)) if rows.alike else (runs[run, 3], first)
                    x = quantized_rows(m, rows.x, columns, capacity, offset, row, row + end - first)
                    left = share_after(share, before)
                    chunk = products(kind, has_mins, w, x, result[first:end], left, chunk)
                chunk, before = chunk - chunks, before + chunks
                run += 1

    return grouped_integers


@cache
def grouped_float_matmul(dtype: type) -> Operation:
    """out (rows, outputs) = each routed row times the weights of its expert, on panels of this dtype.

    weights: a table of addresses.
    """

    @operation
    def grouped_floats(m, rows: Routed, weights, out, outputs, columns, stealing: Stealing):
        panels = (outputs + LANES - 1) // LANES
        runs, result = _routing(m, rows.routing, rows.k).runs, matrix(m, out, m.rows, outputs)
        source = matrix(m, rows.x, np.int64(1) if rows.alike else m.rows, columns)
        for i in range(m.size if stealing.steal else 1):
            share = member_share(m, panels, stealing, i)
            chunk, before, run, end = take_chunk(share), np.int64(0), 0, 0
            while end < m.rows:
                first, end = runs[run, 1], runs[run, 1] + runs[run, 2]
                chunks, _ = share_chunks(end - first, share)
                if chunk < chunks:
                    w = array_at(_weights_at(m, weights, runs[run, 0]), (panels, columns, LANES), dtype)
                    row = np.int64(0) if rows.alike else first
                    x, left = source[row : row + end - first], share_after(share, before)
                    chunk = panels_matmul_share(w, x, result[first:end], left, chunk)
                chunk, before = chunk - chunks, before + chunks
                run += 1

    return grouped_floats


@operation
def add_grouped_bias(m, routing, biases, out, outputs, k):
    """Each routed row of out (rows, outputs) += its expert's bias, split by panels like the product before it.

    biases: a table of addresses.
    """
    lo, hi = part((outputs + LANES - 1) // LANES, m.rank, m.size)
    runs, result, run, end = _routing(m, routing, k).runs, matrix(m, out, m.rows, outputs), 0, 0
    while end < m.rows:
        first, end = runs[run, 1], runs[run, 1] + runs[run, 2]
        values = array_at(_weights_at(m, biases, runs[run, 0]), outputs, np.float32)
        for i in range(first, end):
            for j in range(lo * LANES, min(hi * LANES, outputs)):
                result[i, j] += values[j]
        run += 1


@operation
def combine(m, y, routing, out, columns, k):
    """out (rows, columns) = for each token the weighted sum of its routed rows of y (k rows each, columns)."""
    lo, hi = row_range(m)
    found = _routing(m, routing, k)
    source, target = matrix(m, y, m.rows * k, columns), matrix(m, out, m.rows, columns)
    combine_rows(source, found.slots, found.weights, target, lo, hi)


@operation
def sigmoid_scale(m, x, gate, out, columns):
    """out (rows, columns) = x / (1 + exp(-gate)), gate (rows, 1)."""
    lo, hi = row_range(m)
    gates, result = matrix(m, gate, m.rows, np.int64(1)), matrix(m, out, m.rows, columns)
    sigmoid_scale_rows(matrix(m, x, m.rows, columns), gates, result, lo, hi)
