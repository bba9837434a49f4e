"""One token through all layers in a single parallel region: the fast path of decoding.

The same bodies as the readable path (model/layer.py), in the same order, with barriers where one phase needs what
all threads wrote in the phase before; the results are the same bit for bit. What hundreds of launches and Python
calls would cost per token, some 200 barriers of a fraction of a microsecond replace.

Weights are found through a table of addresses: one row per layer, ``FIELDS`` numbers per matrix.
"""

from typing import Any

import numpy as np

from ruvllm.kernels._jit import inline_kernel, part_kernel
from ruvllm.kernels._region import Region
from ruvllm.kernels._team import SYNC_SIZE, array_at, barrier, join_team, part
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

# The table of the region: numbers, then addresses.
(
    THREADS, LAYER_COUNT, HIDDEN, FEED, HEADS, KV_HEADS, DIM, VOCABULARY, POSITION, WINDOW, CHUNKS, WIDEST,
    BLOCKS, WIDE, KV_HALF,
    SYNC, FLOATS, LAYERS, HEAD, NORM, COS, SIN, KEYS, VALUES, X, SUMS_OF, Q, K, V, GATE, UP, PARTIAL, LOGITS,
    OWN, XQ, XS, SUMS, TOTALS, SCRATCH, TABLE_SIZE,
) = range(40)  # fmt: skip


@inline_kernel
def _is_integer(table: Any, l: Any, at: Any) -> Any:
    return table[l, at] <= Q8


@inline_kernel
def _row(buffer: Any, count: Any) -> Any:
    """The first ``count`` elements of a 1-D buffer as a matrix of one row."""
    return buffer[:count].reshape(1, count)


@part_kernel
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


