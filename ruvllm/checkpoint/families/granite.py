"""Granite: LLaMA with four multipliers."""

from __future__ import annotations

from typing import Any

from ruvllm.checkpoint.families.choices import biased
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ModelConfig

# Fields of ModelConfig, which are the keys of config.json, and the keys of GGUF files.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale", "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip


def _granite(keys: Fields, sizes: Sizes) -> Choices:
    multipliers = {name: keys.default(name, float, 1.0) for name in _MULTIPLIERS}
    return biased(keys) | {"mlp_bias": bool(keys.get("mlp_bias", bool))} | multipliers


def _gguf(meta: Fields, sizes: Sizes) -> Choices:
    found = {name: meta.get(key, float) for name, key in _MULTIPLIERS.items()}
    return {name: value for name, value in found.items() if value}  # llama.cpp reads 0 as "none"


def _gguf_values(config: ModelConfig) -> dict[str, Any]:
    return {key: float(getattr(config, name) or config.attention_scale) for name, key in _MULTIPLIERS.items()}


GRANITE = Family(
    model_type="granite", classes=("GraniteForCausalLM",), architecture="granite", hf_choices=_granite,
    gguf_choices=_gguf, gguf_values=_gguf_values, interleaved=True, defaults={"max_position_embeddings": 2048},
)  # fmt: skip
