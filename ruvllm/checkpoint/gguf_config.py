"""The metadata of a GGUF file of the llama architecture as a ModelConfig.

LLaMA 2 and 3, Mistral and their many relatives are all architecture "llama" in GGUF. Keys that llama.cpp
requires are required here; keys whose value would change the arithmetic in a way that this library does not follow
are refused by name rather than ignored.
"""

from __future__ import annotations

import math
from pathlib import Path

from ruvllm.checkpoint._tokenizer_keys import END_NAMES, PREFIX
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.gguf_split import AnyGGUF
from ruvllm.checkpoint.names import GGUF_LAYER, GGUF_MODEL, GGUF_ROPE_FACTORS
from ruvllm.model.config import ConfigError, ModelConfig, RopeConfig

ARCHITECTURE = "llama"

_MAX_PAIRS = 512  # half of the largest head_dim: no tensor larger than that is read here

# The key that a field of ModelConfig comes from, so that an error speaks of what stands in the file.
_KEYS = {
    "vocab_size": "tokenizer.ggml.tokens",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "sliding_window": "llama.attention.sliding_window",
    "rope.theta": "llama.rope.freq_base",
    "rope.factor": "llama.rope.scaling.factor",
    "rope.factors": f"tensor {GGUF_ROPE_FACTORS!r}",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
}
_END_KEYS = [f"{PREFIX}{name}_token_id" for name in END_NAMES]


def config_from_gguf(file: AnyGGUF) -> ModelConfig:
    """The configuration that a GGUF file describes.

    Raises: ModelFormatError naming the metadata key (or tensor), what it holds and what was expected.
    """
    meta = Fields(file.path, file.metadata, offsets=file.metadata_offsets)
    _check_kind(meta)
    hidden = meta.require("llama.embedding_length", int)
    heads = meta.require("llama.attention.head_count", int)
    key_length = meta.get("llama.attention.key_length", int)
    if key_length is None:
        if heads < 1 or hidden % heads:
            raise meta.error("llama.attention.head_count", heads, f"a divisor of llama.embedding_length = {hidden}")
        key_length = hidden // heads
    kv_heads = meta.get("llama.attention.head_count_kv", int)
    end_ids = [meta.get(key, int) for key in _END_KEYS]
    vocab_size = _vocab_size(file, meta)
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=meta.require("llama.feed_forward_length", int),
            num_hidden_layers=meta.require("llama.block_count", int),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=key_length,
            max_position_embeddings=meta.require("llama.context_length", int),
            rms_norm_eps=meta.require("llama.attention.layer_norm_rms_epsilon", float),
            rope=_rope(file, meta),
            sliding_window=meta.get("llama.attention.sliding_window", int) or None,
            tie_word_embeddings=GGUF_MODEL["head"] not in file.tensors,
            attention_bias=_any_bias(file, "q_bias", "k_bias", "v_bias"),
            attention_out_bias=_any_bias(file, "o_bias"),
            mlp_bias=_any_bias(file, "gate_bias", "up_bias", "down_bias"),
            bos_token_id=meta.get("tokenizer.ggml.bos_token_id", int),
            eos_token_ids=tuple(dict.fromkeys(i for i in end_ids if i is not None)),
            name=meta.get("general.name", str) or Path(file.path).stem,
        )
    except ConfigError as error:
        name, _, index = error.field.partition("[")
        key = _KEYS.get(name, name) + (f"[{index}" if index else "")
        if name == "eos_token_ids":
            key = next(key for key, token in zip(_END_KEYS, end_ids, strict=True) if token == error.found)
        raise meta.error(key, error.found, error.expected) from None
    _check_neutral(meta, config.head_dim)
    return config


def _check_kind(meta: Fields) -> None:
    """Refuse by name a file that is not the whole of one llama model."""
    architecture = meta.require("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise meta.error("general.architecture", architecture, f"{ARCHITECTURE!r} (LLaMA, Mistral)")
    kind = meta.get("general.type", str)
    if kind not in (None, "model"):
        raise meta.error("general.type", kind, "'model'")


def _check_neutral(meta: Fields, head_dim: int) -> None:
    """Refuse keys that ask for arithmetic which this library does not do, unless their value changes nothing."""
    scale = 1 / math.sqrt(head_dim)
    meta.require_plain("llama.expert_count", (0,))
    meta.require_plain("llama.rope.dimension_count", (head_dim,))
    meta.require_plain("llama.attention.value_length", (head_dim,))
    meta.require_plain("llama.attention.causal", (True,))
    meta.require_plain("llama.rope.scaling.attn_factor", (1.0,))
    asked = meta.get("llama.attention.scale", float)
    if asked and not math.isclose(asked, scale, rel_tol=1e-6):  # 0 stands for the default
        raise meta.error("llama.attention.scale", asked, f"1/sqrt(head_dim) = {scale:.8g}")


def _vocab_size(file: AnyGGUF, meta: Fields) -> int:
    """Length of the token list; without one, what `llama.vocab_size` or the embedding's rows say."""
    tokens = meta.get("tokenizer.ggml.tokens", list)
    if tokens is not None:
        return len(tokens)
    size = meta.get("llama.vocab_size", int)
    if size is not None:
        return size
    embedding = file.tensors.get(GGUF_MODEL["embed"])
    if embedding is None:
        raise meta.error(f"tensor {GGUF_MODEL['embed']!r}", "no such tensor", "the token embedding")
    return embedding.shape[0]


def _rope(file: AnyGGUF, meta: Fields) -> RopeConfig:
    """Base, linear factor and per-pair divisors. llama.cpp divides by both where a file has both; so do we."""
    theta = meta.get("llama.rope.freq_base", float)
    theta = 10000.0 if theta is None else theta
    scaling = meta.get("llama.rope.scaling.type", str)
    if scaling not in (None, "none", "linear"):
        raise meta.error("llama.rope.scaling.type", scaling, "'none' or 'linear'")
    factor = meta.get("llama.rope.scaling.factor", float)
    if factor is None:
        factor = meta.get("llama.rope.scale_linear", float)  # the key's name before August 2023
    if factor is None or factor == 0 or scaling == "none":  # llama.cpp reads 0 as "unscaled"
        factor = 1.0
    if GGUF_ROPE_FACTORS in file.tensors:
        tensor = file.tensor(GGUF_ROPE_FACTORS)
        if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_PAIRS:
            raise meta.error(f"tensor {GGUF_ROPE_FACTORS!r} shape", tensor.shape, "one divisor for each pair of a head")
        divisors = tensor.float32()[0]
        return RopeConfig(theta=theta, scaling="factors", factors=tuple(float(d) * factor for d in divisors))
    return RopeConfig(theta=theta, scaling=None if factor == 1.0 else "linear", factor=factor)


def _any_bias(file: AnyGGUF, *parts: str) -> bool:
    """Whether the first layer has any of these biases; the loader then demands all of them in all layers."""
    return any(f"blk.0.{GGUF_LAYER[part]}" in file.tensors for part in parts)
