"""A Hugging Face directory's config.json and generation_config.json as a ModelConfig.

A missing key gets the default of `transformers`, which each family may change (``families``). Unsupported features
(another architecture, rotary scaling, activation, a quantised format) are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruvllm.checkpoint.families import BY_CLASS, BY_TYPE
from ruvllm.checkpoint.family import Family, sizes_of
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.foreign_formats import refuse_settings
from ruvllm.checkpoint.hf_files import MAX_CONFIG_BYTES, listed_ends, read_if_there
from ruvllm.checkpoint.hf_rope import ropes_of
from ruvllm.checkpoint.strict_json import read_json_object
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ConfigError, ModelConfig

# Fields of ModelConfig and RopeConfig whose key has another name.
_KEYS = {
    "eos_token_ids": "eos_token_id",
    "rope.theta": "rope_theta",
    "rope.original_max_position": "original_max_position_embeddings",
    "rope.factors": "short_factor",
    "rope.long_factors": "long_factor",
    "experts.count": "num_experts",
    "experts.per_token": "num_experts_per_tok",
    "experts.intermediate_size": "moe_intermediate_size",
}
# The defaults of transformers, unless a family has others. bos and eos: LLaMA's.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# The text model of a model with images: its configuration, and the keys outside of it.
_NESTED = {"gemma3": ("text_config", "gemma3_text")}


def config_from_directory(directory: Path) -> ModelConfig:
    """The configuration that `directory/config.json` describes; end tokens also from generation_config.json.

    Raises: ModelFormatError naming the file, the key, what it holds and what was expected.
    """
    path = directory / "config.json"
    outer = Fields(path, read_json_object(path, MAX_CONFIG_BYTES))
    family = _family(outer)
    refuse_settings(outer)
    keys = _with_defaults(_text_keys(outer), family)
    _check_supported(keys, family)
    sizes = sizes_of(keys, _KEYS)
    says_ends = outer if "eos_token_id" in outer else _text_keys(outer)
    ends, ends_of = listed_ends(says_ends, read_if_there(directory / "generation_config.json", MAX_CONFIG_BYTES))
    default_end = family.defaults.get("eos_token_id", _DEFAULTS["eos_token_id"])
    if not ends and "eos_token_id" not in says_ends and default_end is not None:
        ends = (default_end,)
    try:
        choices: dict[str, Any] = {
            "vocab_size": keys.require("vocab_size", int),
            "hidden_size": sizes.hidden,
            "intermediate_size": keys.require("intermediate_size", int),
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "max_position_embeddings": keys.require("max_position_embeddings", int),
            "rms_norm_eps": keys.require("rms_norm_eps", float),
            "tie_word_embeddings": bool(keys.get("tie_word_embeddings", bool)),
            "bos_token_id": keys.get("bos_token_id", int),
            "eos_token_ids": ends,
            "name": directory.resolve().name,
            "model_type": family.model_type,
        }
        rope, local = ropes_of(keys, sizes, family.partial_rotary)
        choices |= family.hf_choices(keys, sizes)
        if local is not None:  # instead of what older keys say
            choices["local_rope"] = local
        return ModelConfig(**choices, rope=rope)
    except ConfigError as error:
        source = ends_of if error.field == "eos_token_ids" else keys
        name, _, index = error.field.partition("[")
        key = _KEYS.get(name, name.removeprefix("rope.")) + (f"[{index}" if index else "")
        raise source.error(key, error.found, error.expected) from None


def refuse_other_architectures(directory: Path) -> None:
    """Raise ModelFormatError if config.json names an unsupported architecture; other faults are found later."""
    path = directory / "config.json"
    try:
        keys = Fields(path, read_json_object(path, MAX_CONFIG_BYTES))
    except ModelFormatError:
        return
    if "architectures" in keys or "model_type" in keys:
        _check_supported(_text_keys(keys), _family(keys))
    refuse_settings(keys)


def _family(keys: Fields) -> Family:
    """By `architectures` and `model_type`, which must not contradict each other."""
    architectures = keys.get("architectures", list)
    model_type = keys.get("model_type", str)
    plain = _NESTED[model_type][1] if model_type in _NESTED else model_type
    if not architectures:
        if plain is None or plain not in BY_TYPE:
            raise keys.error("model_type", model_type, "one of " + ", ".join(BY_TYPE))
        return BY_TYPE[plain]
    family = BY_CLASS.get(architectures[0]) if isinstance(architectures[0], str) else None
    if family is None:
        raise keys.error("architectures", ", ".join(map(str, architectures)), "one of " + ", ".join(BY_CLASS))
    if plain not in (None, family.model_type):
        raise keys.error("model_type", model_type, f"{family.model_type!r}, to agree with {architectures[0]}")
    return family


def _text_keys(keys: Fields) -> Fields:
    """The keys of the text model; those of tokens and the tied head may be outside of it."""
    model_type = keys.get("model_type", str)
    if model_type not in _NESTED:
        return keys
    name = _NESTED[model_type][0]
    outer = {key: keys.values[key] for key in ("bos_token_id", "tie_word_embeddings") if key in keys}
    return Fields(keys.path, outer | keys.require(name, dict), prefix=f"{name}.")


def _with_defaults(keys: Fields, family: Family) -> Fields:
    """The keys, with transformers' defaults for those that are absent."""
    return Fields(keys.path, _DEFAULTS | dict(family.defaults) | dict(keys.values), keys.prefix, keys.offsets)


def _check_supported(keys: Fields, family: Family) -> None:
    """Refuse by name what would need other kernels."""
    activation = keys.default("hidden_act", str, "silu")
    if family.activations and activation not in family.activations:
        raise keys.error("hidden_act", activation, repr(family.activations[0]))
