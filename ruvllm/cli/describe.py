"""A configuration in words: family, attention, windows, rotary embedding, experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ruvllm.model.config import ModelConfig
    from ruvllm.model.rope_config import RopeConfig

_NORMS = {"before": "before", "after": "after", "both": "before and after"}
_GATES = {"silu": "SwiGLU", "gelu_tanh": "GeGLU", "clamped_swiglu": "clamped SwiGLU"}
_QK_NORMS = {"head": "q and k normalised by head", "row": "q and k normalised by row"}


def described(config: ModelConfig) -> dict[str, str]:
    """Rows of a table."""
    windowed = [i for i in range(config.num_hidden_layers) if config.window(i) is not None]
    rows = {
        "family": config.model_type,
        "layers": f"{config.num_hidden_layers} of hidden size {config.hidden_size}; "
        f"norms {_NORMS[config.norms]} attention and feed-forward",
        "attention": _attention(config),
        "window": f"{config.sliding_window or 0:,} tokens in {_where(windowed, config)}" if windowed else "",
        "rope": _ropes(config),
        "feed-forward": _feed_forward(config),
        "experts": _experts(config),
        "multipliers": _multipliers(config),
        "vocabulary": f"{config.vocab_size:,} tokens"
        + ("; the embedding is also the head" if config.tie_word_embeddings else "")
        + _softcap("; logits", config.final_logit_softcapping),
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    return {name: text for name, text in rows.items() if text}


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as "0-4, 6"."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1][1:] = [n]
        else:
            found.append([n])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def _where(layers: list[int], config: ModelConfig) -> str:
    if len(layers) == config.num_hidden_layers:
        return "all layers"
    return f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"


def _softcap(what: str, cap: float | None) -> str:
    return "" if cap is None else f"{what} softcapped at {cap:g}"


def _attention(config: ModelConfig) -> str:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    own_scale = not math.isclose(config.attention_scale, config.head_dim**-0.5)
    biased = "qkv" * config.attention_bias + "o" * config.attention_out_bias
    extras = [
        "" if config.qk_norm is None else _QK_NORMS[config.qk_norm],
        f"scores times {config.attention_scale:.4g}" if own_scale else "",
        _softcap("scores", config.attn_logit_softcapping),
        "a sink for each head" if config.attention_sinks else "",
        f"biases on {', '.join(biased)}" if biased else "",
    ]
    return "; ".join([f"{heads} query, {shared} key/value heads of {config.head_dim}", *filter(None, extras)])


def _ropes(config: ModelConfig) -> str:
    text = "; of windowed layers: ".join(_rope(rope, config.head_dim) for rope in config.ropes)
    if config.no_rope_layers:
        text += f"; none in {_where(list(config.no_rope_layers), config)}"
    return text


def _rope(rope: RopeConfig, head_dim: int) -> str:
    part = f", {rope.rotary_dim} of {head_dim} rotated" if rope.rotary_dim not in (None, head_dim) else ""
    scaling = f", scaling {rope.scaling}" if rope.scaling else ""
    return f"base {rope.theta:,.0f}{scaling}{part}"


def _feed_forward(config: ModelConfig) -> str:
    dense = [i for i in range(config.num_hidden_layers) if not config.has_experts(i)]
    if not dense:
        return ""
    where = "" if config.experts is None else f" in {_where(dense, config)}"
    biases = "; biases" if config.mlp_bias else ""
    return f"{_GATES[config.hidden_act]} of {config.intermediate_size:,}{where}{biases}"


def _experts(config: ModelConfig) -> str:
    experts = config.experts
    if experts is None:
        return ""
    layers = [i for i in range(config.num_hidden_layers) if config.has_experts(i)]
    text = (
        f"{experts.count} in {_where(layers, config)}, {experts.per_token} of them for each token; "
        f"{_GATES[config.hidden_act]} of {experts.intermediate_size:,}"
    )
    if experts.shared_intermediate_size:
        text += f"; one of {experts.shared_intermediate_size:,} for all tokens"
    return text + ("; biases" if experts.bias else "")


def _multipliers(config: ModelConfig) -> str:
    found = [
        ("embedding times", config.embedding_multiplier), ("what layers add times", config.residual_multiplier),
        ("logits divided by", config.logits_scaling),
    ]  # fmt: skip
    return ", ".join(f"{what} {factor:.4g}" for what, factor in found if factor != 1)
