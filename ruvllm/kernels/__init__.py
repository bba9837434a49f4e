"""The public kernels, and KERNELS: each kernel's record by name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruvllm.kernels.activation import gelu_mul, silu_mul, softmax
    from ruvllm.kernels.attention.flash import flash_attention
    from ruvllm.kernels.attention.kv import kv_append
    from ruvllm.kernels.attention.public import (
        grouped_query_attention,
        multi_query_attention,
        paged_attention,
        softmax_attention,
    )
    from ruvllm.kernels.attention.ragged import ragged_attention
    from ruvllm.kernels.bandwidth import buffer_sum, read_bandwidth
    from ruvllm.kernels.bounded import clamped_swiglu, softcap
    from ruvllm.kernels.lora.public import lora_forward, lora_forward_add
    from ruvllm.kernels.matmul.grouped import grouped_gemm
    from ruvllm.kernels.matmul.public import batched_gemm, gemm, gemm_nt, gemv
    from ruvllm.kernels.norm import add_rms_norm, layer_norm, rms, rms_norm
    from ruvllm.kernels.quant.public import QuantMatrix, pack_quantized, quant_matmul, quantize_activations
    from ruvllm.kernels.quant.weights import dequantize, quantize_int4, quantize_int8
    from ruvllm.kernels.rope.frequencies import rope_inv_freq, rope_tables
    from ruvllm.kernels.rope.rotate import apply_rope, apply_rope_tables
    from ruvllm.kernels.sampling.ranking import argmax, log_softmax, top_k, top_logprobs
    from ruvllm.kernels.sampling.sample import apply_repetition_penalty, sample
    from ruvllm.kernels.spec import KernelSpec
    from ruvllm.kernels.training.adamw import AdamW, adamw
    from ruvllm.kernels.training.attention import attention_backward
    from ruvllm.kernels.training.backward import rms_norm_backward, silu_mul_backward
    from ruvllm.kernels.training.lora import lora_accumulate_grad
    from ruvllm.kernels.training.loss import cross_entropy
    from ruvllm.kernels.vector import add, dot, scale

    KERNELS: dict[str, KernelSpec]

# Module -> its names, fetched when first used: what a model runs needs half of the kernels. Each has SPECS ...
_MODULES = {
    "activation": ("gelu_mul", "silu_mul", "softmax"),
    "attention.public": (
        "grouped_query_attention",
        "multi_query_attention",
        "paged_attention",
        "softmax_attention",
    ),
    "attention.flash": ("flash_attention",),
    "attention.ragged": ("ragged_attention",),
    "bandwidth": ("buffer_sum", "read_bandwidth"),
    "bounded": ("clamped_swiglu", "softcap"),
    "attention.kv": ("kv_append",),
    "lora.public": ("lora_forward", "lora_forward_add"),
    "training.lora": ("lora_accumulate_grad",),
    "matmul.public": ("batched_gemm", "gemm", "gemm_nt", "gemv"),
    "matmul.grouped": ("grouped_gemm",),
    "quant.public": ("QuantMatrix", "pack_quantized", "quant_matmul", "quantize_activations"),
    "quant.weights": ("dequantize", "quantize_int4", "quantize_int8"),
    "norm": ("add_rms_norm", "layer_norm", "rms", "rms_norm"),
    "sampling.ranking": ("argmax", "log_softmax", "top_k", "top_logprobs"),
    "rope.rotate": ("apply_rope", "apply_rope_tables"),
    "sampling.sample": ("apply_repetition_penalty", "sample"),
    "vector": ("add", "dot", "scale"),
    "training.attention": ("attention_backward",),
    "training.backward": ("rms_norm_backward", "silu_mul_backward"),
    "training.loss": ("cross_entropy",),
    "training.adamw": ("AdamW", "adamw"),
}
# ... but for these.
_WITHOUT_SPECS = {
    "rope.frequencies": ("rope_inv_freq", "rope_tables"),
    "spec": ("KernelSpec",),
}
_HOMES = {name: module for module, names in (_MODULES | _WITHOUT_SPECS).items() for name in names}

__all__ = [
    "KERNELS",
    "AdamW",
    "KernelSpec",
    "QuantMatrix",
    "adamw",
    "add",
    "add_rms_norm",
    "apply_repetition_penalty",
    "apply_rope",
    "apply_rope_tables",
    "argmax",
    "attention_backward",
    "batched_gemm",
    "buffer_sum",
    "clamped_swiglu",
    "cross_entropy",
    "dequantize",
    "dot",
    "flash_attention",
    "gelu_mul",
    "gemm",
    "gemm_nt",
    "gemv",
    "grouped_gemm",
    "grouped_query_attention",
    "kv_append",
    "layer_norm",
    "log_softmax",
    "lora_accumulate_grad",
    "lora_forward",
    "lora_forward_add",
    "multi_query_attention",
    "pack_quantized",
    "paged_attention",
    "quant_matmul",
    "quantize_activations",
    "quantize_int4",
    "quantize_int8",
    "ragged_attention",
    "read_bandwidth",
    "rms",
    "rms_norm",
    "rms_norm_backward",
    "rope_inv_freq",
    "rope_tables",
    "sample",
    "scale",
    "silu_mul",
    "silu_mul_backward",
    "softcap",
    "softmax",
    "softmax_attention",
    "top_k",
    "top_logprobs",
]


def __getattr__(name: str) -> Any:
    if name == "KERNELS":
        found = {spec.name: spec for module in _MODULES for spec in import_module(f"{__name__}.{module}").SPECS}
    elif name in _HOMES:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found  # the next use asks no more
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "KERNELS"])
