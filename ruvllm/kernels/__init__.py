"""The public kernels, and KERNELS: each kernel's record by name."""

from ruvllm.kernels import _check, activation, attention, matmul, norm, ranking, rope
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels.activation import silu_mul, softmax
from ruvllm.kernels.attention import (
    flash_attention,
    grouped_query_attention,
    multi_query_attention,
    paged_attention,
    softmax_attention,
)
from ruvllm.kernels.cached_attention import kv_append
from ruvllm.kernels.matmul import batched_gemm, gemm, gemm_nt, gemv
from ruvllm.kernels.norm import layer_norm, rms_norm
from ruvllm.kernels.ranking import argmax, log_softmax, top_logprobs
from ruvllm.kernels.rope import apply_rope, apply_rope_tables, rope_tables
from ruvllm.kernels.sampling import apply_repetition_penalty, sample

_MODULES = (activation, attention, matmul, norm, ranking, rope)
KERNELS: dict[str, KernelSpec] = {spec.name: spec for module in _MODULES for spec in module.SPECS}
