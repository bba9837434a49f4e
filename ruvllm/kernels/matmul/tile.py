"""The tile of float matrix products: some rows of x against one to three panels, with all sums in registers.

How large tiles and blocks are is decided here, by the registers of the processor that code is made for.

- A multiply-add takes about four cycles and up to two start in each, so at least eight sums must be under way; and
  each number that is loaded must be used often enough that loads (two a cycle) are not what the loop waits for.
- AVX-512 has 32 registers of one vector: 8 rows x 3 panels are 24 sums, 3 weights, and some numbers of x. 11 loads
  serve 24 multiply-adds. What is left over of three panels are two or one.
- AVX2 has 16 registers of half a vector, NEON 32 of a quarter: 6 rows x 1 panel are 12 or 24 of them.
- What is left over of the rows is done by a tile of half as many, or by one that begins a little earlier and does some
  rows twice; where there are fewer rows than a tile has, by one of copies of them.
- K_BLOCK columns at a time: three panels, 36 KB, stay in the first-level cache while the rows of x pass by. The rows,
  _ROW_BLOCK at a time, stay in the second-level cache (96 KB) while GROUP panels (216 KB) pass by, and so do their
  outputs (144 KB), to which every block of columns adds. Rows of x are read where they lie: copies cost more than
  they brought.
- While a tile of rows computes, it asks for its share of the panels that come next, and of the rows that the next block
  of columns needs, a few lines at a time. Otherwise the first tile waits for all of them: a fifth of the time, where
  weights come from memory. Asking is not free either, two cycles for a line that is there already: most are
  asked for once, and pairs of panels, which are what is left over, for none.
- A few rows are not worth staying for: then a pair of panels is read from end to end, as memory likes it best.

Sums are taken in one order, block by block, whatever the tile: a row's result does not depend on its neighbours.
"""

from typing import Any

from ruvllm.kernels.jit.decorators import inline_kernel, part_kernel
from ruvllm.kernels.matmul.micro_kernels import WIDE, put
from ruvllm.kernels.memory import CACHE_LINE
from ruvllm.kernels.simd.vectors import (
    LANES,
    add_rows,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    f32_zeros,
    fma_rows,
    fma_three,
    load,
    never_inline,
    prefetch,
    prefetch_l2,
    stack_f32,
    store_rows,
)

_ROWS, _FEW_ROWS, _PANELS = (8, 4, 3) if WIDE else (6, 3, 1)
K_BLOCK = 192
GROUP = 18
_ROW_BLOCK = 128
_FEW_TILES = 2  # of rows, whose time is that of reading the weights
_X_STEP = K_BLOCK + LANES  # from a copied row of x to the next: they begin at different places of a page
_COPY_SIZE = _ROWS * _X_STEP
_SUMS_ROW = 3 * LANES
_SUMS_SIZE = _ROWS * _SUMS_ROW
_AHEAD = 128 * LANES  # from what is read to what is asked for: memory answers while so many columns are done
_NEXT_BLOCK = K_BLOCK * LANES
_EACH = LANES  # a line asked for with each column, of a few rows: more than with any 16 columns of many rows


