"""Every kernel in plain NumPy float64: the oracle that tests and the laboratory compare with."""

from itertools import pairwise
from typing import Any

import numpy as np

from ruvllm.kernels.reference import quant

dequantize, quantize_int4, quantize_int8 = quant.dequantize, quant.quantize_int4, quant.quantize_int8
quantize_activations, quant_matmul = quant.quantize_activations, quant.quant_matmul


def _f64(*arrays: Any) -> Any:
    """The arguments as float64 arrays."""
    converted = [np.asarray(a, np.float64) for a in arrays]
    return converted[0] if len(converted) == 1 else converted


# --- norms and activations, over the last axis ------------------------------------------------------------------


def rms_norm(x: Any, weight: Any, eps: float = 1e-5) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight."""
    x, weight = _f64(x, weight)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """rms_norm of s = residual + x, and s; the arguments stay as they are."""
    s = add(residual, x)
    return rms_norm(s, weight, eps), s


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


def top_k(x: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of x (n,) in falling order, of equal ones the first, and their indices."""
    order = np.argsort(-_f64(x), kind="stable")[:k]
    return _f64(x)[order], order


def apply_repetition_penalty(logits: Any, ids: Any, penalty: float) -> np.ndarray:
    """logits / penalty where positive, else logits * penalty, at each of ids once."""
    x, seen = _f64(logits).copy(), np.unique(ids)
    x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    return x


