"""Gemma 1, 2 and 3: norms stored minus one, embeddings times sqrt(E), GeGLU, windows by layer."""

from __future__ import annotations

import math
from typing import Any

from ruvllm.checkpoint.families.choices import biased, gguf_window_values, gguf_windows, windows
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ModelConfig, RopeConfig

_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")  # the older name also means the tanh approximation here
_LOCAL_THETA = 10000.0
_SCORE_CAP, _LOGIT_CAP = 50.0, 30.0  # of Gemma 2, where a file does not say


def _common(sizes: Sizes) -> Choices:
    return {"hidden_act": "gelu_tanh", "embedding_multiplier": math.sqrt(sizes.hidden)}


def _hf_common(keys: Fields, sizes: Sizes) -> Choices:
    key = "hidden_activation" if keys.get("hidden_activation", str) is not None else "hidden_act"
    keys.require_plain(key, _ACTIVATIONS)
    keys.require_plain("use_bidirectional_attention", (False,))
    return _common(sizes) | biased(keys)


def _gemma2(keys: Fields, sizes: Sizes) -> Choices:
    window = keys.default("sliding_window", int, 4096)
    return {
        **_hf_common(keys, sizes), **windows(keys, sizes, window, lambda i: i % 2 == 0), "norms": "both",
        "attention_multiplier": _scale(keys),
        "attn_logit_softcapping": _optional(keys, "attn_logit_softcapping", _SCORE_CAP),
        "final_logit_softcapping": _optional(keys, "final_logit_softcapping", _LOGIT_CAP),
    }  # fmt: skip


def _gemma3(keys: Fields, sizes: Sizes) -> Choices:
    window = keys.default("sliding_window", int, 4096)
    pattern = keys.get("sliding_window_pattern", int) or keys.get("_sliding_window_pattern", int) or 6
    if pattern < 1:
        raise keys.error("sliding_window_pattern", pattern, "a positive integer")
    return {
        **_hf_common(keys, sizes), **windows(keys, sizes, window, lambda i: (i + 1) % pattern != 0), "norms": "both",
        "qk_norm": "head", "attention_multiplier": _scale(keys),
        "final_logit_softcapping": _optional(keys, "final_logit_softcapping", None),
        "local_rope": RopeConfig(theta=keys.default("rope_local_base_freq", float, _LOCAL_THETA)),
    }  # fmt: skip


def _scale(keys: Fields) -> float:
    scalar = keys.default("query_pre_attn_scalar", float, 256.0)
    if not scalar > 0:
        raise keys.error("query_pre_attn_scalar", scalar, "a positive number")
    return scalar**-0.5


def _optional(keys: Fields, key: str, default: float | None) -> float | None:
    return keys.get(key, float) if key in keys else default


def _gguf_scale(sizes: Sizes, layers_of_27b: int) -> float:
    """llama.cpp has no key for it: the largest model of each series has another scale than 1 / sqrt(D)."""
    return (sizes.hidden / sizes.heads if sizes.layers == layers_of_27b else sizes.head_dim) ** -0.5


def _gguf_gemma2(meta: Fields, sizes: Sizes) -> Choices:
    window = meta.get("attention.sliding_window", int) or 4096
    return {
        **_common(sizes), **gguf_windows(meta, sizes, window, 2), "norms": "both",
        "attention_multiplier": _gguf_scale(sizes, 46),
        "attn_logit_softcapping": meta.default("attn_logit_softcapping", float, _SCORE_CAP),
        "final_logit_softcapping": meta.default("final_logit_softcapping", float, _LOGIT_CAP),
    }  # fmt: skip


def _gguf_gemma3(meta: Fields, sizes: Sizes) -> Choices:
    window = meta.get("attention.sliding_window", int)
    local = meta.get("rope.freq_base_swa", float)
    return {
        **_common(sizes), **gguf_windows(meta, sizes, window, 6), "norms": "both",
        "qk_norm": "head", "attention_multiplier": _gguf_scale(sizes, 62),
        "final_logit_softcapping": meta.get("final_logit_softcapping", float) or None,
        "local_rope": RopeConfig(theta=_LOCAL_THETA if local is None else local) if window else None,
    }  # fmt: skip


def _values(config: ModelConfig, period: int) -> dict[str, Any]:
    values = gguf_window_values(config, period)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is not None:
            values[name] = float(getattr(config, name))
    if config.local_rope is not None:
        values["rope.freq_base_swa"] = float(config.local_rope.theta)
    return values


_NORMS = {"mlp_norm": "pre_feedforward_layernorm.weight"}
_DEFAULTS = {
    "head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192, "bos_token_id": 2,
    "eos_token_id": 1,
}  # fmt: skip

GEMMA = Family(
    model_type="gemma", classes=("GemmaForCausalLM",), architecture="gemma", hf_choices=_hf_common,
    gguf_choices=lambda meta, sizes: _common(sizes), norm_offset=1.0, activations=(),
    defaults=_DEFAULTS | {"num_key_value_heads": 16},
)  # fmt: skip
GEMMA2 = Family(
    model_type="gemma2", classes=("Gemma2ForCausalLM",), architecture="gemma2", hf_choices=_gemma2,
    gguf_choices=_gguf_gemma2, gguf_values=lambda config: _values(config, 2), norm_offset=1.0, activations=(),
    hf_names=_NORMS,
    defaults=_DEFAULTS | {"num_key_value_heads": 4},
)  # fmt: skip
GEMMA3 = Family(
    model_type="gemma3_text", classes=("Gemma3ForCausalLM", "Gemma3TextForCausalLM", "Gemma3ForConditionalGeneration"),
    architecture="gemma3", hf_choices=_gemma3, gguf_choices=_gguf_gemma3,
    gguf_values=lambda config: _values(config, 6), norm_offset=1.0, activations=(), hf_names=_NORMS,
    defaults=_DEFAULTS | {
        "num_key_value_heads": 4, "max_position_embeddings": 131072, "rope_theta": 1e6,
        "rope_local_base_freq": _LOCAL_THETA, "vocab_size": 262208,
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    },
)  # fmt: skip
