"""GPT-OSS: attention sinks, alternating windows, experts with clamped SwiGLU and biases."""

from __future__ import annotations

from typing import Any

from ruvllm.checkpoint.families.choices import (
    gguf_expert_values,
    gguf_experts,
    gguf_window_values,
    gguf_windows,
    windows,
)
from ruvllm.checkpoint.family import Choices, Family, Place, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ExpertsConfig, ModelConfig

_COMMON: Choices = {
    "attention_bias": True, "attention_out_bias": True, "attention_sinks": True, "hidden_act": "clamped_swiglu",
}  # fmt: skip


def _slides(layer: int) -> bool:
    return layer % 2 == 0


def _gpt_oss(keys: Fields, sizes: Sizes) -> Choices:
    bias = keys.default("attention_bias", bool, True)
    experts = ExpertsConfig(
        count=keys.default("num_local_experts", int, 128), per_token=keys.default("num_experts_per_tok", int, 4),
        intermediate_size=keys.require("intermediate_size", int), bias=True,
    )  # fmt: skip
    return {
        **_COMMON, "attention_bias": bias, "attention_out_bias": bias, "experts": experts,
        "swiglu_limit": keys.default("swiglu_limit", float, 7.0),
        "swiglu_alpha": keys.default("swiglu_alpha", float, 1.702),
        **windows(keys, sizes, keys.default("sliding_window", int, 128), _slides),
    }  # fmt: skip


def _gguf(meta: Fields, sizes: Sizes) -> Choices:
    window = meta.require("attention.sliding_window", int)
    return _COMMON | gguf_experts(meta, bias=True) | gguf_windows(meta, sizes, window, 2)


def _gguf_values(config: ModelConfig) -> dict[str, Any]:
    return gguf_window_values(config, 2) | gguf_expert_values(config)


def _hf_fused(config: ModelConfig) -> dict[str, Place]:
    """Gate and up interleaved in the columns of one tensor (experts, inputs, outputs), and in one of biases."""
    assert config.experts is not None
    F = config.experts.intermediate_size
    gate, up = range(0, 2 * F, 2), range(1, 2 * F, 2)
    weights, biases = "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"
    return {
        "experts.gate": Place(weights, gate, 2 * F, transposed=True),
        "experts.up": Place(weights, up, 2 * F, transposed=True),
        "experts.down": Place("mlp.experts.down_proj", transposed=True),
        "experts.gate_bias": Place(biases, gate, 2 * F), "experts.up_bias": Place(biases, up, 2 * F),
    }  # fmt: skip


_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

GPT_OSS = Family(
    model_type="gpt_oss", classes=("GptOssForCausalLM",), architecture="gpt-oss", hf_choices=_gpt_oss,
    gguf_choices=_gguf, gguf_values=_gguf_values, hf_fused=_hf_fused,
    hf_names={
        "router": "mlp.router.weight", "router_bias": "mlp.router.bias",
        "experts.down_bias": "mlp.experts.down_proj_bias",
    },
    gguf_names={"mlp_norm": "post_attention_norm.weight"},
    defaults={
        "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "rope_parameters": _YARN, "max_position_embeddings": 131072, "bos_token_id": None, "eos_token_id": None,
    },
)  # fmt: skip