def _decode_member(table: Any) -> None:
    """What one thread does. ``table`` is the address of TABLE_SIZE numbers, in the order of the names above.

    Shared by the team: x, sums_of (E,), q (H, D), k, v (KV, D), gate, up (F,), partial, logits (V,).
    Each member's own, by rank: own (widest input), xq, xs, sums, totals (likewise) and scratch.
    """
    t = array_at(table, TABLE_SIZE, np.int64)
    sync = array_at(t[SYNC], SYNC_SIZE, np.int64)
    rank, size = join_team(sync, t[THREADS])
    if rank < 0:
        return
    hidden, feed, heads, kv_heads, dim = t[HIDDEN], t[FEED], t[HEADS], t[KV_HEADS], t[DIM]
    where, window = t[POSITION], t[WINDOW]
    floats = array_at(t[FLOATS], 2, np.float32)
    eps, scale = floats[0], floats[1]
    layers = array_at(t[LAYERS], t[LAYER_COUNT] * LAYER_FIELDS, np.int64).reshape(t[LAYER_COUNT], LAYER_FIELDS)
    head = array_at(t[HEAD], FIELDS, np.int64).reshape(1, FIELDS)
    norm = array_at(t[NORM], hidden, np.float32)
    cos = array_at(t[COS], dim // 2, np.float32).reshape(1, dim // 2)
    sin = array_at(t[SIN], dim // 2, np.float32).reshape(1, dim // 2)
    x, sums_of = array_at(t[X], hidden, np.float32), array_at(t[SUMS_OF], hidden, np.float32)
    q, k = array_at(t[Q], heads * dim, np.float32), array_at(t[K], kv_heads * dim, np.float32)
    v = array_at(t[V], kv_heads * dim, np.float32)
    gate, up = array_at(t[GATE], feed, np.float32), array_at(t[UP], feed, np.float32)
    width = (dim + LANES - 1) // LANES * LANES + LANES
    partial = array_at(t[PARTIAL], heads * t[CHUNKS] * width, np.float32).reshape(heads, t[CHUNKS], width)
    logits = array_at(t[LOGITS], t[VOCABULARY], np.float32)
    widest = t[WIDEST]
    own = array_at(t[OWN] + rank * widest * 4, widest, np.float32)
    codes = array_at(t[XQ] + rank * widest, widest, np.int8)
    groups = widest // GROUP
    steps = array_at(t[XS] + rank * groups * 4, groups, np.float32)
    counts = array_at(t[SUMS] + rank * groups * 4, groups, np.int32)
    products = array_at(t[TOTALS] + rank * groups * 4, groups, np.float32)
    room = heads // kv_heads * CHUNK
    scratch = array_at(t[SCRATCH] + rank * room * 4, room, np.float32)

    h, attended = own[:hidden], own[: heads * dim]
    h_row, x_row = h.reshape(1, hidden), x.reshape(1, hidden)
    q_heads, k_heads, v_heads = q.reshape(1, heads, dim), k.reshape(1, kv_heads, dim), v.reshape(1, kv_heads, dim)
    h_lo, h_hi = part(heads, rank, size)
    kv_lo, kv_hi = part(kv_heads, rank, size)
    chunks = where // CHUNK + 1 - max(0, where - window + 1) // CHUNK
    unit_lo, unit_hi = part(kv_heads * chunks, rank, size)
    e_lo, e_hi = _share(hidden, rank, size)
    f_lo, f_hi = _share(feed, rank, size)
    positions = array_at(table + POSITION * 8, 1, np.int64)
    # np.int64(_O) and the like: a literal argument would make numba compile matrix_rows once more for each value.
    for layer in range(t[LAYER_COUNT]):
        # Norms and roundings to 8 bits are done by every member for itself: cheaper than waiting for another.
        rms_norm_rows(x_row, array_at(layers[layer, _ATTN_NORM], hidden, np.float32), eps, h_row, 0, 1)
        if _is_integer(layers, layer, _Q) or _is_integer(layers, layer, _K) or _is_integer(layers, layer, _V):
            _quantize(h, codes, steps, counts, products)
        for at in range(_Q, _O, FIELDS):
            out = q if at == _Q else (k if at == _K else v)
            matrix_rows(layers, layer, at, h, codes, steps, counts, products, out, rank, size)
        barrier(sync, size)
        rope_rows(q_heads, cos, sin, np.float32(1), q_heads, h_lo, h_hi)
        rope_rows(k_heads, cos, sin, np.float32(1), k_heads, kv_lo, kv_hi)
        _append(t, layer, k_heads, v_heads, positions, kv_lo, kv_hi)
        barrier(sync, size)
        _attend(t, layer, q_heads[0], where, window, scale, partial, scratch, unit_lo, unit_hi)
        barrier(sync, size)
        merge_chunks(partial, chunks, attended.reshape(heads, dim), 0, heads)
        if _is_integer(layers, layer, _O):
            _quantize(attended, codes, steps, counts, products)
        matrix_rows(layers, layer, np.int64(_O), own, codes, steps, counts, products, sums_of, rank, size)
        for i in range(e_lo, e_hi):
            x[i] += sums_of[i]
        barrier(sync, size)
        rms_norm_rows(x_row, array_at(layers[layer, _MLP_NORM], hidden, np.float32), eps, h_row, 0, 1)
        if _is_integer(layers, layer, _GATE) or _is_integer(layers, layer, _UP):
            _quantize(h, codes, steps, counts, products)
        for at in range(_GATE, _DOWN, FIELDS):
            out = gate if at == _GATE else up
            matrix_rows(layers, layer, at, h, codes, steps, counts, products, out, rank, size)
        silu_mul_range(gate, up, gate, f_lo, f_hi)
        barrier(sync, size)
        if _is_integer(layers, layer, _DOWN):
            _quantize(gate, codes, steps, counts, products)
        matrix_rows(layers, layer, np.int64(_DOWN), gate, codes, steps, counts, products, sums_of, rank, size)
        for i in range(e_lo, e_hi):
            x[i] += sums_of[i]
        barrier(sync, size)
    rms_norm_rows(x_row, norm, eps, h_row, 0, 1)
    if _is_integer(head, 0, 0):
        _quantize(h, codes, steps, counts, products)
    matrix_rows(head, np.int64(0), np.int64(0), h, codes, steps, counts, products, logits, rank, size)


@inline_kernel
def _keys(t: Any, layer: Any, dtype: Any, size: Any) -> Any:
    """The keys of one layer (KV, B, D, 16); ``size`` is the bytes of an element."""
    count = t[KV_HEADS] * t[BLOCKS] * t[DIM] * LANES
    return array_at(t[KEYS] + layer * count * size, count, dtype).reshape(t[KV_HEADS], t[BLOCKS], t[DIM], LANES)


@inline_kernel
def _values(t: Any, layer: Any, dtype: Any, size: Any) -> Any:
    """The values of one layer (KV, 16 B, DV)."""
    count = t[KV_HEADS] * t[BLOCKS] * LANES * t[WIDE]
    return array_at(t[VALUES] + layer * count * size, count, dtype).reshape(t[KV_HEADS], t[BLOCKS] * LANES, t[WIDE])


@part_kernel
def _append(t: Any, layer: Any, k: Any, v: Any, positions: Any, lo: Any, hi: Any) -> None:
    """kv_append_heads into the cache of one layer, half or float32."""
    if t[KV_HALF]:
        kv_append_heads(k, v, _keys(t, layer, np.uint16, 2), _values(t, layer, np.uint16, 2), positions, lo, hi)
    else:
        kv_append_heads(k, v, _keys(t, layer, np.float32, 4), _values(t, layer, np.float32, 4), positions, lo, hi)


@part_kernel
def _attend(
    t: Any, layer: Any, q: Any, where: Any, window: Any, scale: Any, partial: Any, scratch: Any, lo: Any, hi: Any
) -> None:
    """attend_token_chunks over the cache of one layer, half or float32."""
    if t[KV_HALF]:
        keys, values = _keys(t, layer, np.uint16, 2), _values(t, layer, np.uint16, 2)
        attend_token_chunks(q, keys, values, where, window, scale, partial, scratch, lo, hi)
    else:
        keys32, values32 = _keys(t, layer, np.float32, 4), _values(t, layer, np.float32, 4)
        attend_token_chunks(q, keys32, values32, where, window, scale, partial, scratch, lo, hi)


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


decode_region = Region(_decode_member)
