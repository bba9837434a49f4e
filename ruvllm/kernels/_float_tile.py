"""The tile of float matrix products: some rows of x against one panel or two, with all sums in registers.

How large tiles and blocks are is decided here, by the registers of the processor that code is made for.

- A multiply-add takes about four cycles and up to two start in each, so at least eight sums must be under way; and
  each number that is loaded must be used often enough that loads (two a cycle) are not what the loop waits for.
- AVX-512 has 32 registers of one vector: 8 rows x 2 panels are 16 sums, 2 weights, and 8 numbers of x that the
  compiler loads early. 10 loads serve 16 multiply-adds. (12 x 2 sums leave it no room: it spills them.)
- AVX2 has 16 registers of half a vector, NEON 32 of a quarter: 6 rows x 1 panel are 12 or 24 of them.
- What is left over of the rows is done by a tile of half as many.
- K_BLOCK columns at a time: GROUP panels, 512 KB, stay in the second-level cache while _ROW_BLOCK rows of x pass by;
  and the outputs of those rows and panels, to which every block of columns adds, stay there as well (128 KB). The
  tile's rows of x, 16 KB, are read where they lie: copies that fit the first-level cache better cost more than they
  brought, for panels push either out of it.

Sums are taken in one order, block by block, whatever the tile: a row's result does not depend on its neighbours.
"""

from typing import Any

from ruvllm.kernels._jit import inline_kernel
from ruvllm.kernels._simd import (
    LANES,
    add_rows,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    f32_zeros,
    fma_rows,
    load,
    prefetch,
    prefetch_l2,
    stack_f32,
    store_rows,
)
from ruvllm.kernels._tile import WIDE, put

_ROWS, _FEW_ROWS, _PAIRS = (8, 4, True) if WIDE else (6, 3, False)
K_BLOCK = 512
GROUP = 16
_ROW_BLOCK = 128
_X_STEP = K_BLOCK + LANES  # from a copied row of x to the next: they begin at different places of a page
_TILE_SIZE = _ROWS * _X_STEP
_SUMS_SIZE = _ROWS * 2 * LANES
_FAR = 1 << 18  # numbers of x and out that the second-level cache does not hold
_AHEAD = 2048  # weights between what is read and what is asked for: memory answers while some hundred columns are done


@inline_kernel
def copy_rows(x: Any, xi: Any, x_row: Any, rows: Any, count: Any, tile: Any) -> None:
    """tile[r _X_STEP + i] = x[xi + r x_row + i] for ``rows`` rows of ``count`` <= K_BLOCK numbers.

    For the last rows, where a tile of more would read what is not there.
    """
    whole = count - count % LANES
    for r in range(rows):
        source, target = xi + r * x_row, r * _X_STEP
        for i in range(0, whole, LANES):
            f32_store(tile, target + i, f32_load(x, source + i))
        if whole < count:
            f32_store_first(tile, target + whole, f32_load_first(x, source + whole, count - whole), count - whole)


@inline_kernel
def ask_for(
    x: Any, xi: Any, x_row: Any, lo: Any, hi: Any, count: Any, out: Any, oi: Any, out_row: Any, rows: Any
) -> None:
    """Have memory bring rows lo:hi of x, which the next tile will be made of, and what the sums will be added to."""
    for r in range(lo, hi):
        for i in range(0, count, LANES):
            prefetch_l2(x, xi + r * x_row + i)
    for r in range(rows):
        prefetch(out, oi + r * out_row)
        prefetch(out, oi + r * out_row + LANES)


@inline_kernel
def two_panels(
    zeros: Any, w: Any, wi: Any, wj: Any, x: Any, xi: Any, x_step: Any, count: Any, out: Any, oi: Any, out_row: Any,
    add: Any,
) -> None:  # fmt: skip
    """out[oi + r out_row + j] = sum_k x[xi + r x_step + k] times the panels at wi and wj, or += with ``add``.

    For as many rows as ``zeros`` has.
    """
    left = right = zeros
    for k in range(count):
        prefetch_l2(w, wi + k * LANES + _AHEAD)
        prefetch_l2(w, wj + k * LANES + _AHEAD)
        left = fma_rows(load(w, wi + k * LANES), x, xi + k, x_step, left)
        right = fma_rows(load(w, wj + k * LANES), x, xi + k, x_step, right)
    if add:
        add_rows(out, oi, out_row, left)
        add_rows(out, oi + LANES, out_row, right)
    else:
        store_rows(out, oi, out_row, left)
        store_rows(out, oi + LANES, out_row, right)


