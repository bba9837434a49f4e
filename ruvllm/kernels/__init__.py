"""The public kernels, and KERNELS: each kernel's record by name."""

from importlib import import_module

from ruvllm.kernels.activation import gelu_mul, silu_mul, softmax
from ruvllm.kernels.attention.kv import kv_append
from ruvllm.kernels.attention.public import (
    flash_attention,
    grouped_query_attention,
    multi_query_attention,
    paged_attention,
    softmax_attention,
)
from ruvllm.kernels.bandwidth import buffer_sum, read_bandwidth
from ruvllm.kernels.bounded import clamped_swiglu, softcap
from ruvllm.kernels.lora.public import lora_forward, lora_forward_add
from ruvllm.kernels.matmul.public import batched_gemm, gemm, gemm_nt, gemv
from ruvllm.kernels.norm import layer_norm, rms, rms_norm
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

_MODULES = (
    "activation", "attention.public", "bandwidth", "bounded", "attention.kv", "lora.public", "training.lora",
    "matmul.public", "norm", "sampling.ranking", "rope.rotate", "sampling.sample", "vector", "training.attention",
    "training.backward", "training.loss", "training.adamw",
)  # fmt: skip
KERNELS: dict[str, KernelSpec] = {
    spec.name: spec for module in _MODULES for spec in import_module(f"ruvllm.kernels.{module}").SPECS
}

__all__ = [
    "KERNELS",
    "AdamW",
    "KernelSpec",
    "adamw",
    "add",
    "apply_repetition_penalty",
    "apply_rope",
    "apply_rope_tables",
    "argmax",
    "attention_backward",
    "batched_gemm",
    "buffer_sum",
    "clamped_swiglu",
    "cross_entropy",
    "dot",
    "flash_attention",
    "gelu_mul",
    "gemm",
    "gemm_nt",
    "gemv",
    "grouped_query_attention",
    "kv_append",
    "layer_norm",
    "log_softmax",
    "lora_accumulate_grad",
    "lora_forward",
    "lora_forward_add",
    "multi_query_attention",
    "paged_attention",
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
