"""Attention of one token over plain arrays: rows of keys and values, or blocks of a pool."""

import math
from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.attention.decode import chunk_count, merge_chunks, partial_width
from ruvllm.kernels.attention.paged import attend_paged, attend_paged_parallel, paged_scratch_size
from ruvllm.kernels.jit.decorators import inline_kernel
from ruvllm.kernels.jit.small_calls import SCRATCH, apart, new_output, small_call
from ruvllm.kernels.jit.views import address, array_at
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import scratch
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.pool import PARALLEL_MACS, launch, threads_for

_ONE_BLOCK = np.zeros(1, np.int64)  # the table of a sequence that lies in one block
_FEW_MACS = 2 * PARALLEL_MACS  # multiply-adds (scores and weighted values) below which a token takes one thread
_LARGEST = float(np.finfo(np.float32).max)
_chunk_count, _partial_width = inline_kernel(chunk_count), inline_kernel(partial_width)
_paged_scratch_size = inline_kernel(paged_scratch_size)


def paged_attention(
    q: np.ndarray,
    k_pool: np.ndarray,
    v_pool: np.ndarray,
    block_table: np.ndarray,
    length: Any,
    scale: float | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """softmax(scale q k^T) v of one token over keys and values that lie in blocks of a shared pool.

    Args:
        q: (..., H, D) float32; leading dimensions are separate sequences, which share the pools.
        k_pool, v_pool: (blocks, block_size, KV, D) float32, H a multiple of KV: head h uses kv head h // (H / KV).
        block_table: (..., n) integers; position s is row s % block_size of block block_table[s // block_size].
        length: (...) integers, positions to attend to, >= 1; a single one holds for all sequences.
        scale: 1 / sqrt(D) if None.
        out: (..., H, D) float32 to write into.

    Returns:
        (..., H, D) float32.

    Raises:
        TypeError: not float32, or a table or length that holds no integers.
        ValueError: shapes do not match, or the table is too short or points outside the pool.

    Source: Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention".
    """
    if check.is_half(out):
        return check.rounded(out, paged_attention, q, k_pool, v_pool, block_table, length, scale)
    q = check.float32("q", q, min_ndim=2)
    k = check.float32("k_pool", k_pool, ndim=4)
    v = check.float32("v_pool", v_pool, shape=k.shape)
    if q.ndim > 2:
        sequences = q.shape[:-2]
        tables = check.integers("block_table", block_table, q.ndim - 1)
        lengths = check.integers("length", length, q.ndim - 2 if np.ndim(length) else 0)
        if tables.shape[:-1] != sequences or (lengths.ndim and lengths.shape != sequences):
            found = f"{tables.shape} and length {lengths.shape}"
            raise ValueError(f"block_table: {found} do not fit q of shape {q.shape}")
        out = check.apart("out", check.output("out", out, q.shape, q), k, v)
        for one, count in zip(np.ndindex(sequences), np.broadcast_to(lengths, sequences).flat, strict=True):
            paged_attention(q[one], k, v, tables[one], int(count), scale, out[one])
        return out
    heads, dim = q.shape
    if k.shape[3] != dim or not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"q: {heads} heads of {dim} do not fit k_pool of {k.shape[2]} kv heads of {k.shape[3]}")
    table = check.integers("block_table", block_table)
    size, length = k.shape[1], check.integer("length", length)
    if not 1 <= length <= len(table) * size:
        raise ValueError(f"length: expected 1 to {len(table) * size}, found {length}")
    used = -(-length // size)
    if table[:used].min() < 0 or table[:used].max() >= len(k):
        raise ValueError(f"block_table: expected blocks 0 to {len(k) - 1}, found {table[:used].tolist()}")
    return _attend(q, k, v, table, length, scale, check.output("out", out, q.shape))


@inline_kernel
def attend_few(q, k, v, sizes, scale, scaled, memory, out):
    """One token's attention, if the work is small and its sizes fit each other.

    sizes: heads, kv heads and length of the arrays. scale: 1 / sqrt(D) unless ``scaled``. memory: float32 scratch,
    which begins with the table of the one block.
    """
    heads, kv_heads, length = sizes
    if not (heads > 0 and kv_heads > 0 and length > 0 and q.size > 0) or heads % kv_heads != 0:
        return False
    if not abs(scale) <= _LARGEST:
        return False
    dim = q.size // heads
    parts = heads * _chunk_count(length) * _partial_width(dim)
    if 2 * heads * length * dim >= _FEW_MACS or parts + LANES + _paged_scratch_size(dim, heads, kv_heads) > memory.size:
        return False
    if not (apart(out, q) and apart(out, k) and apart(out, v)):
        return False
    factor = np.float32(scale) if scaled else np.float32(1.0 / math.sqrt(dim))
    table = array_at(address(memory), 1, np.int64)
    table[0] = 0
    pool = (1, length, kv_heads, dim)
    attend_paged(
        array_at(address(q), (heads, dim), np.float32), array_at(address(k), pool, np.float32),
        array_at(address(v), pool, np.float32), table, length, factor, memory[LANES:],
        array_at(address(out), (heads, dim), np.float32),
    )  # fmt: skip
    return True


@small_call((1, 2, 2, float, bool, 1, 1))
def softmax_attention_small(q, k, v, scale, scaled, memory, out):
    """softmax_attention of fewer multiply-adds than _FEW_MACS; see attend_few."""
    if k.shape[1] != q.size or v.shape != k.shape or out.shape != q.shape:
        return False
    return attend_few(q, k, v, (1, 1, k.shape[0]), scale, scaled, memory, out)


@small_call((2, 3, 3, float, bool, 1, 2))
def grouped_query_small(q, k, v, scale, scaled, memory, out):
    """grouped_query_attention of fewer multiply-adds than _FEW_MACS; see attend_few."""
    if k.shape[2] != q.shape[1] or v.shape != k.shape or out.shape != q.shape:
        return False
    return attend_few(q, k, v, (len(q), k.shape[1], len(k)), scale, scaled, memory, out)


def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, table: np.ndarray, length: int, scale: float | None, out: np.ndarray
) -> np.ndarray:
    """paged_attention of checked arrays."""
    heads, dim = q.shape
    kv_heads = k.shape[2]
    factor = np.float32(check.attention_scale(scale, dim))
    chunks, width = chunk_count(length), partial_width(dim)
    units, size = kv_heads * chunks, paged_scratch_size(dim, heads, kv_heads)
    threads = threads_for(2 * heads * length * dim, _FEW_MACS, units)
    parts = heads * chunks * width
    memory = scratch(parts + threads * size)
    if threads == 1:
        attend_paged(q, k, v, table, length, factor, memory, out)
        return out
    launch(attend_paged_parallel, q, k, v, table, length, factor, memory, threads)
    merge_chunks(memory[:parts].reshape(heads, chunks, width), chunks, memory[:0], out, 0, heads)
    return out


