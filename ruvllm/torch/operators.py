"""Kernels as operators of ``torch.library``: torch.ops.ruvllm.rms_norm and others.

An operator computes in float32. Tensors of float16 and bfloat16 are widened, and the result has the dtype of ``x``.
Each function here is the operator. The one below it tells the shapes of the results for fake tensors, unless the result
has the shape of the first argument.
"""

from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from torch import Tensor

import ruvllm.kernels as K
from ruvllm.kernels.matmul.panels import linear_panels, pack, panel_count
from ruvllm.kernels.memory import weights_empty
from ruvllm.kernels.quant.layout import INT4, INT8
from ruvllm.kernels.quant.panels import Panels


def _array(x: Tensor) -> np.ndarray:
    """A tensor as a float32 array: a view of float32 tensors."""
    return x.detach().to(torch.float32).numpy()


def _operator(name: str, mutates: tuple[str, ...] = ()) -> Any:
    return torch.library.custom_op(f"ruvllm::{name}", mutates_args=mutates, device_types="cpu")


def _same_shape(operator: Any) -> Any:
    """The result of an operator has the shape and dtype of its first argument."""
    operator.register_fake(lambda first, *others, **options: first.new_empty(first.shape))
    return operator


def _like(x: Tensor, y: np.ndarray) -> Tensor:
    return torch.from_numpy(y).to(x.dtype)


@_same_shape
@_operator("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return _like(x, K.rms_norm(_array(x), _array(weight), eps))


@_operator("add_rms_norm")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of residual + x, and the sum; nothing is changed in place."""
    y, total = K.add_rms_norm(_array(x), _array(residual).copy(), _array(weight), eps)
    return _like(x, y), _like(residual, total)


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


@_same_shape
@_operator("silu_mul")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _like(gate, K.silu_mul(_array(gate), _array(up)))


@_same_shape
@_operator("gelu_mul")
def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, gelu by its tanh approximation."""
    return _like(gate, K.gelu_mul(_array(gate), _array(up)))


@_same_shape
@_operator("rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (..., T, H, D) rotated by the angles whose cos and sin (T, R/2) are given."""
    return _like(x, K.apply_rope_tables(_array(x), _array(cos), _array(sin), interleaved))


@_same_shape
@_operator("attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v: q (..., T, H, D), k and v (..., S, KV, D), query t at position S - T + t."""
    return _like(q, K.flash_attention(_array(q), _array(k), _array(v), causal, window, scale))


# --- linear layers on packed weights ------------------------------------------------------------------------------


def pack_float(weight: Tensor) -> Tensor:
    """W (N, K) as float32 panels (ceil(N / 16), K, 16), for ``linear``."""
    rows = _array(weight)
    panels = weights_empty((panel_count(len(rows)), rows.shape[1], 16))
    pack(np.ascontiguousarray(rows), panels)
    return torch.from_numpy(panels)


def pack_int8(weight: Tensor) -> Tensor:
    """W (N, K) in 8 bits as blocks, for ``quant_linear`` with bits=8."""
    return torch.from_numpy(K.pack_quantized(*K.quantize_int8(_array(weight))).panels.blocks)


def pack_int4(weight: Tensor) -> Tensor:
    """W (N, K) in 4 bits with mins as blocks, for ``quant_linear`` with bits=4."""
    return torch.from_numpy(K.pack_quantized(*K.quantize_int4(_array(weight), symmetric=False)).panels.blocks)


@_operator("linear")
def linear(x: Tensor, panels: Tensor, rows: int) -> Tensor:
    """x W^T, W of so many rows as packed by ``pack_float``; x (..., K)."""
    flat = np.ascontiguousarray(_array(x).reshape(-1, x.shape[-1]))
    out = np.empty((len(flat), rows), np.float32)
    if out.size:
        linear_panels(panels.numpy(), flat, out)
    return _like(x, out.reshape(*x.shape[:-1], rows))


@linear.register_fake
def _(x: Tensor, panels: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@_operator("quant_linear")
def quant_linear(x: Tensor, blocks: Tensor, rows: int, bits: int) -> Tensor:
    """x W^T, W of so many rows as packed by ``pack_int8`` or ``pack_int4``; x (..., K) is rounded to 8 bits."""
    panels = Panels(INT8 if bits == 8 else INT4, bits == 4, blocks.numpy())
    return _like(x, K.quant_matmul(_array(x), K.QuantMatrix(panels, (rows, x.shape[-1]))))


@quant_linear.register_fake
def _(x: Tensor, blocks: Tensor, rows: int, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