@inline_kernel
def one_panel(
    zeros: Any, w: Any, wi: Any, x: Any, xi: Any, x_step: Any, count: Any, out: Any, oi: Any, out_row: Any, add: Any
) -> None:
    """two_panels for one."""
    left = zeros
    for k in range(count):
        prefetch_l2(w, wi + k * LANES + _AHEAD)
        left = fma_rows(load(w, wi + k * LANES), x, xi + k, x_step, left)
    if add:
        add_rows(out, oi, out_row, left)
    else:
        store_rows(out, oi, out_row, left)


@inline_kernel
def tile_times_panels(
    rows: Any, x: Any, xi: Any, x_step: Any, count: Any, w: Any, wi: Any, w_step: Any, panels: Any, sums: Any,
    out: Any, oi: Any, out_row: Any, columns: Any, add: Any, far: Any, y: Any, yi: Any, y_row: Any, y_rows: Any,
) -> None:  # fmt: skip
    """out[oi + r out_row + j] = sum_k x[xi + r x_step + k] W[j, k], or += with ``add``, for ``rows`` <= _ROWS rows.

    W is ``panels`` panels, the first at wi and each w_step after the one before; ``columns`` of out are there.
    Where things are ``far``, out is asked for, and what the next tile will be made of: y_rows rows of y from yi on.
    A tile that is not whole leaves its sums in ``sums``, from which those that are wanted are taken.
    """
    many = rows > _FEW_ROWS
    full = rows == (_ROWS if many else _FEW_ROWS)
    paired = panels - panels % 2 if _PAIRS else 0
    for p in range(0, paired, 2):
        at, to, left = wi + p * w_step, oi + p * LANES, columns - p * LANES
        if far:
            ask_for(y, yi, y_row, y_rows * p // panels, y_rows * (p + 2) // panels, count, out, to, out_row, rows)
        whole = full and left >= 2 * LANES
        target, ti, t_row = out, to, out_row
        if not whole:
            target, ti, t_row = sums, 0, 2 * LANES
        if many:
            two_panels(
                f32_zeros(_ROWS), w, at, at + w_step, x, xi, x_step, count, target, ti, t_row, whole and add
            )
        else:
            two_panels(
                f32_zeros(_FEW_ROWS), w, at, at + w_step, x, xi, x_step, count, target, ti, t_row, whole and add
            )
        if not whole:
            for r in range(rows):
                put(out, to + r * out_row, f32_load(sums, 2 * r * LANES), left, add)
                put(out, to + r * out_row + LANES, f32_load(sums, (2 * r + 1) * LANES), left - LANES, add)
    for p in range(paired, panels):
        at, to, left = wi + p * w_step, oi + p * LANES, columns - p * LANES
        if far:
            ask_for(y, yi, y_row, y_rows * p // panels, y_rows * (p + 1) // panels, count, out, to, out_row, rows)
        whole = full and left >= LANES
        target, ti, t_row = out, to, out_row
        if not whole:
            target, ti, t_row = sums, 0, 2 * LANES
        if many:
            one_panel(f32_zeros(_ROWS), w, at, x, xi, x_step, count, target, ti, t_row, whole and add)
        else:
            one_panel(f32_zeros(_FEW_ROWS), w, at, x, xi, x_step, count, target, ti, t_row, whole and add)
        if not whole:
            for r in range(rows):
                put(out, to + r * out_row, f32_load(sums, 2 * r * LANES), left, add)


@inline_kernel
def group_times_rows(
    w: Any, wi: Any, w_step: Any, panels: Any, x: Any, inner: Any, out: Any, columns: Any, column: Any, lo: Any, hi: Any
) -> None:
    """out[lo:hi, column:] = x[lo:hi] W^T for up to GROUP panels of W, the first at wi and each w_step after the last.

    x (.., inner); out (.., columns).
    """
    tile, sums = stack_f32(_TILE_SIZE), stack_f32(_SUMS_SIZE)
    far = (hi - lo) * (inner + columns) > _FAR
    for first in range(lo, hi, _ROW_BLOCK):
        end = min(first + _ROW_BLOCK, hi)
        for k in range(0, inner, K_BLOCK):
            count = min(K_BLOCK, inner - k)
            for t in range(first, end, _ROWS):
                n = min(_ROWS, end - t)
                source, at, step = x, t * inner + k, inner
                if n != _ROWS and n != _FEW_ROWS:  # the tile has more rows than there are
                    copy_rows(x, t * inner + k, inner, n, count, tile)
                    source, at, step = tile, 0, _X_STEP
                tile_times_panels(
                    n, source, at, step, count, w, wi + k * LANES, w_step, panels, sums, out, t * columns + column,
                    columns, columns - column, k > 0, far, x, (t + n) * inner + k, inner, min(_ROWS, end - t - n),
                )  # fmt: skip