def grouped_query_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """softmax(scale q k^T) v of one token: query head h attends with kv head h // (H / KV).

    Args:
        q: (..., H, D) float32; leading dimensions are separate sequences.
        k, v: (..., S, KV, D) float32, S >= 1, H a multiple of KV.
        scale: 1 / sqrt(D) if None.
        out: (..., H, D) float32 to write into.

    Returns:
        (..., H, D) float32.

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models".
    """
    y: Any = new_output(q.shape) if out is None and type(q) is np.ndarray else out
    if grouped_query_small(q, k, v, 0.0 if scale is None else scale, scale is not None, scratch(SCRATCH), y):
        return y
    if check.is_half(out):
        return check.rounded(out, grouped_query_attention, q, k, v, scale)
    q = check.float32("q", q, min_ndim=2)
    if q.ndim > 2:
        k = check.float32("k", k, shape=(*q.shape[:-2], None, None, q.shape[-1]))
        v = check.float32("v", v, shape=k.shape)
        out = check.apart("out", check.output("out", out, q.shape, q), k, v)
        for batch in np.ndindex(q.shape[:-2]):
            grouped_query_attention(q[batch], k[batch], v[batch], scale, out[batch])
        return out
    k = check.float32("k", k, ndim=3)
    length, kv_heads, dim = k.shape
    v = check.float32("v", v, shape=k.shape)
    if not length:
        raise ValueError(f"k: expected at least one position, found shape {k.shape}")
    if q.shape[1] != dim or not kv_heads or len(q) % kv_heads:
        raise ValueError(f"q: {len(q)} heads of {q.shape[1]} do not fit k of {kv_heads} kv heads of {dim}")
    return _attend(q, k[None], v[None], _ONE_BLOCK, length, scale, check.output("out", out, q.shape))


