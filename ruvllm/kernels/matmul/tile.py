"""The tile of float matrix products: some rows of x against one to three panels, with all sums in registers.

The registers of the target processor decide the sizes of tiles and blocks:

- A multiply-add has a latency of about four cycles and up to two start in each, so at least eight accumulators must be
  in flight; and each element that is loaded must be used often enough that loads (two a cycle) are not the limit.
- AVX-512 has 32 registers of one vector: 8 rows x 3 panels are 24 accumulators, 3 weights, and some elements of x. 11
  loads serve 24 multiply-adds. The remainder of three panels is two or one.
- AVX2 has 16 registers of half a vector, NEON 32 of a quarter: 6 rows x 1 panel are 12 or 24 of them.
- Remaining rows take a tile of half as many, or one that begins earlier and recomputes some rows; where there are
  fewer rows than a tile has, a tile padded with copies of the last row.
- K_BLOCK columns at a time: three panels, 36 KB, stay in the L1 cache while the rows of x pass by. The rows,
  _ROW_BLOCK at a time, stay in the L2 cache (96 KB) while PANEL_GROUP panels (216 KB) pass by, and so do their outputs
  (144 KB), to which every block of columns adds. Rows of x are read in place: packing them cost more than it gained.
- While a tile computes, it prefetches its share of the next panels, and of the rows that the next block of columns
  needs, a few lines at a time. Otherwise the first tile waits for all of them: a fifth of the time, where weights come
  from memory. A prefetch of a line that is in the cache costs two cycles, so most lines are prefetched once, and pairs
  of panels, which are a remainder, prefetch nothing.
- With few rows, blocking gains nothing: two panels are streamed end to end, as memory is read fastest.

Sums are taken in one order, block by block, whatever the tile: a row's result does not depend on its neighbours.
"""

from typing import Any, NamedTuple

from ruvllm.kernels.jit.decorators import inline_kernel, part_kernel
from ruvllm.kernels.matmul.micro_kernels import WIDE, Rows, put
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
PANEL_GROUP = 18
_ROW_BLOCK = 128
_FEW_TILES = 2  # so few tiles of rows take no longer than reading the weights
_X_STEP = K_BLOCK + LANES  # stride of copied rows of x: they begin at different offsets in a page
_COPY_SIZE = _ROWS * _X_STEP
_SUMS_ROW = 3 * LANES
_SUMS_SIZE = _ROWS * _SUMS_ROW
_AHEAD = 128 * LANES  # prefetch distance: memory answers while so many columns are computed
_NEXT_BLOCK = K_BLOCK * LANES
_EVERY_COLUMN = LANES  # the pace of few rows: one line with each column, more than with any 16 columns of many rows


class Panels(NamedTuple):
    """``count`` panels in flat memory, the first at ``start``, each ``step`` elements after the last."""

    elements: Any
    start: Any
    step: Any
    count: Any


class Prefetch(NamedTuple):
    """With every 16 columns, ``pace`` lines of each panel from ``start`` on are prefetched."""

    start: Any
    pace: Any


class Next(NamedTuple):
    """What the tiles of a block of rows prefetch.

    few: with few rows, which wait for memory, the first tile prefetches its own panels, later ones the next block.
    Otherwise, all tiles together prefetch the panels at ``panels``, and each the rows lo:hi of its own that the next
    block of columns needs, or rows after the last columns. The first of them is x[rows]; x ends at ``end``.
    """

    few: Any
    panels: Any
    rows: Any
    end: Any
    lo: Any
    hi: Any


class Block(NamedTuple):
    """Columns k.. of rows lo:hi of x (.., inner), flat."""

    x: Any
    inner: Any
    k: Any
    lo: Any
    hi: Any


class Buffers(NamedTuple):
    """A tile of copied rows, and a tile of sums."""

    copy: Any
    sums: Any


