"""Operations of linear layers: products with integer or float weights, biases, low-rank adapters.

A member computes a range of panels (16 outputs each) for all rows. Its share is cut into chunks, and a member that
finishes early steals chunks from the others (``threads.team``).
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import as_part, inline_kernel, view_kernel
from ruvllm.kernels.jit.views import array_at
from ruvllm.kernels.lora import packed as low_rank
from ruvllm.kernels.lora.packed import PARTS, join_parts
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.matmul.panels import panels_matmul_part, panels_matmul_share
from ruvllm.kernels.operations.rows import quantized
from ruvllm.kernels.quant.layout import GROUP, block_bytes
from ruvllm.kernels.quant.matmul import quant_matmul_part
from ruvllm.kernels.tape import SYNC, SYNC_SIZE, Operation, address_of, matrix, operation, row_range
from ruvllm.kernels.threads.team import counter_of, part, share_of, take_chunk

low_rank_down = as_part(low_rank.low_rank_down)
low_rank_down_parts = as_part(low_rank.low_rank_down_parts)
low_rank_up = as_part(low_rank.low_rank_up)
_block_bytes = inline_kernel(block_bytes)


class Adapted(NamedTuple):
    """An adapter's up matrix (outputs, rank) in panels."""

    weights: Any
    outputs: Any
    rank: Any


class Stealing(NamedTuple):
    """Whether members steal chunks of this operation; if so, ``counter`` is the number of its chunk counter."""

    counter: Any
    steal: Any


@view_kernel
def member_share(m, items, stealing, i):
    """The share of ``items`` of the i-th member after this one: this member's own for i = 0, others' to steal from."""
    sync, member = array_at(m.header[SYNC], m.header[SYNC_SIZE], np.int64), (m.rank + i) % m.size
    return share_of(items, sync, counter_of(sync, m.rank, member, stealing.counter), member, m.size)


@cache
def integer_matmul(kind: int) -> Operation:
    """out (rows, outputs) = x W^T, W of one kind (quant/layout.py); x (rows, columns) is already rounded to 8 bits."""
    products = quant_matmul_part((kind,))

    @operation
    def integers(m, x, weights, out, has_mins, outputs, columns, stealing: Stealing):
        panels, groups = (outputs + LANES - 1) // LANES, (columns + GROUP - 1) // GROUP
        w = array_at(address_of(m, weights), (panels, groups, _block_bytes(np.int64(kind), has_mins)), np.uint8)
        rounded, result = quantized(m, x, columns), matrix(m, out, m.rows, outputs)
        for i in range(m.size if stealing.steal else 1):
            share = member_share(m, panels, stealing, i)
            products(kind, has_mins, w, rounded, result, share, take_chunk(share))

    return integers


@cache
def float_matmul(dtype: type) -> Operation:
    """out (rows, outputs) = x W^T on panels of this dtype; x (rows, columns) float32."""

    @operation
    def floats(m, x, weights, out, outputs, columns, stealing: Stealing):
        panels = (outputs + LANES - 1) // LANES
        w = array_at(address_of(m, weights), (panels, columns, LANES), dtype)
        source, result = matrix(m, x, m.rows, columns), matrix(m, out, m.rows, outputs)
        if m.rows == 1:
            lo, hi = part(panels, m.rank, m.size)
            panels_matmul_part(w, source, result, lo, hi)
        else:
            for i in range(m.size if stealing.steal else 1):
                share = member_share(m, panels, stealing, i)
                panels_matmul_share(w, source, result, share, take_chunk(share))

    return floats


@operation
def add_bias(m, bias, out, outputs):
    """out (rows, outputs) += bias (outputs,), split by panels like the product before it."""
    lo, hi = part((outputs + LANES - 1) // LANES, m.rank, m.size)
    result, values = matrix(m, out, m.rows, outputs), array_at(address_of(m, bias), outputs, np.float32)
    for i in range(m.rows):
        for j in range(lo * LANES, min(hi * LANES, outputs)):
            result[i, j] += values[j]


@cache
def adapter_down(dtype: type) -> Operation:
    """out (rows, padded rank) = scales * (x A^T), A an adapter's down matrix in panels of this dtype.

    With ``split_k``, for one row: PARTS unscaled partial sums over ranges of columns, which ``adapter_up`` adds up.
    """

    @operation
    def down(m, x, weights, scales, out, columns, panels, split_k):
        w = array_at(address_of(m, weights), (panels, columns, LANES), dtype)
        source, padded = matrix(m, x, m.rows, columns), panels * LANES
        if split_k:
            lo, hi = part(panels * PARTS, m.rank, m.size)
            low_rank_down_parts(w, source, matrix(m, out, np.int64(PARTS), padded), lo, hi)
        else:
            lo, hi = row_range(m)
            factors = array_at(address_of(m, scales), padded, np.float32)
            low_rank_down(w, factors, source, matrix(m, out, m.rows, padded), lo, hi)

    return down


@cache
def adapter_up(dtype: type) -> Operation:
    """out (rows, outputs) += h B^T, h the result of ``adapter_down``, B (outputs, rank) in panels of this dtype.

    With ``split_k`` each member first adds up the partial sums, into its own ``joined`` (1, padded rank).
    """

    @operation
    def up(m, h, up: Adapted, scales, joined, out, split_k):
        weights, outputs, rank = up
        padded, panels = (rank + LANES - 1) // LANES * LANES, (outputs + LANES - 1) // LANES
        source = matrix(m, h, m.rows, padded)
        if split_k:
            source = matrix(m, joined, m.rows, padded)
            factors = array_at(address_of(m, scales), padded, np.float32)
            join_parts(matrix(m, h, np.int64(PARTS), padded), factors, source)
        lo, hi = part(panels, m.rank, m.size)
        w = array_at(address_of(m, weights), (panels, rank, LANES), dtype)
        low_rank_up(w, source, matrix(m, out, m.rows, outputs), lo, hi)

    return up