def sample(
    logits: Any, u: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The token whose probability takes the running sum past u: in falling order, or as they lie without filters."""
    x = _f64(logits)
    ids = np.arange(x.size) if not 0 < top_k < x.size and top_p == 1 and not min_p else np.argsort(-x, kind="stable")
    ids = ids[: top_k or x.size]
    p = softmax(x[ids])
    if top_p < 1:
        ids = ids[: np.searchsorted(np.cumsum(p), top_p) + 1]
    if min_p:
        ids = ids[p[: len(ids)] >= min_p * p[0]]
    running = np.cumsum(softmax(x[ids] / temperature))
    return ids[min(int(np.searchsorted(running, u, side="right")), len(ids) - 1)]


def silu_mul(gate: Any, up: Any) -> np.ndarray:
    """gate * sigmoid(gate) * up."""
    gate, up = _f64(gate, up)
    return gate / (1 + np.exp(-gate)) * up


def gelu_mul(gate: Any, up: Any) -> np.ndarray:
    """gelu(gate) * up, gelu by its tanh approximation."""
    gate, up = _f64(gate, up)
    return np.asarray(gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 * up)


def softcap(x: Any, cap: float) -> np.ndarray:
    """cap * tanh(x / cap)."""
    return np.asarray(cap * np.tanh(_f64(x) / cap))


def clamped_swiglu(gate: Any, up: Any, limit: float = 7.0, alpha: float = 1.702) -> np.ndarray:
    """(clip(up) + 1) * g * sigmoid(alpha * g), g = min(gate, limit)."""
    gate, up = _f64(gate, up)
    gate = np.minimum(gate, limit)
    return np.asarray((np.clip(up, -limit, limit) + 1) * gate / (1 + np.exp(-alpha * gate)))


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


def grouped_gemm(a: Any, b: Any, sizes: Any, transposed: bool = False) -> np.ndarray:
    """Each group of rows of A times its matrix."""
    a, b = _f64(a, b)
    b = np.swapaxes(b, 1, 2) if transposed else b
    groups = np.split(a, np.cumsum(sizes)[:-1])
    return np.concatenate([rows @ matrix for rows, matrix in zip(groups, b, strict=True)])


# --- attention ----------------------------------------------------------------------------------------------------


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
) -> np.ndarray:
    """softmax(scale q k^T + mask) v: q (..., T, H, D), k and v (..., S, KV, D), query t at position S - T + t."""
    q, k, v = _f64(q, k, v)
    tokens, heads, dim = q.shape[-3:]
    length, kv_heads = k.shape[-3:-1]
    k, v = (np.repeat(a, heads // kv_heads, axis=-2) for a in (k, v))
    q, k, v = (np.swapaxes(a, -3, -2) for a in (q, k, v))  # (..., H, T or S, D)
    scores = q @ np.swapaxes(k, -2, -1) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if causal:
        at = np.arange(length - tokens, length)[:, None]
        s = np.arange(length)
        seen = s <= at
        if window is not None:
            seen &= s > at - window
        scores = np.where(seen, scores, -np.inf)
    if sinks is not None:  # one more position, whose value is 0
        sink = np.broadcast_to(_f64(sinks)[:, None, None], (*scores.shape[:-1], 1))
        return np.swapaxes(softmax(np.concatenate((scores, sink), -1))[..., :-1] @ v, -3, -2)
    return np.swapaxes(softmax(scores) @ v, -3, -2)


def ragged_attention(
    q: Any, k: Any, v: Any, cu_seqlens: Any, cu_seqlens_k: Any = None, **options: Any
) -> np.ndarray:
    """flash_attention of each sequence: rows cu_seqlens[i] : cu_seqlens[i + 1] of q, and those of k and v."""
    starts = np.asarray(cu_seqlens)
    key_starts = starts if cu_seqlens_k is None else np.asarray(cu_seqlens_k)
    out = np.zeros(np.shape(q))
    for (lo, hi), (first, end) in zip(pairwise(starts), pairwise(key_starts), strict=True):
        if hi > lo:
            out[lo:hi] = flash_attention(q[lo:hi], k[first:end], v[first:end], **options)
    return out


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


def kv_append(k: Any, v: Any, keys: Any, values: Any, positions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Copies of keys (KV, B, D, 16) and values (KV, 16 B, DV) that hold k, v (T, KV, D) at positions (T,)."""
    k, v = _f64(k, v)
    keys, values = np.array(keys, np.float64), np.array(values, np.float64)
    for t, p in enumerate(np.asarray(positions)):
        keys[:, p // 16, :, p % 16] = k[t]
        values[:, p, : v.shape[2]] = v[t]
    return keys, values


# --- rotary positions ---------------------------------------------------------------------------------------------


def apply_rope_tables(x: Any, cos: Any, sin: Any, interleaved: bool = False, inverse: bool = False) -> np.ndarray:
    """Pair i of each head, as a complex number, times cos[t, i] + j sin[t, i]: x (..., T, H, D), tables (T, R/2)."""
    x, cos, sin = _f64(x, cos, sin)
    half = cos.shape[-1]
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    z = (x[..., first] + 1j * x[..., second]) * (cos - 1j * sin if inverse else cos + 1j * sin)[:, None]
    y = x.copy()
    y[..., first], y[..., second] = z.real, z.imag
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


def lora_forward_add(x: Any, a: Any, b: Any, scaling: float, out: Any) -> np.ndarray:
    """out + scaling (x A) B; the arguments stay as they are."""
    return _f64(out) + lora_forward(x, a, b, scaling)


def lora_accumulate_grad(
    x: Any, dy: Any, a: Any, b: Any, scaling: float, grad_a: Any, grad_b: Any
) -> tuple[np.ndarray, np.ndarray]:
    """grad_a + scaling x^T (dy B^T) and grad_b + scaling (x A)^T dy, over all rows; the arguments stay as they are."""
    x, dy, a, b = _f64(x, dy, a, b)
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return _f64(grad_a) + scaling * x.T @ (dy @ b.T), _f64(grad_b) + scaling * (x @ a).T @ dy


# --- training -----------------------------------------------------------------------------------------------------


def rms_norm_backward(x: Any, weight: Any, dy: Any, eps: float = 1e-5, add: bool = False) -> np.ndarray:
    """The gradient of x in rms_norm."""
    x, weight, dy = _f64(x, weight, dy)
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return r * weight * dy - x * r**3 * np.mean(weight * dy * x, axis=-1, keepdims=True)


def silu_mul_backward(gate: Any, up: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of gate and up in silu_mul."""
    gate, up, dy = _f64(gate, up, dy)
    s = 1 / (1 + np.exp(-gate))
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def cross_entropy(logits: Any, targets: Any, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and scale (softmax - onehot)."""
    x, rows = _f64(logits), np.arange(len(targets))
    p = softmax(x)
    losses = -np.log(p[rows, targets])
    p[rows, targets] -= 1
    return losses, scale * p


def adamw(
    parameters: Any, grad: Any, m: Any, v: Any, step: int, settings: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, m and v after a step; the arguments stay as they are."""
    lr, beta1, beta2, eps, weight_decay = settings
    p, g, m, v = _f64(parameters, grad, m, v)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    seen, size = m / (1 - beta1**step), np.sqrt(v / (1 - beta2**step))
    return p - lr * weight_decay * p - lr * seen / (size + eps), m, v


def attention_backward(
    q: Any, k: Any, v: Any, do: Any, starts: Any = None, window: int | None = None, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of q, k, v in causal attention, sequence by sequence and head by head."""
    q, k, v, do = _f64(q, k, v, do)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    tokens, heads, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    starts = [0, tokens] if starts is None else starts
    for a, b in pairwise(starts):
        t = np.arange(b - a)
        seen = (t[None] <= t[:, None]) & (t[None] > t[:, None] - (window or tokens + 1))
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            p = softmax(np.where(seen, factor * q[a:b, h] @ k[a:b, kv].T, -np.inf)) if b > a else np.zeros((0, 0))
            dp = do[a:b, h] @ v[a:b, kv].T
            ds = factor * p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
            dq[a:b, h] = ds @ k[a:b, kv]
            dk[a:b, kv] += ds.T @ q[a:b, h]
            dv[a:b, kv] += p.T @ do[a:b, h]
    return dq, dk, dv