def multi_query_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """softmax(scale q k^T) v of one token whose heads share one kv head; see grouped_query_attention.

    q (..., H, D), k and v (..., S, D), result (..., H, D).

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match.

    Source: Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need".
    """
    k = check.float32("k", k, min_ndim=2)
    v = check.float32("v", v, shape=k.shape)
    return grouped_query_attention(q, k[..., None, :], v[..., None, :], scale, out)


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """softmax(scale q k^T) v of one query and one head; scale 1 / sqrt(D) if None.

    q (..., D), k and v (..., S, D), result (..., D).

    Raises:
        TypeError: not float32.
        ValueError: shapes do not match.

    Source: Vaswani et al. 2017, "Attention Is All You Need".
    """
    y: Any = new_output(q.shape) if out is None and type(q) is np.ndarray else out
    if softmax_attention_small(q, k, v, 0.0 if scale is None else scale, scale is not None, scratch(SCRATCH), y):
        return y
    if check.is_half(out):
        return check.rounded(out, softmax_attention, q, k, v, scale)
    q = check.float32("q", q, min_ndim=1)
    out = check.output("out", out, q.shape)
    if q.ndim == 1:
        k = check.float32("k", k, shape=(None, q.size))
        v = check.float32("v", v, shape=k.shape)
        if not len(k):
            raise ValueError(f"k: expected at least one position, found shape {k.shape}")
        _attend(q[None], k[None, :, None], v[None, :, None], _ONE_BLOCK, len(k), scale, out[None])
        return out
    multi_query_attention(q[..., None, :], k, v, scale, out[..., None, :])
    return out


def _one_token(rng: Any, heads: int, kv_heads: int, length: int, dim: int) -> dict[str, Any]:
    return {
        "q": rng.standard_normal((heads, dim), np.float32),
        "k": rng.standard_normal((length, kv_heads, dim), np.float32),
        "v": rng.standard_normal((length, kv_heads, dim), np.float32),
    }


def _paged(rng: Any, heads: int, kv_heads: int, length: int, dim: int, block_size: int) -> dict[str, Any]:
    blocks = -(-length // block_size)
    pool = (blocks + 2, block_size, kv_heads, dim)
    return {
        "q": rng.standard_normal((heads, dim), np.float32),
        "k_pool": rng.standard_normal(pool, np.float32),
        "v_pool": rng.standard_normal(pool, np.float32),
        "block_table": rng.permutation(blocks + 2)[:blocks],
        "length": length,
    }


SPECS = [
    KernelSpec(
        name="softmax_attention",
        function=softmax_attention,
        compiled=(attend_paged,),
        reference=reference.softmax_attention,
        formula="softmax(q k^T / sqrt(D)) v, one query, one head",
        example=lambda rng, length, dim: {
            "q": rng.standard_normal(dim, np.float32),
            "k": rng.standard_normal((length, dim), np.float32),
            "v": rng.standard_normal((length, dim), np.float32),
        },
        flops=lambda length, dim: 4.0 * length * dim,
        bytes=lambda length, dim: 8.0 * length * dim,
        sizes=grid(length=(128, 256, 512, 1024, 2048, 4096), dim=(64, 128)),
    ),
    KernelSpec(
        name="multi_query_attention",
        function=multi_query_attention,
        compiled=(attend_paged, attend_paged_parallel),
        reference=reference.multi_query_attention,
        formula="softmax(q k^T / sqrt(D)) v, one token, one kv head for all query heads",
        example=lambda rng, heads, length, dim: {
            "q": rng.standard_normal((heads, dim), np.float32),
            "k": rng.standard_normal((length, dim), np.float32),
            "v": rng.standard_normal((length, dim), np.float32),
        },
        flops=lambda heads, length, dim: 4.0 * heads * length * dim,
        bytes=lambda heads, length, dim: 8.0 * length * dim + 8.0 * heads * dim,
        sizes=({"heads": 16, "length": 128, "dim": 64}, {"heads": 32, "length": 512, "dim": 128}),
    ),
    KernelSpec(
        name="paged_attention",
        function=paged_attention,
        compiled=(attend_paged, attend_paged_parallel),
        reference=reference.paged_attention,
        formula="softmax(q k^T / sqrt(D)) v, one token, keys and values in blocks of a pool",
        example=_paged,
        flops=lambda heads, kv_heads, length, dim, block_size: 4.0 * heads * length * dim,
        bytes=lambda heads, kv_heads, length, dim, block_size: 8.0 * kv_heads * length * dim,
        sizes=(
            {"heads": 16, "kv_heads": 4, "length": 128, "dim": 64, "block_size": 16},
            {"heads": 32, "kv_heads": 8, "length": 512, "dim": 128, "block_size": 16},
        ),
    ),
    KernelSpec(
        name="grouped_query_attention",
        function=grouped_query_attention,
        compiled=(attend_paged, attend_paged_parallel),
        reference=reference.grouped_query_attention,
        formula="softmax(q k^T / sqrt(D)) v, one token, H / KV query heads per kv head",
        example=_one_token,
        flops=lambda heads, kv_heads, length, dim: 4.0 * heads * length * dim,
        bytes=lambda heads, kv_heads, length, dim: 8.0 * kv_heads * length * dim,
        sizes=(
            *grid(heads=16, kv_heads=(4, 2), length=(128, 256, 512, 4096), dim=128),
            *grid(heads=32, kv_heads=(8, 4), length=(128, 512, 2048, 8192), dim=128),
        ),
    ),
]