@inline_kernel
def chunk_size(share: Any) -> Any:
    """Panels of a chunk (threads/team.py) where a thread has ``share`` of them for many rows: an eighth, in threes.

    No fewer than six, as a chunk reads all rows once more, and no more than a group.
    """
    return min(GROUP, max(6, (share + 7) // 8 + 2) // 3 * 3)


@inline_kernel
def copy_rows(x: Any, xi: Any, x_row: Any, rows: Any, size: Any, count: Any, copy: Any) -> None:
    """copy[r _X_STEP + i] = x[xi + r x_row + i] for a tile of ``size`` rows, where no more than ``rows`` are there.

    The last stands for those that are not there: numbers that lie in the copy by chance may be so small that a
    processor takes a hundred times as long to multiply them.
    """
    whole = count - count % LANES
    for r in range(size):
        source, target = xi + min(r, rows - 1) * x_row, r * _X_STEP
        for i in range(0, whole, LANES):
            f32_store(copy, target + i, f32_load(x, source + i))
        if whole < count:
            f32_store_first(copy, target + whole, f32_load_first(x, source + whole, count - whole), count - whole)


@inline_kernel
def ask_for(w: Any, at: Any, w_step: Any, panels: Any, lines: Any) -> None:
    """Have memory bring so many cache lines of each panel, the first from w[at] on."""
    for line in range(lines):
        for p in range(panels):
            prefetch_l2(w, at + p * w_step + line * (CACHE_LINE // w.itemsize))


@inline_kernel
def three_panels(
    zeros: Any, w: Any, wi: Any, w_step: Any, soon: Any, pace: Any, x: Any, xi: Any, x_step: Any, count: Any,
    out: Any, oi: Any, out_row: Any, add: Any,
) -> None:  # fmt: skip
    """out[oi + r out_row + j] = sum_k x[xi + r x_step + k] times three panels from wi on, or += with ``add``.

    For as many rows as ``zeros`` has. With every 16 columns, ``pace`` lines of each of the panels at ``soon``, which
    will be needed later, are asked for.
    """
    wj, wk = wi + w_step, wi + 2 * w_step
    left = middle = right = zeros
    for first in range(0, count, LANES):
        ask_for(w, soon, w_step, 3, pace)
        soon += pace * (CACHE_LINE // w.itemsize)
        for k in range(first, min(first + LANES, count)):
            at = k * LANES
            left, middle, right = fma_three(
                load(w, wi + at), load(w, wj + at), load(w, wk + at), x, xi + k, x_step, left, middle, right
            )
    if add:
        add_rows(out, oi, out_row, left)
        add_rows(out, oi + LANES, out_row, middle)
        add_rows(out, oi + 2 * LANES, out_row, right)
    else:
        store_rows(out, oi, out_row, left)
        store_rows(out, oi + LANES, out_row, middle)
        store_rows(out, oi + 2 * LANES, out_row, right)


@inline_kernel
def two_panels(
    zeros: Any, w: Any, wi: Any, w_step: Any, soon: Any, pace: Any, x: Any, xi: Any, x_step: Any, count: Any,
    out: Any, oi: Any, out_row: Any, add: Any,
) -> None:  # fmt: skip
    """three_panels for two: what is left over, or of a few rows, where every column asks for a line of each."""
    wj = wi + w_step
    left = right = zeros
    for k in range(count):
        if pace == _EACH:
            ask_for(w, soon + k * LANES, w_step, 2, 1)
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
    zeros: Any, w: Any, wi: Any, soon: Any, pace: Any, x: Any, xi: Any, x_step: Any, count: Any, out: Any, oi: Any,
    out_row: Any, add: Any,
) -> None:  # fmt: skip
    """two_panels for one; where that is the widest tile, three_panels for one."""
    left = zeros
    if pace == _EACH or _PANELS > 1:
        for k in range(count):
            if pace == _EACH:
                prefetch_l2(w, soon + k * LANES)
            left = fma_rows(load(w, wi + k * LANES), x, xi + k, x_step, left)
    else:
        for first in range(0, count, LANES):
            ask_for(w, soon, 0, 1, pace)
            soon += pace * (CACHE_LINE // w.itemsize)
            for k in range(first, min(first + LANES, count)):
                left = fma_rows(load(w, wi + k * LANES), x, xi + k, x_step, left)
    if add:
        add_rows(out, oi, out_row, left)
    else:
        store_rows(out, oi, out_row, left)


@inline_kernel
def tile_times_panels(
    rows: Any, x: Any, xi: Any, x_step: Any, count: Any, w: Any, wi: Any, w_step: Any, panels: Any, soon: Any,
    pace: Any, out: Any, oi: Any, out_row: Any, add: Any,
) -> None:  # fmt: skip
    """One, two or three panels from wi on, for _ROWS or _FEW_ROWS rows; see three_panels."""
    if panels == 3:
        if rows == _ROWS:
            three_panels(f32_zeros(_ROWS), w, wi, w_step, soon, pace, x, xi, x_step, count, out, oi, out_row, add)
        else:
            three_panels(f32_zeros(_FEW_ROWS), w, wi, w_step, soon, pace, x, xi, x_step, count, out, oi, out_row, add)
    elif panels == 2:
        if rows == _ROWS:
            two_panels(f32_zeros(_ROWS), w, wi, w_step, soon, pace, x, xi, x_step, count, out, oi, out_row, add)
        else:
            two_panels(f32_zeros(_FEW_ROWS), w, wi, w_step, soon, pace, x, xi, x_step, count, out, oi, out_row, add)
    elif rows == _ROWS:
        one_panel(f32_zeros(_ROWS), w, wi, soon, pace, x, xi, x_step, count, out, oi, out_row, add)
    else:
        one_panel(f32_zeros(_FEW_ROWS), w, wi, soon, pace, x, xi, x_step, count, out, oi, out_row, add)


@inline_kernel
def panels_times_rows(
    w: Any, wi: Any, w_step: Any, panels: Any, x: Any, inner: Any, k: Any, out: Any, oi: Any, out_row: Any,
    columns: Any, first: Any, end: Any, few: Any, soon: Any, x_soon: Any, x_end: Any, x_lo: Any, x_hi: Any, copy: Any,
    sums: Any,
) -> None:  # fmt: skip
    """Columns k.. of rows first:end of x against one to three panels, to or added to ``columns`` columns of out.

    A tile that ends beyond the last row begins earlier, with rows that are done already; where there are none, it is
    made of copies. Such tiles leave their sums in ``sums``, from which those that are wanted are taken.

    few: memory is what the rows wait for, so that the first tile asks for its own panels ahead, and later ones for the
    next block. Else all of them together ask for the panels at w[soon], and each for its share, x_lo:x_hi, of the rows
    that its place will have in the next block of columns, or of rows after the last columns. Their first is x[x_soon];
    behind x[x_end] there are none.
    """
    count = min(K_BLOCK, inner - k)
    lines = LANES * LANES * w.itemsize // CACHE_LINE  # of 16 columns of a panel
    pace = (lines * _ROWS + end - first - 1) // (end - first)
    t = first
    while t < end:
        left = end - t
        size = _ROWS if left > _FEW_ROWS else _FEW_ROWS
        rows = min(size, left)
        start = min(t, end - size)
        source, xi, x_step = x, start * inner + k, inner
        if start < 0:
            copy_rows(x, t * inner + k, inner, rows, size, count, copy)
            source, xi, x_step = copy, 0, _X_STEP
        whole = start == t and columns >= panels * LANES
        if whole:
            for r in range(rows, rows + _ROWS):  # what the next tile adds to
                for p in range(panels):
                    prefetch(out, oi + (t + r) * out_row + p * LANES)
        target, ti, step = out, oi + t * out_row, out_row
        if not whole:
            target, ti, step = sums, 0, _SUMS_ROW
        if few:
            soon, pace = wi + (_AHEAD if t == first else _NEXT_BLOCK), _EACH
        else:
            for r in range(x_lo, x_hi):
                row = x_soon + (t - first + r) * inner
                if row < x_end:
                    for i in range(0, K_BLOCK, LANES):
                        prefetch_l2(x, row + i)
        tile_times_panels(
            size, source, xi, x_step, count, w, wi, w_step, panels, soon, pace, target, ti, step, whole and k > 0
        )
        soon += K_BLOCK // LANES * pace * (CACHE_LINE // w.itemsize)
        if not whole:
            skip = 0 if start < 0 else t - start  # rows of the tile that were done before
            for r in range(rows):
                to, at = oi + (t + r) * out_row, (skip + r) * _SUMS_ROW
                for j in range(0, panels * LANES, LANES):
                    put(out, to + j, f32_load(sums, at + j), columns - j, k > 0)
        t += rows


@part_kernel
def group_times_rows(
    w: Any, wi: Any, w_step: Any, panels: Any, x: Any, inner: Any, out: Any, columns: Any, column: Any, lo: Any, hi: Any
) -> None:
    """out[lo:hi, column:] = x[lo:hi] W^T for up to GROUP panels of W, the first at wi and each w_step after the last.

    x (.., inner); out (.., columns).
    """
    never_inline()
    copy, sums = stack_f32(_COPY_SIZE), stack_f32(_SUMS_SIZE)
    for first in range(lo, hi, _ROW_BLOCK):
        end = min(first + _ROW_BLOCK, hi)
        few = end - first <= _FEW_TILES * _ROWS
        span = inner if few else K_BLOCK
        for k_lo in range(0, inner, span):
            next_row, next_k = (first, k_lo + K_BLOCK) if k_lo + K_BLOCK < inner else (end, 0)
            p = 0
            while p < panels:
                left = panels - p
                some = 2 if _PANELS == 3 and (few or left == 4) else _PANELS  # two and two, not three and one
                some = min(some, left)
                to = column + p * LANES
                soon = wi + (p + some) * w_step + k_lo * LANES if some < left else wi + next_k * LANES
                for k in range(k_lo, min(k_lo + span, inner), K_BLOCK):
                    panels_times_rows(
                        w, wi + p * w_step + k * LANES, w_step, some, x, inner, k,
                        out, to, columns, columns - to, first, end, few, soon, next_row * inner + next_k,
                        hi * inner, _ROWS * p // panels, _ROWS * (p + some) // panels, copy, sums,
                    )  # fmt: skip
                p += some
