"""The public kernels, and KERNELS: each kernel's record by name."""

from ruvllm.kernels import (
    activation,
    attention,
    attention_grad,
    backward,
    bandwidth,
    kv,
    lora,
    lora_grad,
    loss,
    matmul,
    norm,
    optimizer,
    ranking,
    rope,
    sampling,
    vector,
)
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels.activation import gelu_mul, silu_mul, softmax
from ruvllm.kernels.attention import (
    flash_attention,
    grouped_query_attention,
    multi_query_attention,
    paged_attention,
    softmax_attention,
)
from ruvllm.kernels.attention_grad import attention_backward
from ruvllm.kernels.backward import rms_norm_backward, silu_mul_backward
from ruvllm.kernels.bandwidth import buffer_sum, read_bandwidth
from ruvllm.kernels.kv import kv_append
from ruvllm.kernels.lora import lora_forward, lora_forward_add
from ruvllm.kernels.lora_grad import lora_accumulate_grad
from ruvllm.kernels.loss import cross_entropy
from ruvllm.kernels.matmul import batched_gemm, gemm, gemm_nt, gemv
from ruvllm.kernels.norm import layer_norm, rms, rms_norm
from ruvllm.kernels.optimizer import adamw
from ruvllm.kernels.ranking import argmax, log_softmax, top_k, top_logprobs
from ruvllm.kernels.rope import apply_rope, apply_rope_tables
from ruvllm.kernels.rope_frequencies import rope_inv_freq, rope_tables
from ruvllm.kernels.sampling import apply_repetition_penalty, sample
from ruvllm.kernels.vector import add, dot, scale

_MODULES = (
    activation, attention, bandwidth, kv, lora, lora_grad, matmul, norm, ranking, rope, sampling, vector,
    attention_grad, backward, loss, optimizer,
)  # fmt: skip
KERNELS: dict[str, KernelSpec] = {spec.name: spec for module in _MODULES for spec in module.SPECS}

__all__ = [
    "KERNELS",
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
    "softmax",
    "softmax_attention",
    "top_k",
    "top_logprobs",
]
