"""C = A B and C = A B^T of plain arrays: B is packed into panels, a group at a time, and multiplied by all rows of A.

Each thread computes columns of C of its own and packs the part of B that they need, a chunk at a time
(``threads.team``); with too few columns to split, it computes rows of its own. The caller provides scratch for one
group of panels per thread.
"""

from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.tile import PANEL_GROUP, Panels, chunk_size, group_times_rows
from ruvllm.kernels.simd.vectors import LANES, f32_load, f32_load_first, f32_store, load_rows, store_rows, zip_rows
from ruvllm.kernels.threads.team import COUNTER_STRIDE, Share, part, take_chunk

_PACK_ROWS = 16  # rows of B at a time, panel by panel: writes are sequential, and lines that were read are reused


def gemm_scratch_size(inner: int, panels: int) -> int:
    """Floats of scratch per thread, for A (M, inner) and ``panels`` panels of columns."""
    return min(PANEL_GROUP, panels) * (inner + 1) * LANES


@inline_kernel
def pack_columns(b, columns, inner, column, panels, step, group):
    """group[p step + 16 k + j] = b[k, column + 16 p + j], b (inner, columns); 0 beyond the last column."""
    whole = min(panels, (columns - column) // LANES)
    for k_lo in range(0, inner, _PACK_ROWS):
        k_hi = min(k_lo + _PACK_ROWS, inner)
        for p in range(whole):
            at, to = column + p * LANES, p * step
            for k in range(k_lo, k_hi):
                f32_store(group, to + k * LANES, f32_load(b, at + k * columns))
        if whole < panels:
            at, to = column + whole * LANES, whole * step
            for k in range(k_lo, k_hi):
                f32_store(group, to + k * LANES, f32_load_first(b, at + k * columns, columns - at))


@inline_kernel
def pack_transposed(b, columns, inner, column, panels, step, group):
    """group[p step + 16 k + j] = b[column + 16 p + j, k], b (columns, inner): transposed in 16 x 16 blocks."""
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
        last = columns - 1 - column - p * LANES  # rows beyond B repeat its last one: their products are not stored
        for k in range(k_lo, inner):
            for j in range(LANES):
                group[to + k * LANES + j] = b[first + min(j, last) * inner + k]


@kernel(strict=True)
def gemm_part(a, b, transposed, group, out, lo, hi):
    """The columns of panels lo:hi of A B, or of A B^T where B is ``transposed``.

    a (M, K); b (K, N) or (N, K); out (M, N), all C-contiguous; group: scratch of this thread, see gemm_scratch_size.
    """
    inner, columns = a.shape[1], out.shape[1]
    x, w, to = flat(a), flat(b), flat(out)
    step = (inner + 1) * LANES  # padded, so that panels do not compete for one set of a cache
    for p in range(lo, hi, PANEL_GROUP):
        count = min(PANEL_GROUP, hi - p)
        if transposed:
            pack_transposed(w, columns, inner, p * LANES, count, step, group)
        else:
            pack_columns(w, columns, inner, p * LANES, count, step, group)
        group_times_rows(Panels(group, 0, step, count), x, inner, to, columns, p * LANES, 0, a.shape[0])


@parallel_kernel
def gemm_parallel(a, b, transposed, groups, out, by_rows, counts, threads):
    """gemm_part with columns (two panels at least) or rows of C split over threads. groups: a scratch for each.

    A thread that finishes its columns steals chunks from the others. counts: chunk_counters(threads).
    """
    panels = (out.shape[1] + LANES - 1) // LANES
    pairs = (panels + 1) // 2
    for t in prange(threads):
        if by_rows:
            lo, hi = part(out.shape[0], t, threads)
            gemm_part(a[lo:hi], b, transposed, groups[t], out[lo:hi], 0, panels)
        else:
            for i in range(threads):
                member = (t + i) % threads
                lo, hi = part(pairs, member, threads)
                share = Share(2 * lo, min(2 * hi, panels), counts, member * COUNTER_STRIDE, False, 0)
                size = chunk_size(share.hi - share.lo)
                first = share.lo + take_chunk(share) * size
                while first < share.hi:
                    gemm_part(a, b, transposed, groups[t], out, first, min(first + size, share.hi))
                    first = share.lo + take_chunk(share) * size


@kernel(strict=True)
def gemm_batch(a, b, group, out, lo, hi):
    """Products lo:hi of batched_gemm. a (B, M, K); b (B, K, N); out (B, M, N); group: scratch of this thread."""
    for i in range(lo, hi):
        gemm_part(a[i], b[i], False, group, out[i], 0, (out.shape[2] + LANES - 1) // LANES)


@parallel_kernel
def gemm_batch_parallel(a, b, groups, out, threads):
    """gemm_batch with the products split over threads. groups (threads, gemm_scratch_size)."""
    count = out.shape[0]
    for t in prange(threads):
        gemm_batch(a, b, groups[t], out, count * t // threads, count * (t + 1) // threads)
