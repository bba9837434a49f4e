"""Tokens through all layers in a single parallel region: the fast path of prefill and decode.

The same bodies as the readable path (model/layer.py), in the same order, with barriers where one phase needs what
all threads wrote in the phase before; the results are the same bit for bit. What hundreds of launches and Python
calls would cost per token, some 200 barriers of a fraction of a microsecond replace.

Weights are found through a table of addresses: one row per layer, ``FIELDS`` numbers per matrix.
"""

from functools import cache
from typing import Any

import numpy as np

from ruvllm.kernels import activation, kv, low_rank, norm, rope, rounding, token_attention, vector
from ruvllm.kernels._attention_tile import CHUNK
from ruvllm.kernels._jit import as_part, inline_kernel, part_kernel, view_kernel
from ruvllm.kernels._region import Region
from ruvllm.kernels._team import SHARES, barrier, join_team, part, share_of
from ruvllm.kernels._tile import LANES
from ruvllm.kernels._views import array_at, flat
from ruvllm.kernels.cached_attention import attend_split, attend_turns, scratch_size
from ruvllm.kernels.low_rank import PARTS, join_parts
from ruvllm.kernels.panels import panels_matmul_part, panels_matmul_turns
from ruvllm.kernels.quant import quant_matmul_part
from ruvllm.kernels.quant_layout import GROUP, OFFSETS, OUTLIERS, block_bytes, token_blocks
from ruvllm.kernels.token_attention import token_scratch_size

rms_norm_rows = as_part(norm.rms_norm_rows)
quantize_activations = as_part(rounding.quantize_activations)
rope_rows = as_part(rope.rope_rows)
kv_append_heads = as_part(kv.kv_append_heads)
attend_token_chunks = as_part(token_attention.attend_token_chunks)
merge_chunks = as_part(token_attention.merge_chunks)
_split = inline_kernel(attend_split)
_block_bytes = inline_kernel(block_bytes)
_token_blocks = inline_kernel(token_blocks)
silu_mul_range = as_part(activation.silu_mul_range)
add_range = as_part(vector.add_range)
low_rank_down = as_part(low_rank.low_rank_down)
low_rank_down_parts = as_part(low_rank.low_rank_down_parts)
low_rank_up = as_part(low_rank.low_rank_up)

# Layouts of a matrix in the table; the first three are quant_layout.INT4, INT5 and INT8.
Q4, Q5, Q8, F32, F16, BF16 = range(6)
FIELDS = 7  # layout, weights, whether they have mins, bias, rows, columns, adapter
_WEIGHTS, _HAS_MINS, _BIAS, ROWS, _COLUMNS = range(1, 6)
ADAPTER = FIELDS - 1  # 0, or the address of the adapter's ADAPTER_FIELDS numbers
ADAPTER_FIELDS = 5  # layout (F32 or Q8), down, up, rank, scales
AT_ONCE = SHARES  # matrices that share an input: q, k, v
_Q, _K, _V, _O, _GATE, _UP, _DOWN = (i * FIELDS for i in range(7))
MATRIX_FIELDS = _ATTN_NORM = 7 * FIELDS
_MLP_NORM = _ATTN_NORM + 1
LAYER_FIELDS = _MLP_NORM + 1

# The table of the region: numbers, then addresses.
(
    THREADS, TOKENS, LOGIT_ROWS, FIRST_LAYER, LAYER_END, HIDDEN, FEED, HEADS, KV_HEADS, DIM, VOCABULARY, WINDOW, CHUNKS,
    WIDEST, SCRATCH_SIZE, BLOCKS, KEY_ROWS, WIDE, KV_BYTES, SYNC_SIZE,
    SYNC, FLOATS, LAYERS, HEAD, NORM, POSITIONS, COS, SIN, KEYS, VALUES, X, SUMS_OF, Q, K, V, ATTENDED, GATE, UP,
    ACTIVATED, PARTIAL, LOGITS, INPUT, LOW, LOW_SIZE, XQ, XS, OFFSETS_OF, TOTALS, OUTLIERS_OF, SCRATCH,
    TABLE_SIZE,
) = range(51)  # fmt: skip


def thread_scratch(head_dim: int, group: int) -> int:
    """Floats of scratch that one thread needs, for one token or for many."""
    return max(scratch_size(head_dim), token_scratch_size(head_dim, group))


@view_kernel
def _floats(address: Any, rows: Any, columns: Any) -> Any:
    return array_at(address, (rows, columns), np.float32)


