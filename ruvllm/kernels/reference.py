"""Every kernel in plain NumPy float64: the oracle that tests and the laboratory compare with."""

from typing import Any

import numpy as np


def _f64(*arrays: Any) -> Any:
    """The arguments as float64 arrays."""
    converted = [np.asarray(a, np.float64) for a in arrays]
    return converted[0] if len(converted) == 1 else converted


# --- norms and activations, over the last axis ------------------------------------------------------------------


def rms_norm(x: Any, weight: Any, eps: float = 1e-5) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight."""
    x, weight = _f64(x, weight)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rms(x: Any) -> np.ndarray:
    """sqrt(mean(x^2))."""
    return np.sqrt(np.mean(_f64(x) ** 2, axis=-1))


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> np.ndarray:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""
    x, weight = _f64(x, weight)
    y = (x - np.mean(x, axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + eps) * weight
    return y if bias is None else y + _f64(bias)


def softmax(x: Any) -> np.ndarray:
    """exp(x - max(x)) / sum(exp(x - max(x)))."""
    x = _f64(x)
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def log_softmax(x: Any) -> np.ndarray:
    """x - max(x) - log(sum(exp(x - max(x))))."""
    x = _f64(x)
    shifted = x - np.max(x, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def argmax(x: Any) -> np.ndarray:
    """Index of the first maximum over the last axis."""
    return np.argmax(_f64(x), axis=-1)


def silu_mul(gate: Any, up: Any) -> np.ndarray:
    """gate * sigmoid(gate) * up."""
    gate, up = _f64(gate, up)
    return gate / (1 + np.exp(-gate)) * up


# --- vectors and matrices -----------------------------------------------------------------------------------------


def dot(a: Any, b: Any) -> np.ndarray:
    """sum(a * b) over the last axis."""
    a, b = _f64(a, b)
    return np.sum(a * b, axis=-1)


def buffer_sum(x: Any) -> np.ndarray:
    """sum(x)."""
    return np.sum(_f64(x))


def scale(x: Any, factor: float) -> np.ndarray:
    """factor * x."""
    return np.float64(factor) * _f64(x)


def add(a: Any, b: Any) -> np.ndarray:
    """a + b."""
    a, b = _f64(a, b)
    return a + b


def gemv(a: Any, x: Any) -> np.ndarray:
    """A x."""
    a, x = _f64(a, x)
    return a @ x


def gemm(a: Any, b: Any) -> np.ndarray:
    """A B; leading dimensions of A are stacked rows."""
    a, b = _f64(a, b)
    return a @ b


def gemm_nt(a: Any, b: Any) -> np.ndarray:
    """A B^T."""
    a, b = _f64(a, b)
    return a @ b.T


def batched_gemm(a: Any, b: Any) -> np.ndarray:
    """A[i] B[i] for each i of the leading dimensions."""
    return gemm(a, b)


# --- attention ----------------------------------------------------------------------------------------------------


def flash_attention(
    q: Any, k: Any, v: Any, causal: bool = True, window: int | None = None, scale: float | None = None
) -> np.ndarray:
    """softmax(scale q k^T + mask) v: q (..., T, H, D), k and v (..., S, KV, D), query t at position S - T + t."""
    q, k, v = _f64(q, k, v)
    tokens, heads, dim = q.shape[-3:]
    length, kv_heads = k.shape[-3:-1]
    k, v = (np.repeat(a, heads // kv_heads, axis=-2) for a in (k, v))
    scores = np.einsum("...thd,...shd->...hts", q, k) * (dim**-0.5 if scale is None else scale)
    if causal:
        at = np.arange(length - tokens, length)[:, None]
        s = np.arange(length)
        seen = s <= at
        if window is not None:
            seen &= s > at - window
        scores = np.where(seen, scores, -np.inf)
    return np.einsum("...hts,...shd->...thd", softmax(scores), v)


def grouped_query_attention(q: Any, k: Any, v: Any, scale: float | None = None) -> np.ndarray:
    """softmax(scale q k^T) v of one token: q (H, D), k and v (S, KV, D)."""
    return flash_attention(_f64(q)[None], k, v, causal=False, scale=scale)[0]


def multi_query_attention(q: Any, k: Any, v: Any, scale: float | None = None) -> np.ndarray:
    """softmax(scale q k^T) v of one token whose heads share one kv head: q (H, D), k and v (S, D)."""
    return grouped_query_attention(q, _f64(k)[:, None], _f64(v)[:, None], scale)


def softmax_attention(q: Any, k: Any, v: Any, scale: float | None = None) -> np.ndarray:
    """softmax(scale q k^T) v of one query and one head: q (D,), k and v (S, D)."""
    return multi_query_attention(_f64(q)[None], k, v, scale)[0]


def paged_attention(
    q: Any, k_pool: Any, v_pool: Any, block_table: Any, length: int, scale: float | None = None
) -> np.ndarray:
    """grouped_query_attention over row s = row s % block_size of block block_table[s // block_size]."""
    k, v = (_f64(pool)[np.asarray(block_table)].reshape(-1, *pool.shape[2:])[:length] for pool in (k_pool, v_pool))
    return grouped_query_attention(q, k, v, scale)


# --- rotary positions ---------------------------------------------------------------------------------------------


def apply_rope_tables(x: Any, cos: Any, sin: Any, interleaved: bool = False, inverse: bool = False) -> np.ndarray:
    """Pair i of each head, as a complex number, times cos[t, i] + j sin[t, i]: x (..., T, H, D), tables (T, D/2)."""
    x, cos, sin = _f64(x, cos, sin)
    half = x.shape[-1] // 2
    turn = (cos - 1j * sin if inverse else cos + 1j * sin)[:, None]
    y = np.empty_like(x)
    if interleaved:
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        y[..., 0::2], y[..., 1::2] = z.real, z.imag
    else:
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        y[..., :half], y[..., half:] = z.real, z.imag
    return y


def apply_rope(x: Any, positions: Any, inv_freq: Any, interleaved: bool = False, inverse: bool = False) -> np.ndarray:
    """apply_rope_tables at angle positions[t] * inv_freq[i]."""
    angles = _f64(positions)[:, None] * _f64(inv_freq)
    return apply_rope_tables(x, np.cos(angles), np.sin(angles), interleaved, inverse)


# --- low-rank adapters --------------------------------------------------------------------------------------------


def lora_forward(x: Any, a: Any, b: Any, scaling: float) -> np.ndarray:
    """scaling (x A) B."""
    x, a, b = _f64(x, a, b)
    return scaling * (x @ a @ b)


def lora_accumulate_grad(
    x: Any, dy: Any, a: Any, b: Any, scaling: float, grad_a: Any, grad_b: Any
) -> tuple[np.ndarray, np.ndarray]:
    """grad_a + scaling x^T (dy B^T) and grad_b + scaling (x A)^T dy, over all rows; the arguments stay as they are."""
    x, dy, a, b = _f64(x, dy, a, b)
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return _f64(grad_a) + scaling * x.T @ (dy @ b.T), _f64(grad_b) + scaling * (x @ a).T @ dy
