"""Matrix times packed weights: the layout that every linear layer uses, whatever its precision.

A weight matrix W (N, K) is stored as panels (ceil(N/16), K, 16): 16 output rows are the 16 lanes of a vector, so
y = W x is ``acc += splat(x[k]) * panel[k]``. Weights stream in order, nothing is summed across lanes, and the same
panel serves one token (decoding) and tiles of several tokens (a prompt), whose sums stay in registers. Rows past N are
zero. Weights are float32, uint16 (IEEE half bits) or int16 (bfloat16 bits).
"""

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel, part_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES, STREAMS, Rows, put, token_times_panels
from ruvllm.kernels.matmul.tile import K_BLOCK, PANEL_GROUP, Panels, chunk_size, group_times_rows
from ruvllm.kernels.simd.vectors import f32_store_first, f32_to_f16, f32_zero, fma, load, splat_at
from ruvllm.kernels.threads.pool import PARALLEL_MACS, PARALLEL_TILE_MACS, launch, threads_for
from ruvllm.kernels.threads.team import COUNTER_STRIDE, chunk_counters, part, share_of, take_chunk


def panel_count(rows: int) -> int:
    """Number of 16-row panels that hold ``rows`` rows."""
    return (rows + LANES - 1) // LANES


@part_kernel
def panels_matmul_part(w, x, out, lo, hi):
    """panels_matmul as a part of larger kernels."""
    tokens, columns = x.shape
    rows = out.shape[1]
    panels, xs, outs = flat(w), flat(x), flat(out)
    if tokens == 1:
        one_token(panels, columns, xs, outs, rows, lo, hi)
        return
    size = columns * LANES
    for p in range(lo, hi, PANEL_GROUP):
        group = Panels(panels, p * size, size, min(PANEL_GROUP, hi - p))
        group_times_rows(group, xs, columns, outs, rows, p * LANES, 0, tokens)


@inline_kernel
def one_token(panels, columns, xs, outs, rows, lo, hi):
    """panels_matmul for one token. Memory is the limit: four streams of panels far apart are read in turn."""
    step = max(0, min(hi, rows // LANES) - lo) // STREAMS
    for p in range(lo, lo + step):
        for k in range(0, columns, K_BLOCK):
            runs, count = Rows(panels, (p * columns + k) * LANES, step * columns * LANES), min(K_BLOCK, columns - k)
            token_times_panels(runs, xs, k, count, outs, p, step, k > 0)
    for p in range(lo + STREAMS * step, hi):
        for k in range(0, columns, K_BLOCK):
            s = f32_zero()
            for i in range(k, min(k + K_BLOCK, columns)):
                s = fma(load(panels, (p * columns + i) * LANES), splat_at(xs, i), s)
            put(outs, p * LANES, s, rows - p * LANES, k > 0)


@inline_kernel
def share_chunks(tokens, share):
    """How many chunks a share of the panels is cut into, and how many panels a chunk has; one token has one chunk."""
    count = share.hi - share.lo
    size = max(1, count) if share.alone or tokens == 1 else chunk_size(count)
    return (count + size - 1) // size, size


@part_kernel
def panels_matmul_share(w, x, out, share, chunk):
    """panels_matmul of ``chunk``, and of the chunks of a share of the panels after it that no thread has claimed.

    Returns the first chunk number after these (``threads.team``).
    """
    chunks, size = share_chunks(x.shape[0], share)
    while chunk < chunks:
        first = share.lo + chunk * size
        panels_matmul_part(w, x, out, first, min(first + size, share.hi))
        chunk = take_chunk(share)
    return chunk


@kernel(strict=True)
def panels_matmul(w, x, out, lo, hi):
    """out[t, r] = sum_k W[r, k] x[t, k] for the rows of panels lo:hi, in tiles (see matmul/tile.py), or for one token.

    Sums are taken in one order whatever the number of tokens: a token's result does not depend on its neighbours.

    w (P, K, 16) panels; x (T, K); out (T, rows), C-contiguous.
    """
    panels_matmul_part(w, x, out, lo, hi)


@parallel_kernel
def panels_matmul_parallel(w, x, out, counts, threads):
    """panels_matmul with the panels split over threads: each output is one thread's, so any split gives the same.

    Of many rows, a thread that finishes steals chunks from the others. counts: chunk_counters(threads).
    """
    panels = w.shape[0]
    for t in prange(threads):
        if x.shape[0] == 1:
            lo, hi = part(panels, t, threads)
            panels_matmul_part(w, x, out, lo, hi)
        else:
            for i in range(threads):
                member = (t + i) % threads
                share = share_of(panels, counts, member * COUNTER_STRIDE, member, threads)
                panels_matmul_share(w, x, out, share, take_chunk(share))


@kernel
def pack_panels(rows, panels, lo, hi):
    """panels[p, k, j] = rows[16 p + j, k] for panels lo:hi; rows past the end are zero. Both of one dtype."""
    count, columns = rows.shape
    for p in range(lo, hi):
        first = p * LANES
        if first + LANES <= count:
            for k in range(columns):
                for j in range(LANES):
                    panels[p, k, j] = rows[first + j, k]
        else:
            for k in range(columns):
                for j in range(LANES):
                    panels[p, k, j] = rows[first + j, k] if first + j < count else 0


@kernel
def halve(x, out):
    """out (n,) uint16 = x (n,) float32 rounded to IEEE half floats, nearest even."""
    for i in range(x.shape[0]):
        out[i] = f32_to_f16(x[i])


@kernel
def unpack_panel_rows(panels, ids, row16, out):
    """out[i] (K,) float32 = row ids[i] of the packed matrix; ``row16``: scratch for 16 elements as stored."""
    columns = panels.shape[1]
    for i in range(ids.shape[0]):
        panel, lane, row = panels[ids[i] // LANES], ids[i] % LANES, out[i]
        for k in range(0, columns, LANES):
            count = min(LANES, columns - k)
            for j in range(count):
                row16[j] = panel[k + j, lane]
            f32_store_first(row, k, load(row16, 0), count)


def take_rows(panels: np.ndarray, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows ids (T,) int64 of the packed matrix into out (T, K) float32: embeddings looked up in a tied head."""
    unpack_panel_rows(panels, ids, np.zeros(LANES, panels.dtype), out)
    return out


def linear_panels(w: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out (T, rows) = x (T, K) . W^T for packed weights w (P, K, 16), K >= 1.

    For callers that own their buffers (``model.Linear``) and guarantee their sizes.
    """
    worth = PARALLEL_MACS if x.shape[0] == 1 else PARALLEL_TILE_MACS
    threads = threads_for(x.shape[0] * w.size, worth, w.shape[0])
    if threads == 1:
        panels_matmul(w, x, out, 0, w.shape[0])
    else:
        launch(panels_matmul_parallel, w, x, out, chunk_counters(threads), threads)
    return out


def pack(rows: np.ndarray, panels: np.ndarray) -> None:
    """Write rows (n, K) into panels (ceil(n/16), K, 16) of the same dtype."""
    pack_panels(rows, panels, 0, len(panels))