@view_kernel
def _heads(address: Any, tokens: Any, heads: Any, dim: Any) -> Any:
    return array_at(address, (tokens, heads, dim), np.float32)


@view_kernel
def _rounded(t: Any, mine: Any, T: Any, columns: Any) -> Any:
    """xq, xs, offsets, totals, outliers of T rows of ``columns``, in the buffers of member (or of all) ``mine``."""
    groups, widest = (columns + GROUP - 1) // GROUP, t[WIDEST] // GROUP
    B, S = _token_blocks(T)
    xq = array_at(t[XQ] + mine * t[WIDEST], (B, groups, S, GROUP), np.int8)
    xs = array_at(t[XS] + mine * widest * 4, (B, groups, S), np.float32)
    offsets = array_at(t[OFFSETS_OF] + mine * widest * 4 * OFFSETS, (B, groups, S, OFFSETS), np.int32)
    totals = array_at(t[TOTALS] + mine * widest * 4, (B, groups, S), np.float32)
    outliers = array_at(t[OUTLIERS_OF] + mine * OUTLIERS * 2 * 4, (T, OUTLIERS, 2), np.float32)
    return xq, xs, offsets, totals, outliers


@part_kernel
def _round(
    t: Any, table: Any, layer: Any, first: Any, end: Any, x: Any, mine: Any, lo: Any, hi: Any, rank: Any, size: Any
) -> Any:
    """Round rows lo:hi of x to 8 bits if any of the matrices at first:end takes them so; begin their adapters.

    Returns whether members must meet before they go on: if work was shared out, that on tokens or that of adapters.
    """
    for at in range(first, end, FIELDS):
        if table[layer, at] <= Q8:
            xq, xs, offsets, totals, outliers = _rounded(t, mine, x.shape[0], x.shape[1])
            quantize_activations(x, xq, xs, offsets, totals, outliers, lo, hi)
            break
    shared = x.shape[0] > 1
    for at in range(first, end, FIELDS):
        if table[layer, at + ADAPTER]:
            _adapter_down(t, table, layer, at, x, lo, hi, rank, size)
            shared = True
    return shared


@view_kernel
def _adapter(t: Any, table: Any, layer: Any, at: Any) -> Any:
    """An adapter's numbers, its count of 16 ranks, and where its buffer is: h (T, 16 P).

    For one token: PARTS rows of sums that members share, then the row h of each member.
    """
    numbers = array_at(table[layer, at + ADAPTER], ADAPTER_FIELDS, np.int64)
    slot = at // FIELDS % AT_ONCE
    return numbers, (numbers[3] + LANES - 1) // LANES, t[LOW] + slot * t[LOW_SIZE] * 4


@part_kernel
def _adapter_down(t: Any, table: Any, layer: Any, at: Any, x: Any, lo: Any, hi: Any, rank: Any, size: Any) -> None:
    """Rows lo:hi of x through the first matrix of an adapter; of one token, this member's share of the sums."""
    numbers, panels, low = _adapter(t, table, layer, at)
    shape = (panels, x.shape[1], LANES)
    if x.shape[0] == 1:
        parts = _floats(low, PARTS, panels * LANES)
        lo, hi = part(panels * PARTS, rank, size)
        if numbers[0] == Q8:
            low_rank_down_parts(array_at(numbers[1], shape, np.int8), x, parts, lo, hi)
        else:
            low_rank_down_parts(array_at(numbers[1], shape, np.float32), x, parts, lo, hi)
    else:
        h, scales = _floats(low, x.shape[0], panels * LANES), array_at(numbers[4], panels * LANES, np.float32)
        if numbers[0] == Q8:
            low_rank_down(array_at(numbers[1], shape, np.int8), scales, x, h, lo, hi)
        else:
            low_rank_down(array_at(numbers[1], shape, np.float32), scales, x, h, lo, hi)


