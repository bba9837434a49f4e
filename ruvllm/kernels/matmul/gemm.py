"""C = A B and C = A B^T of plain arrays: B is packed into panels, a group at a time, and the rows of A pass by.

Each thread has columns of C of its own, and packs what it needs of B for them, a chunk at a time (``threads.team``);
where there are too few columns to share, it has rows of its own. The caller provides scratch for one group of panels
per thread.
"""

from typing import Any

from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.tile import GROUP, chunk_size, group_times_rows
from ruvllm.kernels.simd.vectors import LANES, f32_load, f32_load_first, f32_store, load_rows, store_rows, zip_rows
from ruvllm.kernels.threads.team import COUNTER_STRIDE, Share, part, take_chunk

_AT_ONCE = 16  # rows of B, packed panel by panel: lines are written in a row, and those read stay near for the next


def scratch_size(inner: int, panels: int) -> int:
    """Numbers of scratch for each thread, for A (M, inner) and ``panels`` panels of columns."""
    return min(GROUP, panels) * (inner + 1) * LANES


@inline_kernel
def pack_columns(b: Any, columns: Any, inner: Any, column: Any, panels: Any, step: Any, group: Any) -> None:
    """group[p step + 16 k + j] = b[k, column + 16 p + j], b (inner, columns); what is beyond B becomes zero."""
    whole = min(panels, (columns - column) // LANES)
    for k_lo in range(0, inner, _AT_ONCE):
        k_hi = min(k_lo + _AT_ONCE, inner)
        for p in range(whole):
            at, to = column + p * LANES, p * step
            for k in range(k_lo, k_hi):
                f32_store(group, to + k * LANES, f32_load(b, at + k * columns))
        if whole < panels:
            at, to = column + whole * LANES, whole * step
            for k in range(k_lo, k_hi):
                f32_store(group, to + k * LANES, f32_load_first(b, at + k * columns, columns - at))


@inline_kernel
def pack_rows(b: Any, columns: Any, inner: Any, column: Any, panels: Any, step: Any, group: Any) -> None:
    """group[p step + 16 k + j] = b[column + 16 p + j, k], b (columns, inner): transposed, 16 x 16 numbers at a time."""
    whole = inner - inner % LANES
    for p in range(panels):
        first, to = (column + p * LANES) * inner, p * step
        if columns - column - p * LANES >= LANES:
            for k in range(0, whole, LANES):
                rows = load_rows(b, first + k, inner, LANES)
                for _ in range(4):
                    rows = zip_rows(rows)
                store_rows(group, to + k * LANES, LANES, rows)
            k_lo = whole
        else:
            k_lo = 0
        last = columns - 1 - column - p * LANES  # rows beyond B repeat its last one: nobody reads their products
        for k in range(k_lo, inner):
            for j in range(LANES):
                group[to + k * LANES + j] = b[first + min(j, last) * inner + k]


@kernel(strict=True)
def gemm_part(
    a: Any, b: Any, transposed: Any, group: Any, out: Any, row_lo: Any, row_hi: Any, panel_lo: Any, panel_hi: Any
) -> None:
    """Rows row_lo:row_hi and the columns of panels panel_lo:panel_hi of A B, or of A B^T where B is ``transposed``.

    a (M, K); b (K, N) or (N, K); out (M, N), all C-contiguous; group: scratch of this thread, see scratch_size.
    """
    inner, columns = a.shape[1], out.shape[1]
    x, w, to = flat(a), flat(b), flat(out)
    step = (inner + 1) * LANES  # a little apart, so that they do not compete for one place in a cache
    for p in range(panel_lo, panel_hi, GROUP):
        count = min(GROUP, panel_hi - p)
        if transposed:
            pack_rows(w, columns, inner, p * LANES, count, step, group)
        else:
            pack_columns(w, columns, inner, p * LANES, count, step, group)
        group_times_rows(group, 0, step, count, x, inner, to, columns, p * LANES, row_lo, row_hi)


@parallel_kernel
def gemm_parallel(
    a: Any, b: Any, transposed: Any, groups: Any, out: Any, by_rows: Any, counts: Any, threads: Any
) -> None:
    """gemm_part with columns, two panels at least, or rows of C split over threads. groups (threads, scratch_size).

    A thread that finishes its columns steals chunks from the others. counts: chunk_counters(threads).
    """
    rows, panels = out.shape[0], (out.shape[1] + LANES - 1) // LANES
    pairs = (panels + 1) // 2
    for t in prange(threads):
        if by_rows:
            lo, hi = part(rows, t, threads)
            gemm_part(a, b, transposed, groups[t], out, lo, hi, 0, panels)
        else:
            for i in range(threads):
                member = (t + i) % threads
                lo, hi = part(pairs, member, threads)
                share = Share(2 * lo, min(2 * hi, panels), counts, member * COUNTER_STRIDE, False)
                size = chunk_size(share.hi - share.lo)
                first = share.lo + take_chunk(share) * size
                while first < share.hi:
                    gemm_part(a, b, transposed, groups[t], out, 0, rows, first, min(first + size, share.hi))
                    first = share.lo + take_chunk(share) * size


@kernel(strict=True)
def gemm_batch(a: Any, b: Any, group: Any, out: Any, lo: Any, hi: Any) -> None:
    """Products lo:hi of batched_gemm. a (B, M, K); b (B, K, N); out (B, M, N); group: scratch of this thread."""
    for i in range(lo, hi):
        gemm_part(a[i], b[i], False, group, out[i], 0, out.shape[1], 0, (out.shape[2] + LANES - 1) // LANES)


@parallel_kernel
def gemm_batch_parallel(a: Any, b: Any, groups: Any, out: Any, threads: Any) -> None:
    """gemm_batch with the products split over threads. groups (threads, scratch_size)."""
    count = out.shape[0]
    for t in prange(threads):
        gemm_batch(a, b, groups[t], out, count * t // threads, count * (t + 1) // threads)