@inline_kernel
def chunk_size(share):
    """Panels of a chunk (threads/team.py) where a thread has ``share`` of them for many rows: an eighth, in threes.

    At least six, because each chunk reads all rows once more, and at most a group.
    """
    return min(PANEL_GROUP, max(6, (share + 7) // 8 + 2) // 3 * 3)


@inline_kernel
def copy_rows(rows, count, size, columns, copy):
    """Copy ``columns`` elements of ``count`` rows, strided by _X_STEP; the last row fills a tile of ``size`` rows.

    Uninitialised rows might hold denormals, whose multiplication takes some processors a hundred times as long.
    """
    x, whole = rows.elements, columns - columns % LANES
    for r in range(size):
        source, target = rows.start + min(r, count - 1) * rows.step, r * _X_STEP
        for i in range(0, whole, LANES):
            f32_store(copy, target + i, f32_load(x, source + i))
        if whole < columns:
            f32_store_first(copy, target + whole, f32_load_first(x, source + whole, columns - whole), columns - whole)


@inline_kernel
def prefetch_panels(w, at, step, panels, lines):
    """Prefetch so many cache lines of each panel, the first from w[at] on."""
    for line in range(lines):
        for p in range(panels):
            prefetch_l2(w, at + p * step + line * (CACHE_LINE // w.itemsize))


@inline_kernel
def three_panels(zeros, panels, ahead, rows, count, out, add):
    """out[r, 16 p + j] = sum_k rows[r, k] panel[p, k, j] for three panels and k < ``count``, or += with ``add``.

    zeros: a tuple of one zero vector for each row; ahead: a ``Prefetch``; rows, out: ``Rows``.
    """
    w, wi, soon = panels.elements, panels.start, ahead.start
    wj, wk = wi + panels.step, wi + 2 * panels.step
    left = middle = right = zeros
    for first in range(0, count, LANES):
        prefetch_panels(w, soon, panels.step, 3, ahead.pace)
        soon += ahead.pace * (CACHE_LINE // w.itemsize)
        for k in range(first, min(first + LANES, count)):
            at = k * LANES
            left, middle, right = fma_three(
                load(w, wi + at), load(w, wj + at), load(w, wk + at),
                rows.elements, rows.start + k, rows.step, left, middle, right,
            )  # fmt: skip
    if add:
        add_rows(out.elements, out.start, out.step, left)
        add_rows(out.elements, out.start + LANES, out.step, middle)
        add_rows(out.elements, out.start + 2 * LANES, out.step, right)
    else:
        store_rows(out.elements, out.start, out.step, left)
        store_rows(out.elements, out.start + LANES, out.step, middle)
        store_rows(out.elements, out.start + 2 * LANES, out.step, right)


@inline_kernel
def two_panels(zeros, panels, ahead, rows, count, out, add):
    """three_panels for two: a remainder, or few rows, where every column prefetches a line of each."""
    w, wi, wj = panels.elements, panels.start, panels.start + panels.step
    left = right = zeros
    for k in range(count):
        if ahead.pace == _EVERY_COLUMN:
            prefetch_panels(w, ahead.start + k * LANES, panels.step, 2, 1)
        left = fma_rows(load(w, wi + k * LANES), rows.elements, rows.start + k, rows.step, left)
        right = fma_rows(load(w, wj + k * LANES), rows.elements, rows.start + k, rows.step, right)
    if add:
        add_rows(out.elements, out.start, out.step, left)
        add_rows(out.elements, out.start + LANES, out.step, right)
    else:
        store_rows(out.elements, out.start, out.step, left)
        store_rows(out.elements, out.start + LANES, out.step, right)


@inline_kernel
def one_panel(zeros, panels, ahead, rows, count, out, add):
    """two_panels for one; where that is the widest tile, three_panels for one."""
    w, wi, soon = panels.elements, panels.start, ahead.start
    left = zeros
    if ahead.pace == _EVERY_COLUMN or _PANELS > 1:
        for k in range(count):
            if ahead.pace == _EVERY_COLUMN:
                prefetch_l2(w, soon + k * LANES)
            left = fma_rows(load(w, wi + k * LANES), rows.elements, rows.start + k, rows.step, left)
    else:
        for first in range(0, count, LANES):
            prefetch_panels(w, soon, 0, 1, ahead.pace)
            soon += ahead.pace * (CACHE_LINE // w.itemsize)
            for k in range(first, min(first + LANES, count)):
                left = fma_rows(load(w, wi + k * LANES), rows.elements, rows.start + k, rows.step, left)
    if add:
        add_rows(out.elements, out.start, out.step, left)
    else:
        store_rows(out.elements, out.start, out.step, left)


@inline_kernel
def tile_times_panels(size, panels, ahead, rows, count, out, add):
    """One, two or three panels, for _ROWS or _FEW_ROWS rows; see three_panels."""
    if panels.count == 3:
        if size == _ROWS:
            three_panels(f32_zeros(_ROWS), panels, ahead, rows, count, out, add)
        else:
            three_panels(f32_zeros(_FEW_ROWS), panels, ahead, rows, count, out, add)
    elif panels.count == 2:
        if size == _ROWS:
            two_panels(f32_zeros(_ROWS), panels, ahead, rows, count, out, add)
        else:
            two_panels(f32_zeros(_FEW_ROWS), panels, ahead, rows, count, out, add)
    elif size == _ROWS:
        one_panel(f32_zeros(_ROWS), panels, ahead, rows, count, out, add)
    else:
        one_panel(f32_zeros(_FEW_ROWS), panels, ahead, rows, count, out, add)


@inline_kernel
def panels_times_block(panels, block, out, columns, coming, buffers):
    """One to three panels times a ``Block``, stored or (k > 0) added to ``columns`` columns of out (``Rows``).

    A tile that would end beyond the last row begins earlier, with rows that are done already; if there are none, it is
    padded with copies. Such tiles leave their sums in a buffer, from which the rows that are wanted are taken.
    """
    x, inner, k, width = block.x, block.inner, block.k, panels.count * LANES
    count = min(K_BLOCK, inner - k)
    lines = LANES * LANES * panels.elements.itemsize // CACHE_LINE  # cache lines of 16 columns of a panel
    soon, pace = coming.panels, (lines * _ROWS + block.hi - block.lo - 1) // (block.hi - block.lo)
    t = block.lo
    while t < block.hi:
        left = block.hi - t
        size = _ROWS if left > _FEW_ROWS else _FEW_ROWS
        some = min(size, left)
        start = min(t, block.hi - size)
        rows = Rows(x, start * inner + k, inner)
        if start < 0:
            copy_rows(Rows(x, t * inner + k, inner), some, size, count, buffers.copy)
            rows = Rows(buffers.copy, 0, _X_STEP)
        whole = start == t and columns >= width
        target = Rows(out.elements, out.start + t * out.step, out.step)
        if whole:
            for r in range(some, some + _ROWS):  # the outputs of the next tile
                for p in range(panels.count):
                    prefetch(target.elements, target.start + r * target.step + p * LANES)
        else:
            target = Rows(buffers.sums, 0, _SUMS_ROW)
        if coming.few:
            soon, pace = panels.start + (_AHEAD if t == block.lo else _NEXT_BLOCK), _EVERY_COLUMN
        else:
            for r in range(coming.lo, coming.hi):
                row = coming.rows + (t - block.lo + r) * inner
                if row < coming.end:
                    for i in range(0, K_BLOCK, LANES):
                        prefetch_l2(x, row + i)
        tile_times_panels(size, panels, Prefetch(soon, pace), rows, count, target, whole and k > 0)
        soon += K_BLOCK // LANES * pace * (CACHE_LINE // panels.elements.itemsize)
        if not whole:
            skip = 0 if start < 0 else t - start  # rows of the tile that were done before
            for r in range(some):
                to, at = out.start + (t + r) * out.step, (skip + r) * _SUMS_ROW
                for j in range(0, width, LANES):
                    put(out.elements, to + j, f32_load(buffers.sums, at + j), columns - j, k > 0)
        t += some


@part_kernel
def group_times_rows(panels, x, inner, out, columns, column, lo, hi):
    """out[lo:hi, column:] = x[lo:hi] W^T for up to PANEL_GROUP panels of W. x (.., inner); out (.., columns), flat."""
    never_inline()
    w, wi, step, total = panels
    buffers = Buffers(stack_f32(_COPY_SIZE), stack_f32(_SUMS_SIZE))
    for first in range(lo, hi, _ROW_BLOCK):
        end = min(first + _ROW_BLOCK, hi)
        few = end - first <= _FEW_TILES * _ROWS
        span = inner if few else K_BLOCK
        for k_lo in range(0, inner, span):
            next_row, next_k = (first, k_lo + K_BLOCK) if k_lo + K_BLOCK < inner else (end, 0)
            p = 0
            while p < total:
                left = total - p
                some = 2 if _PANELS == 3 and (few or left == 4) else _PANELS  # two and two, not three and one
                some = min(some, left)
                to = column + p * LANES
                soon = wi + (p + some) * step + k_lo * LANES if some < left else wi + next_k * LANES
                coming = Next(
                    few, soon, next_row * inner + next_k, hi * inner, _ROWS * p // total, _ROWS * (p + some) // total
                )
                for k in range(k_lo, min(k_lo + span, inner), K_BLOCK):
                    some_panels = Panels(w, wi + p * step + k * LANES, step, some)
                    block, target = Block(x, inner, k, first, end), Rows(out, to, columns)
                    panels_times_block(some_panels, block, target, columns - to, coming, buffers)
                p += some
