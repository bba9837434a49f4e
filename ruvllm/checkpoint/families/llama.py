"""LLaMA, Mistral, Ministral and Mixtral: one architecture in GGUF files, four in config.json."""

from __future__ import annotations

from typing import Any

from ruvllm.checkpoint.families.choices import biased, gguf_expert_values, gguf_experts, windows
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ExpertsConfig, ModelConfig


def _llama(keys: Fields, sizes: Sizes) -> Choices:
    _require_layer_types(keys, None)
    return biased(keys) | {"mlp_bias": bool(keys.get("mlp_bias", bool))}


def _mistral(keys: Fields, sizes: Sizes) -> Choices:
    window = keys.get("sliding_window", int)
    _require_layer_types(keys, window)
    return {"sliding_window": window}


def _ministral(keys: Fields, sizes: Sizes) -> Choices:
    return windows(keys, sizes, keys.get("sliding_window", int), lambda i: True)


def _mixtral(keys: Fields, sizes: Sizes) -> Choices:
    window = keys.get("sliding_window", int)
    _require_layer_types(keys, window)
    experts = ExpertsConfig(
        count=keys.default("num_local_experts", int, 8), per_token=keys.default("num_experts_per_tok", int, 2),
        intermediate_size=keys.require("intermediate_size", int),
    )  # fmt: skip
    return {"sliding_window": window, "experts": experts}


def _require_layer_types(keys: Fields, window: int | None) -> None:
    """All layers of these families attend alike: refuse other layer types."""
    expected = "full_attention" if window is None else "sliding_attention"
    for kind in keys.get("layer_types", list) or []:
        if kind != expected:
            raise keys.error("layer_types", kind, f"{expected!r} in every layer")


def _gguf(meta: Fields, sizes: Sizes) -> Choices:
    choices: Choices = {"sliding_window": meta.get("attention.sliding_window", int) or None}
    if meta.get("expert_count", int):
        choices |= gguf_experts(meta, "feed_forward_length") | {"model_type": "mixtral"}
    return choices


def _gguf_values(config: ModelConfig) -> dict[str, Any]:
    window = {} if config.sliding_window is None else {"attention.sliding_window": config.sliding_window}
    experts = gguf_expert_values(config)
    experts.pop("expert_feed_forward_length", None)
    return window | experts


LLAMA = Family(
    model_type="llama", classes=("LlamaForCausalLM",), architecture="llama", hf_choices=_llama, gguf_choices=_gguf,
    gguf_values=_gguf_values, interleaved=True, defaults={"max_position_embeddings": 2048},
)  # fmt: skip
MISTRAL = Family(
    model_type="mistral", classes=("MistralForCausalLM",), architecture="llama", hf_choices=_mistral,
    gguf_values=_gguf_values, interleaved=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)  # fmt: skip
MINISTRAL = Family(
    model_type="ministral", classes=("MinistralForCausalLM",), architecture="llama", hf_choices=_ministral,
    gguf_values=_gguf_values, interleaved=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)  # fmt: skip
MIXTRAL = Family(
    model_type="mixtral", classes=("MixtralForCausalLM",), architecture="llama", hf_choices=_mixtral,
    gguf_values=_gguf_values, interleaved=True,
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    hf_names={
        "router": "block_sparse_moe.gate.weight", "experts.gate": "block_sparse_moe.experts.{x}.w1.weight",
        "experts.up": "block_sparse_moe.experts.{x}.w3.weight",
        "experts.down": "block_sparse_moe.experts.{x}.w2.weight",
    },
)  # fmt: skip
