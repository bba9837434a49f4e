"""One token through all layers in a single parallel region: the fast path of decoding.

The same bodies as the readable path (model/layer.py), in the same order, with barriers where one phase needs what
all threads wrote in the phase before; the results are the same bit for bit. What hundreds of launches and Python
calls would cost per token, some 200 barriers of a fraction of a microsecond replace.

Weights are found through a table of addresses: one row per layer, ``FIELDS`` numbers per matrix.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._team import array_at, barrier, join_team, part
from ruvllm.kernels._tile import LANES
from ruvllm.kernels.activation import silu_mul_range
from ruvllm.kernels.cached_attention import kv_append_heads
from ruvllm.kernels.norm import rms_norm_rows
from ruvllm.kernels.panels import panels_token
from ruvllm.kernels.quant import GROUP, quant_token, quantize_activations
from ruvllm.kernels.rope import rope_rows
from ruvllm.kernels.token_attention import CHUNK, attend_token_chunks, merge_chunks

# Layouts of a matrix in the table; Q4 and Q8 are quant.INT4 and quant.INT8.
Q4, Q8, F32, F16, BF16 = 0, 1, 2, 3, 4
FIELDS = 8  # layout, weights, scales, mins, groups with mins, bias, rows, columns
_Q, _K, _V, _O, _GATE, _UP, _DOWN = (i * FIELDS for i in range(7))
_ATTN_NORM = 7 * FIELDS
_MLP_NORM = _ATTN_NORM + 1
LAYER_FIELDS = _MLP_NORM + 1


@inline_kernel
def _is_integer(table: Any, l: Any, at: Any) -> Any:
    return table[l, at] <= Q8


@inline_kernel
def _row(buffer: Any, count: Any) -> Any:
    """The first ``count`` elements of a 1-D buffer as a matrix of one row."""
    return buffer[:count].reshape(1, count)


@kernel
def matrix_rows(
    table: Any, l: Any, at: Any, x: Any, xq: Any, xs: Any, sums: Any, totals: Any, out: Any, rank: Any, size: Any
) -> None:
    """out (N,) = W x + bias for this member's share of the rows of the matrix described at table[l, at:]."""
    layout, rows, columns = table[l, at], table[l, at + 6], table[l, at + 7]
    x = x[:columns]
    panels = (rows + LANES - 1) // LANES
    lo, hi = part(panels, rank, size)
    if layout <= Q8:
        groups = (columns + GROUP - 1) // GROUP
        lines = 4 if layout == Q4 else 8
        codes = array_at(table[l, at + 1], panels * groups * lines * 64, np.uint8).reshape(panels, groups, lines, 64)
        scales = array_at(table[l, at + 2], panels * groups * LANES, np.uint16).reshape(panels, groups, LANES)
        with_mins = table[l, at + 4]
        mins = array_at(table[l, at + 3], panels * with_mins * LANES, np.uint16).reshape(panels, with_mins, LANES)
        quant_token(layout, codes, scales, mins, xq, xs, sums, totals, out, lo, hi)
    elif layout == F32:
        w32 = array_at(table[l, at + 1], panels * columns * LANES, np.float32).reshape(panels, columns, LANES)
        panels_token(w32, x, out, lo, hi)
    elif layout == F16:
        w16 = array_at(table[l, at + 1], panels * columns * LANES, np.uint16).reshape(panels, columns, LANES)
        panels_token(w16, x, out, lo, hi)
    else:
        b16 = array_at(table[l, at + 1], panels * columns * LANES, np.int16).reshape(panels, columns, LANES)
        panels_token(b16, x, out, lo, hi)
    if table[l, at + 5]:
        bias = array_at(table[l, at + 5], rows, np.float32)
        for i in range(lo * LANES, min(hi * LANES, rows)):
            out[i] += bias[i]


