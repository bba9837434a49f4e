"""Qwen 2, 2.5 and 3, and their mixtures of experts."""

from __future__ import annotations

from ruvllm.checkpoint.families.choices import biased, gguf_expert_values, gguf_experts, sparse_layers, windows
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ExpertsConfig


def _window(keys: Fields) -> int | None:
    return keys.default("sliding_window", int, 4096) if keys.get("use_sliding_window", bool) else None


def _qwen2(keys: Fields, sizes: Sizes) -> Choices:
    first = keys.default("max_window_layers", int, 28)
    return {"attention_bias": True} | windows(keys, sizes, _window(keys), lambda i: i >= first)


def _qwen3(keys: Fields, sizes: Sizes) -> Choices:
    first = keys.default("max_window_layers", int, 28)
    return {"qk_norm": "head"} | biased(keys) | windows(keys, sizes, _window(keys), lambda i: i >= first)


def _qwen2_moe(keys: Fields, sizes: Sizes) -> Choices:
    first = keys.default("max_window_layers", int, 28)
    choices = {"attention_bias": keys.default("qkv_bias", bool, True), "experts": _experts(keys, sizes, shared=True)}
    return choices | windows(keys, sizes, _window(keys), lambda i: i % 2 == 0 and i < first)


def _qwen3_moe(keys: Fields, sizes: Sizes) -> Choices:
    choices = {"qk_norm": "head", "experts": _experts(keys, sizes, shared=False)}
    return choices | biased(keys) | windows(keys, sizes, _window(keys), lambda i: True)


def _experts(keys: Fields, sizes: Sizes, shared: bool) -> ExpertsConfig:
    count = keys.require("num_experts" if "num_experts" in keys else "num_local_experts", int)
    size = keys.require("moe_intermediate_size", int)
    shared_size = keys.require("shared_expert_intermediate_size", int) if shared else 0
    return ExpertsConfig(
        count=count, per_token=keys.require("num_experts_per_tok", int), intermediate_size=size,
        normalised=keys.default("norm_topk_prob", bool, False), layers=sparse_layers(keys, sizes),
        shared_intermediate_size=shared_size, shared_gate=shared,
    )  # fmt: skip


def _gguf_qwen2_moe(meta: Fields, sizes: Sizes) -> Choices:
    shared = meta.require("expert_shared_feed_forward_length", int)
    normalised = bool(meta.get("expert_weights_norm", bool))
    return gguf_experts(meta, normalised=normalised, shared_intermediate_size=shared, shared_gate=True)


_DEFAULTS = {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}

QWEN2 = Family(
    model_type="qwen2", classes=("Qwen2ForCausalLM",), architecture="qwen2", hf_choices=_qwen2,
    defaults=_DEFAULTS | {"num_key_value_heads": 32},
)  # fmt: skip
QWEN3 = Family(
    model_type="qwen3", classes=("Qwen3ForCausalLM",), architecture="qwen3", hf_choices=_qwen3,
    gguf_choices=lambda meta, sizes: {"qk_norm": "head"},
    defaults=_DEFAULTS | {"head_dim": 128, "num_key_value_heads": 32},
)  # fmt: skip
QWEN2_MOE = Family(
    model_type="qwen2_moe", classes=("Qwen2MoeForCausalLM",), architecture="qwen2moe", hf_choices=_qwen2_moe,
    gguf_choices=_gguf_qwen2_moe, gguf_values=gguf_expert_values,
    defaults=_DEFAULTS | {"num_key_value_heads": 16},
)  # fmt: skip
QWEN3_MOE = Family(
    model_type="qwen3_moe", classes=("Qwen3MoeForCausalLM",), architecture="qwen3moe", hf_choices=_qwen3_moe,
    gguf_choices=lambda meta, sizes: {"qk_norm": "head"} | gguf_experts(meta),
    gguf_values=gguf_expert_values,
    defaults=_DEFAULTS | {"num_key_value_heads": 4},
)  # fmt: skip
