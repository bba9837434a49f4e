"""The metadata of a GGUF file as a ModelConfig.

LLaMA 2 and 3, Mistral and their many relatives are all architecture "llama" in GGUF; others have their own
(``families``). Keys that llama.cpp requires are required here; keys whose value would change the arithmetic in a way
that this library does not follow are refused by name rather than ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ruvllm.checkpoint.families import BY_ARCHITECTURE
from ruvllm.checkpoint.family import Family, sizes_of
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.gguf_rope import rope_of
from ruvllm.checkpoint.gguf_split import AnyGGUF
from ruvllm.checkpoint.names import GGUF_LAYER, GGUF_MODEL, GGUF_ROPE_FACTORS
from ruvllm.checkpoint.tokenizer.keys import END_NAMES, PREFIX
from ruvllm.model.config import ConfigError, ModelConfig

# The key, without the architecture's name, of a field of ModelConfig, so that errors name what is in the file.
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "rotary_dim": "rope.dimension_count",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "experts.count": "expert_count",
    "experts.per_token": "expert_used_count",
    "experts.intermediate_size": "expert_feed_forward_length",
    "rope.theta": "rope.freq_base",
    "rope.factor": "rope.scaling.factor",
    "rope.original_max_position": "rope.scaling.original_context_length",
    "rope.attention_factor": "rope.scaling.attn_factor",
}
_FILE_KEYS = {
    "vocab_size": "tokenizer.ggml.tokens",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "rope.factors": f"tensor {GGUF_ROPE_FACTORS!r}",
}
_END_KEYS = [f"{PREFIX}{name}_token_id" for name in END_NAMES]


def config_from_gguf(file: AnyGGUF) -> ModelConfig:
    """The configuration that a GGUF file describes.

    Raises: ModelFormatError naming the metadata key (or tensor), what it holds and what was expected.
    """
    meta = Fields(file.path, file.metadata, offsets=file.metadata_offsets)
    family = _family(meta)
    own = _own(meta, family)
    sizes = sizes_of(own, _KEYS)
    end_ids = [meta.get(key, int) for key in _END_KEYS]
    try:
        choices: dict[str, Any] = {
            "vocab_size": _vocab_size(file, meta, own),
            "hidden_size": sizes.hidden,
            "intermediate_size": own.require("feed_forward_length", int),
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "max_position_embeddings": own.require("context_length", int),
            "rms_norm_eps": own.require("attention.layer_norm_rms_epsilon", float),
            "rope": rope_of(file, own, sizes, family),
            "tie_word_embeddings": GGUF_MODEL["head"] not in file.tensors,
            "attention_bias": _any_bias(file, "q_bias", "k_bias", "v_bias"),
            "attention_out_bias": _any_bias(file, "o_bias"),
            "mlp_bias": _any_bias(file, "gate_bias", "up_bias", "down_bias"),
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id", int),
            "eos_token_ids": tuple(dict.fromkeys(i for i in end_ids if i is not None)),
            "name": meta.get("general.name", str) or Path(file.path).stem,
            "model_type": family.model_type,
        }
        config = ModelConfig(**choices | family.gguf_choices(own, sizes))
    except ConfigError as error:
        name, _, index = error.field.partition("[")
        key = _FILE_KEYS.get(name) or f"{family.architecture}.{_KEYS.get(name, name)}"
        if name == "eos_token_ids":
            key = next(key for key, token in zip(_END_KEYS, end_ids, strict=True) if token == error.found)
        raise meta.error(key + (f"[{index}" if index else ""), error.found, error.expected) from None
    _check_neutral(own, config)
    return config


def _family(meta: Fields) -> Family:
    """The family of a file; refuse by name a file that is not the whole of one model of a known one."""
    architecture = meta.require("general.architecture", str)
    if architecture not in BY_ARCHITECTURE:
        raise meta.error("general.architecture", architecture, "one of " + ", ".join(sorted(BY_ARCHITECTURE)))
    kind = meta.get("general.type", str)
    if kind not in (None, "model"):
        raise meta.error("general.type", kind, "'model'")
    return BY_ARCHITECTURE[architecture]


def _own(meta: Fields, family: Family) -> Fields:
    """The keys of the architecture, without its name."""
    prefix = f"{family.architecture}."
    values = {key.removeprefix(prefix): value for key, value in meta.values.items() if key.startswith(prefix)}
    offsets = {key.removeprefix(prefix): at for key, at in meta.offsets.items() if key.startswith(prefix)}
    return Fields(meta.path, values, prefix, offsets)


def _check_neutral(own: Fields, config: ModelConfig) -> None:
    """Refuse keys that ask for unsupported arithmetic, unless their value changes nothing."""
    if config.experts is None:
        own.require_plain("expert_count", (0,))
    else:
        own.require_plain("expert_weights_scale", (0.0, 1.0))
        own.require_plain("expert_gating_func", (0, 1, 3))  # 1: softmax over all, 3: over the chosen
    own.require_plain("rope.dimension_count", (config.rope.rotary_dim or config.head_dim,))
    own.require_plain("attention.value_length", (config.head_dim,))
    own.require_plain("attention.causal", (True,))
    asked = own.get("attention.scale", float)
    if asked and not math.isclose(asked, config.attention_scale, rel_tol=1e-6):  # 0 means the default
        raise own.error("attention.scale", asked, f"1/sqrt(head_dim) = {config.attention_scale:.8g}")


def _vocab_size(file: AnyGGUF, meta: Fields, own: Fields) -> int:
    """Length of the token list; without one, `vocab_size` or the number of the embedding's rows."""
    tokens = meta.get("tokenizer.ggml.tokens", list)
    if tokens is not None:
        return len(tokens)
    size = own.get("vocab_size", int)
    if size is not None:
        return size
    embedding = file.tensors.get(GGUF_MODEL["embed"])
    if embedding is None:
        raise meta.error(f"tensor {GGUF_MODEL['embed']!r}", "no such tensor", "the token embedding")
    return embedding.shape[0]


def _any_bias(file: AnyGGUF, *parts: str) -> bool:
    """Whether the first layer has any of these biases; the loader then demands all of them in all layers."""
    return any(f"blk.0.{GGUF_LAYER[part]}" in file.tensors for part in parts)