@kernel
def decode_member(
    layers: Any, head: Any, norm: Any, eps: Any, window: Any, scale: Any, position: Any, cos: Any, sin: Any,
    keys: Any, values: Any, x: Any, q: Any, k: Any, v: Any, gate: Any, up: Any, sums_of: Any, partial: Any,
    own: Any, xq: Any, xs: Any, sums: Any, totals: Any, scratch: Any, logits: Any, sync: Any, wanted: Any,
) -> None:  # fmt: skip
    """What one member of the team does.

    Shared by the team: x, sums_of (1, E), q (1, H, D), k, v (1, KV, D), gate, up (F,), partial, logits (V,).
    Each member's own, by rank: own (threads, widest input), xq, xs, sums, totals (likewise) and scratch.
    """
    rank, size = join_team(sync, wanted)
    if rank < 0:
        return
    hidden, feed = x.shape[1], gate.shape[0]
    heads, dim, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    where = position[0]
    chunks = where // CHUNK + 1 - max(0, where - window + 1) // CHUNK
    h, attended = own[rank], own[rank][: heads * dim]
    h_row = h[:hidden].reshape(1, hidden)
    codes, steps, counts, products = xq[rank], xs[rank], sums[rank], totals[rank]
    h_lo, h_hi = part(heads, rank, size)
    kv_lo, kv_hi = part(kv_heads, rank, size)
    unit_lo, unit_hi = part(kv_heads * chunks, rank, size)
    e_lo, e_hi = _share(hidden, rank, size)
    f_lo, f_hi = _share(feed, rank, size)
    for l in range(layers.shape[0]):
        # Norms and roundings to 8 bits are done by every member for itself: cheaper than waiting for another.
        rms_norm_rows(x, array_at(layers[l, _ATTN_NORM], hidden, np.float32), eps, h_row, 0, 1)
        if _is_integer(layers, l, _Q) or _is_integer(layers, l, _K) or _is_integer(layers, l, _V):
            _quantize(h[:hidden], codes, steps, counts, products)
        # One call for all matrices that share an input: compiled code for it exists once.
        for at in range(_Q, _O, FIELDS):
            out = q.reshape(-1) if at == _Q else (k.reshape(-1) if at == _K else v.reshape(-1))
            matrix_rows(layers, l, at, h, codes, steps, counts, products, out, rank, size)
        barrier(sync, size)
        rope_rows(q, cos, sin, np.float32(1), q, h_lo, h_hi)
        rope_rows(k, cos, sin, np.float32(1), k, kv_lo, kv_hi)
        kv_append_heads(k, v, keys[l], values[l], position, kv_lo, kv_hi)
        barrier(sync, size)
        attend_token_chunks(q[0], keys[l], values[l], where, window, scale, partial, scratch[rank], unit_lo, unit_hi)
        barrier(sync, size)
        merge_chunks(partial, chunks, attended.reshape(heads, dim), 0, heads)
        if _is_integer(layers, l, _O):
            _quantize(attended, codes, steps, counts, products)
        matrix_rows(layers, l, _O, h, codes, steps, counts, products, sums_of.reshape(-1), rank, size)
        for i in range(e_lo, e_hi):
            x[0, i] += sums_of[0, i]
        barrier(sync, size)
        rms_norm_rows(x, array_at(layers[l, _MLP_NORM], hidden, np.float32), eps, h_row, 0, 1)
        if _is_integer(layers, l, _GATE) or _is_integer(layers, l, _UP):
            _quantize(h[:hidden], codes, steps, counts, products)
        for at in range(_GATE, _DOWN, FIELDS):
            matrix_rows(layers, l, at, h, codes, steps, counts, products, gate if at == _GATE else up, rank, size)
        silu_mul_range(gate, up, gate, f_lo, f_hi)
        barrier(sync, size)
        if _is_integer(layers, l, _DOWN):
            _quantize(gate, codes, steps, counts, products)
        matrix_rows(layers, l, _DOWN, gate, codes, steps, counts, products, sums_of.reshape(-1), rank, size)
        for i in range(e_lo, e_hi):
            x[0, i] += sums_of[0, i]
        barrier(sync, size)
    rms_norm_rows(x, norm, eps, h_row, 0, 1)
    if _is_integer(head, 0, 0):
        _quantize(h[:hidden], codes, steps, counts, products)
    matrix_rows(head, 0, 0, h, codes, steps, counts, products, logits, rank, size)


@inline_kernel
def _share(count: Any, rank: Any, size: Any) -> Any:
    """The elements of a vector whose panels are this member's."""
    lo, hi = part((count + LANES - 1) // LANES, rank, size)
    return lo * LANES, min(hi * LANES, count)


@inline_kernel
def _quantize(x: Any, xq: Any, xs: Any, sums: Any, totals: Any) -> None:
    groups = (x.shape[0] + GROUP - 1) // GROUP
    quantize_activations(
        _row(x, x.shape[0]), _row(xq, groups * GROUP), _row(xs, groups), _row(sums, groups), _row(totals, groups), 0, 1
    )


@parallel_kernel
def decode_parallel(
    layers: Any, head: Any, norm: Any, eps: Any, window: Any, scale: Any, position: Any, cos: Any, sin: Any,
    keys: Any, values: Any, x: Any, q: Any, k: Any, v: Any, gate: Any, up: Any, sums_of: Any, partial: Any,
    own: Any, xq: Any, xs: Any, sums: Any, totals: Any, scratch: Any, logits: Any, sync: Any, threads: Any,
) -> None:  # fmt: skip
    """The region: every thread that comes becomes a member of the team."""
    for _ in prange(threads):
        decode_member(
            layers, head, norm, eps, window, scale, position, cos, sin, keys, values, x, q, k, v, gate, up, sums_of,
            partial, own, xq, xs, sums, totals, scratch, logits, sync, threads,
        )  # fmt: skip