@part_kernel
def _adapter_up(t: Any, table: Any, layer: Any, at: Any, mine: Any, out: Any, lo: Any, hi: Any) -> None:
    """Panels lo:hi of out += what an adapter adds."""
    numbers, panels, low = _adapter(t, table, layer, at)
    wide = panels * LANES
    h = _floats(low, out.shape[0], wide)
    if out.shape[0] == 1:
        h = _floats(low + (PARTS + mine) * wide * 4, 1, wide)
        join_parts(_floats(low, PARTS, wide), array_at(numbers[4], wide, np.float32), h)
    shape = ((out.shape[1] + LANES - 1) // LANES, numbers[3], LANES)
    if numbers[0] == Q8:
        low_rank_up(array_at(numbers[2], shape, np.int8), h, out, lo, hi)
    else:
        low_rank_up(array_at(numbers[2], shape, np.float32), h, out, lo, hi)


def _matrix_of(float_weights: type | None, integers: tuple[int, ...]) -> Any:
    """The product with one matrix. What is None, numba leaves out."""
    products = quant_matmul_part(integers) if integers else None

    @part_kernel
    def _matrix(
        t: Any, table: Any, layer: Any, at: Any, x: Any, mine: Any, out: Any, sync: Any, rank: Any, size: Any
    ) -> None:  # fmt: skip
        """out (T, N) = x W^T + bias with the matrix at table[layer, at:]: this member's share of its rows.

        It then takes turns of the others' shares, unless a bias or an adapter is added to them, or it is one token's
        product with floats.
        """
        layout, rows, columns = table[layer, at], table[layer, at + ROWS], table[layer, at + _COLUMNS]
        count = (rows + LANES - 1) // LANES
        lo, hi = part(count, rank, size)
        weights, bias, adapter = table[layer, at + _WEIGHTS], table[layer, at + _BIAS], table[layer, at + ADAPTER]
        if products is not None and layout <= Q8:
            groups = (columns + GROUP - 1) // GROUP
            has_mins = table[layer, at + _HAS_MINS]
            blocks = array_at(weights, (count, groups, _block_bytes(layout, has_mins)), np.uint8)
            xq, xs, offsets, totals, outliers = _rounded(t, mine, x.shape[0], columns)
            for i in range(1 if bias or adapter else size):
                member = (rank + i) % size
                first, end = part(count, member, size)
                share = share_of(sync, rank, member, at // FIELDS % AT_ONCE)
                products(
                    layout, has_mins, blocks, xq, xs, offsets, totals, outliers, out, first, end,
                    sync, share, size == 1,
                )  # fmt: skip
        elif float_weights is not None:
            w = array_at(weights, (count, columns, LANES), float_weights)
            if x.shape[0] == 1:
                panels_matmul_part(w, x, out, lo, hi)
            else:
                for i in range(1 if bias or adapter else size):
                    member = (rank + i) % size
                    first, end = part(count, member, size)
                    share = share_of(sync, rank, member, at // FIELDS % AT_ONCE)
                    panels_matmul_turns(w, x, out, first, end, sync, share, size == 1)
        if bias:
            numbers = array_at(bias, rows, np.float32)
            for row in range(x.shape[0]):
                for i in range(lo * LANES, min(hi * LANES, rows)):
                    out[row, i] += numbers[i]
        if adapter:
            _adapter_up(t, table, layer, at, mine, out, lo, hi)

    return _matrix


@view_kernel
def _keys(t: Any, layer: Any, kv: Any) -> Any:
    """The keys of one layer (KV, B, K, 16)."""
    shape = (t[KV_HEADS], t[BLOCKS], t[KEY_ROWS], LANES)
    return array_at(t[KEYS] + layer * t[KV_HEADS] * t[BLOCKS] * t[KEY_ROWS] * LANES * t[KV_BYTES], shape, kv)


@view_kernel
def _values(t: Any, layer: Any, kv: Any) -> Any:
    """The values of one layer (KV, 16 B, DV)."""
    shape = (t[KV_HEADS], t[BLOCKS] * LANES, t[WIDE])
    return array_at(t[VALUES] + layer * t[KV_HEADS] * t[BLOCKS] * LANES * t[WIDE] * t[KV_BYTES], shape, kv)


@part_kernel
def _append(t: Any, layer: Any, kv: Any, k: Any, v: Any, positions: Any, lo: Any, hi: Any) -> None:
    kv_append_heads(k, v, _keys(t, layer, kv), _values(t, layer, kv), positions, lo, hi)


@part_kernel
def _attend(
    t: Any, layer: Any, kv: Any, q: Any, attended: Any, positions: Any, scale: Any, sync: Any, rank: Any, size: Any
) -> None:  # fmt: skip
    """Attention of many tokens over the cache of one layer: this member's units, and what is left of others'."""
    _, units = _split(q.shape[0], q.shape[1], t[KV_HEADS])
    keys, values, scratch = _keys(t, layer, kv), _values(t, layer, kv), _scratch(t, rank)
    for i in range(size):
        member = (rank + i) % size
        first, end = part(units, member, size)
        share = share_of(sync, rank, member, np.int64(0))
        attend_turns(
            q, keys, values, positions, t[WINDOW], scale, attended, scratch, first, end, sync, share, size == 1
        )  # fmt: skip


@part_kernel
def _attend_token(
    t: Any, layer: Any, kv: Any, q: Any, k: Any, v: Any, cos: Any, sin: Any, attended: Any, positions: Any, scale: Any,
    sync: Any, rank: Any, size: Any,
) -> None:  # fmt: skip
    """Attention of one token: kv heads and chunks of the cache are shared out, then every member merges them all.

    Each member turns q for itself, into the row that will be its result. Who has the last chunk of a kv head appends
    the new key and value to it: nobody else reads that chunk, so that no barrier is needed in between.
    """
    heads, dim = q.shape[1], q.shape[2]
    keys, values = _keys(t, layer, kv), _values(t, layer, kv)
    where, window = positions[0], t[WINDOW]
    width = (dim + LANES - 1) // LANES * LANES + LANES
    partial = array_at(t[PARTIAL], (heads, t[CHUNKS], width), np.float32)
    chunks = where // CHUNK + 1 - max(0, where - window + 1) // CHUNK
    lo, hi = part(keys.shape[0] * chunks, rank, size)
    rope_rows(q, cos, sin, np.float32(1), attended, np.int64(0), heads)
    rope_rows(k, cos, sin, np.float32(1), k, lo // chunks, hi // chunks)
    kv_append_heads(k, v, keys, values, positions, lo // chunks, hi // chunks)
    attend_token_chunks(attended[0], keys, values, where, window, scale, partial, _scratch(t, rank), lo, hi)
    barrier(sync, rank, size)
    merge_chunks(partial, chunks, attended[0], np.int64(0), heads)


@view_kernel
def _scratch(t: Any, rank: Any) -> Any:
    """The scratch of one member."""
    return array_at(t[SCRATCH] + rank * t[SCRATCH_SIZE] * 4, t[SCRATCH_SIZE], np.float32)


def _logits_of(matrix: Any) -> Any:
    """The end of the model: norm and head."""

    @part_kernel
    def _logits(t: Any, x: Any, eps: Any, sync: Any, rank: Any, size: Any) -> None:
        """Logits of the last LOGIT_ROWS tokens: none, one or all."""
        T, E = x.shape
        rows = t[LOGIT_ROWS]
        if rows == 0:
            return
        alone = rows == 1
        mine = rank if alone else 0
        lo, hi = (np.int64(0), np.int64(1)) if alone else part(rows, rank, size)
        h = _floats(t[INPUT] + mine * E * 4, rows, E)
        head = array_at(t[HEAD], (1, FIELDS), np.int64)
        rms_norm_rows(x[T - rows :], array_at(t[NORM], E, np.float32), eps, h, lo, hi)
        if _round(t, head, np.int64(0), np.int64(0), np.int64(FIELDS), h, mine, lo, hi, rank, size):
            barrier(sync, rank, size)
        out = _floats(t[LOGITS], rows, t[VOCABULARY])
        matrix(t, head, np.int64(0), np.int64(0), h, mine, out, sync, rank, size)

    return _logits


@cache
def forward_region(float_weights: type | None, integers: tuple[int, ...], kv: type) -> Region:
    """The region for a model of such matrices and a KV cache of this dtype: what it does not have is not compiled.

    float_weights: np.float32, np.uint16 (IEEE half), np.int16 (bfloat16), or None where no matrix is float;
    integers: layouts of its integer matrices; kv: np.float32, np.uint16 or np.int8.
    """
    matrix = _matrix_of(float_weights, integers)
    logits = _logits_of(matrix)

    def forward_member(table: Any) -> None:
        """What one thread does. ``table`` is the address of TABLE_SIZE numbers, in the order of the names above.

        For one token every member adds, norms, activates and rounds to 8 bits for itself: cheaper than waiting for
        another. For more, members share the tokens out, and a barrier follows. ``X``, ``ATTENDED``, ``INPUT``, ``XQ``
        .. ``OUTLIERS_OF`` hold one token per member, or all tokens; ``ACTIVATED`` the former, and the latter replace
        those in ``GATE``.
        """
        t = array_at(table, TABLE_SIZE, np.int64)
        sync = array_at(t[SYNC], t[SYNC_SIZE], np.int64)
        rank, size = join_team(sync, t[THREADS])
        if rank < 0:
            return
        T, E, F, heads, kv_heads, dim = t[TOKENS], t[HIDDEN], t[FEED], t[HEADS], t[KV_HEADS], t[DIM]
        eps, scale = _floats(t[FLOATS], 1, 2)[0]
        layers = array_at(t[LAYERS], (t[LAYER_END], LAYER_FIELDS), np.int64)
        cos, sin = _floats(t[COS], T, dim // 2), _floats(t[SIN], T, dim // 2)
        positions = array_at(t[POSITIONS], T, np.int64)
        alone = T == 1
        mine = rank if alone else 0
        lo, hi = (np.int64(0), np.int64(1)) if alone else part(T, rank, size)  # the tokens of this member
        x, sums_of = _floats(t[X] + mine * E * 4, T, E), _floats(t[SUMS_OF], T, E)
        q, k, v = _floats(t[Q], T, heads * dim), _floats(t[K], T, kv_heads * dim), _floats(t[V], T, kv_heads * dim)
        gate, up = _floats(t[GATE], T, F), _floats(t[UP], T, F)
        activated = _floats(t[ACTIVATED] + mine * F * 4 if alone else t[GATE], T, F)
        q_heads = _heads(t[Q], T, heads, dim)
        k_heads, v_heads = _heads(t[K], T, kv_heads, dim), _heads(t[V], T, kv_heads, dim)
        attended_at = t[ATTENDED] + mine * heads * dim * 4
        attended, attended_heads = _floats(attended_at, T, heads * dim), _heads(attended_at, T, heads, dim)
        h = _floats(t[INPUT] + mine * E * 4, T, E)
        if mine > 0:  # nobody adds to the first one's token before the first barrier
            x[0] = _floats(t[X], 1, E)[0]
        # np.int64(_O) and the like: a literal argument would make numba compile the function once more for each value.
        for layer in range(t[FIRST_LAYER], t[LAYER_END]):
            rms_norm_rows(x, array_at(layers[layer, _ATTN_NORM], E, np.float32), eps, h, lo, hi)
            if _round(t, layers, layer, np.int64(_Q), np.int64(_O), h, mine, lo, hi, rank, size):
                barrier(sync, rank, size)
            for at in range(_Q, _O, FIELDS):
                out = q if at == _Q else (k if at == _K else v)
                matrix(t, layers, layer, at, h, mine, out, sync, rank, size)
            barrier(sync, rank, size)
            if alone:
                _attend_token(
                    t, layer, kv, q_heads, k_heads, v_heads, cos, sin, attended_heads, positions, scale,
                    sync, rank, size,
                )  # fmt: skip
            else:
                rope_rows(q_heads, cos, sin, np.float32(1), q_heads, lo * heads, hi * heads)
                rope_rows(k_heads, cos, sin, np.float32(1), k_heads, lo * kv_heads, hi * kv_heads)
                _append(t, layer, kv, k_heads[lo:hi], v_heads[lo:hi], positions[lo:hi], np.int64(0), kv_heads)
                barrier(sync, rank, size)
                _attend(t, layer, kv, q_heads, attended_heads, positions, scale, sync, rank, size)
                barrier(sync, rank, size)
            if _round(t, layers, layer, np.int64(_O), np.int64(_GATE), attended, mine, lo, hi, rank, size):
                barrier(sync, rank, size)
            matrix(t, layers, layer, np.int64(_O), attended, mine, sums_of, sync, rank, size)
            barrier(sync, rank, size)
            add_range(flat(x), flat(sums_of), flat(x), lo * E, hi * E)
            rms_norm_rows(x, array_at(layers[layer, _MLP_NORM], E, np.float32), eps, h, lo, hi)
            if _round(t, layers, layer, np.int64(_GATE), np.int64(_DOWN), h, mine, lo, hi, rank, size):
                barrier(sync, rank, size)
            for at in range(_GATE, _DOWN, FIELDS):
                out = gate if at == _GATE else up
                matrix(t, layers, layer, at, h, mine, out, sync, rank, size)
            barrier(sync, rank, size)
            silu_mul_range(flat(gate), flat(up), flat(activated), lo * F, hi * F)
            if _round(t, layers, layer, np.int64(_DOWN), np.int64(_ATTN_NORM), activated, mine, lo, hi, rank, size):
                barrier(sync, rank, size)
            matrix(t, layers, layer, np.int64(_DOWN), activated, mine, sums_of, sync, rank, size)
            barrier(sync, rank, size)
            add_range(flat(x), flat(sums_of), flat(x), lo * E, hi * E)
        if not alone:
            barrier(sync, rank, size)
        logits(t, x, eps, sync, rank, size)

    return Region(forward_member)
