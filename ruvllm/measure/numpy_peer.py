"""Our kernels' operations as a NumPy user would write them in float32, with OpenBLAS or Accelerate for products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _gemv(a: Any, x: Any) -> Callable[[], Any]:
    out = np.empty(len(a), np.float32)
    return lambda: np.dot(a, x, out=out)


def _gemm(a: Any, b: Any) -> Callable[[], Any]:
    out = np.empty((len(a), b.shape[1]), np.float32)
    return lambda: np.dot(a, b, out=out)


def _gemm_nt(a: Any, b: Any) -> Callable[[], Any]:
    out = np.empty((len(a), len(b)), np.float32)
    return lambda: np.dot(a, b.T, out=out)


def _rms_norm(x: Any, weight: Any, eps: float) -> Callable[[], Any]:
    n, small = x.shape[-1], np.float32(eps)

    def call() -> Any:
        mean_square = np.einsum("ij,ij->i", x, x)[:, None] / n
        return x / np.sqrt(mean_square + small) * weight

    return call


def _layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Callable[[], Any]:
    n, small = x.shape[-1], np.float32(eps)

    def call() -> Any:
        d = x - x.mean(-1, keepdims=True)
        variance = np.einsum("ij,ij->i", d, d)[:, None] / n
        d /= np.sqrt(variance + small)
        d *= weight
        d += bias
        return d

    return call


def _softmax_of(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    e /= e.sum(-1, keepdims=True)
    return e


def _softmax(x: Any) -> Callable[[], Any]:
    return lambda: _softmax_of(x)


def _softmax_attention(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    scaled = q * np.float32(len(q) ** -0.5)
    return lambda: _softmax_of(k @ scaled) @ v


def _grouped_query_attention(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    # The query heads that share a kv head become rows of one product; keys have the layout that BLAS reads fastest.
    heads, dim = q.shape
    kv_heads = k.shape[1]
    queries = q.reshape(kv_heads, heads // kv_heads, dim) * np.float32(dim**-0.5)
    keys, values = np.ascontiguousarray(k.transpose(1, 2, 0)), np.ascontiguousarray(v.transpose(1, 0, 2))
    return lambda: (_softmax_of(queries @ keys) @ values).reshape(heads, dim)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    a, b, out = x[..., :half], x[..., half:], np.empty_like(x)
    np.subtract(a * cos, b * sin, out=out[..., :half])
    np.add(b * cos, a * sin, out=out[..., half:])
    return out


def _apply_rope(x: Any, positions: Any, inv_freq: Any) -> Callable[[], Any]:
    def call() -> Any:
        angles = positions[:, None, None] * inv_freq
        return _rotate(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))

    return call


def _apply_rope_tables(x: Any, cos: Any, sin: Any) -> Callable[[], Any]:
    return lambda: _rotate(x, cos[:, None], sin[:, None])


def _lora_forward(x: Any, a: Any, b: Any, scaling: float) -> Callable[[], Any]:
    factor = np.float32(scaling)
    return lambda: (x @ a) * factor @ b


def _lora_forward_add(x: Any, a: Any, b: Any, scaling: float, out: Any) -> Callable[[], Any]:
    factor = np.float32(scaling)
    return lambda: np.add(out, (x @ a) * factor @ b, out=out)


def _lora_accumulate_grad(
    x: Any, dy: Any, a: Any, b: Any, scaling: float, grad_a: Any, grad_b: Any
) -> Callable[[], Any]:
    factor = np.float32(scaling)

    def call() -> Any:
        return (
            np.add(grad_a, x.T @ ((dy @ b.T) * factor), out=grad_a),
            np.add(grad_b, ((x @ a) * factor).T @ dy, out=grad_b),
        )

    return call


# By the kernel's name: takes the arguments, returns a function without arguments.
OPERATIONS: dict[str, Callable[..., Callable[[], Any]]] = {
    "apply_rope": _apply_rope,
    "apply_rope_tables": _apply_rope_tables,
    "buffer_sum": lambda x: lambda: x.sum(),
    "gemm": _gemm,
    "gemm_nt": _gemm_nt,
    "gemv": _gemv,
    "grouped_query_attention": _grouped_query_attention,
    "layer_norm": _layer_norm,
    "lora_accumulate_grad": _lora_accumulate_grad,
    "lora_forward": _lora_forward,
    "lora_forward_add": _lora_forward_add,
    "rms_norm": _rms_norm,
    "softmax": _softmax,
    "softmax_attention": _softmax_attention,
}
