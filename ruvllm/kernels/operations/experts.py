"""Operations of a mixture of experts: route tokens, gather an expert's rows, combine what the experts return.

How many rows an expert gets is known only at replay: ``route`` writes it into the header, and the expert's own
operations read their number of rows from there. An expert without tokens costs one test per operation.
"""

import numpy as np

from ruvllm.kernels import experts
from ruvllm.kernels.jit.decorators import as_part, view_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.tape import (
    CAPACITY,
    TOKENS,
    address_of,
    matrix,
    operation,
    row_range,
)

route_tokens = as_part(experts.route_tokens)
add_weighted = as_part(experts.add_weighted)


def routing_bytes(k: int, count: int) -> int:
    """Bytes of a routing, for one token: expert, slot and weight of each choice; a place in each expert's list."""
    return (8 + 8 + 4) * k + 8 * count + 4 * (k % 2)  # padded to 8 bytes


@view_kernel
def _routing(m, operand, rows, k, count):
    """experts, slots and weights (rows, k) of each token, and each expert's tokens (count, capacity)."""
    capacity, start = m.header[CAPACITY], address_of(m, operand)
    chosen = array_at(start, (rows, k), np.int64)
    slots = array_at(start + capacity * 8 * k, (rows, k), np.int64)
    tokens = array_at(start + capacity * 16 * k, (count, capacity), np.int64)
    weights = array_at(start + capacity * (16 * k + 8 * count), (rows, k), np.float32)
    return chosen, slots, weights, tokens


@operation
def route(m, scores, routing, k, count, first):
    """routing = the k best of ``count`` experts by scores (rows, count). Member 0 does it all.

    The rows of each expert are counted in the header fields from ``first`` on.
    """
    if m.rank == 0:
        chosen, slots, weights, tokens = _routing(m, routing, m.rows, k, count)
        rows_each = m.header[first : first + count]
        route_tokens(matrix(m, scores, m.rows, count), chosen, slots, weights, tokens, rows_each)


@operation
def gather(m, x, routing, out, columns, expert, k, count):
    """out (rows, columns) = the rows of x (TOKENS, columns) that go to one expert."""
    lo, hi = row_range(m)
    total = m.header[TOKENS]
    _, _, _, tokens = _routing(m, routing, total, k, count)
    source, target = matrix(m, x, total, columns), matrix(m, out, m.rows, columns)
    for i in range(lo, hi):
        for j in range(columns):
            target[i, j] = source[tokens[expert, i], j]


@operation
def combine(m, parts, routing, out, columns, k, count, first):
    """out (rows, columns) = for each row the weighted sum of its experts' results; ``parts``: an operand of each."""
    lo, hi = row_range(m)
    chosen, slots, weights, _ = _routing(m, routing, m.rows, k, count)
    results, target = array_at(address_of(m, parts), count, np.int64), matrix(m, out, m.rows, columns)
    for i in range(lo, hi):
        for j in range(k):
            x = chosen[i, j]
            part = matrix(m, results[x], m.header[first + x], columns)
            add_weighted(part, slots[i, j], weights[i, j], target, i, j == 0)
