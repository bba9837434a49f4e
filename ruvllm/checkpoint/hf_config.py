"""A Hugging Face directory's config.json and generation_config.json as a ModelConfig.

A key that is missing gets the default that `transformers` gives it, for each architecture its own. What this
library does not do (another architecture, rotary scaling, activation, a quantised format) is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.foreign_formats import refuse_settings
from ruvllm.checkpoint.hf_files import MAX_CONFIG_BYTES, listed_ends, read_if_there
from ruvllm.checkpoint.strict_json import read_json_object
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ConfigError, ModelConfig, RopeConfig

MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}

# Fields of ModelConfig and RopeConfig whose key is called otherwise.
_KEYS = {
    "eos_token_ids": "eos_token_id",
    "rope.theta": "rope_theta",
    "rope.original_max_position": "original_max_position_embeddings",
}


def config_from_directory(directory: Path) -> ModelConfig:
    """The configuration that `directory/config.json` describes; end tokens also from generation_config.json.

    Raises: ModelFormatError naming the file, the key, what it holds and what was expected.
    """
    path = directory / "config.json"
    keys = Fields(path, read_json_object(path, MAX_CONFIG_BYTES))
    model_type = _model_type(keys)
    llama = model_type == "llama"
    refuse_settings(keys)
    _check_supported(keys)
    hidden, heads = keys.require("hidden_size", int), keys.require("num_attention_heads", int)
    head_dim = keys.get("head_dim", int)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise keys.error("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or head_dim given")
        head_dim = hidden // heads
    kv_heads = keys.get("num_key_value_heads", int)
    if kv_heads is None:
        kv_heads = heads if llama or "num_key_value_heads" in keys else 8
    window = None if llama else keys.get("sliding_window", int)
    if not llama and "sliding_window" not in keys:
        window = 4096
    _check_layer_types(keys, window)
    max_positions = keys.default("max_position_embeddings", int, 2048 if llama else 131072)
    biased = llama and bool(keys.get("attention_bias", bool))
    ends, ends_of = listed_ends(keys, read_if_there(directory / "generation_config.json", MAX_CONFIG_BYTES))
    try:
        return ModelConfig(
            vocab_size=keys.require("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=keys.require("intermediate_size", int),
            num_hidden_layers=keys.require("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.default("rms_norm_eps", float, 1e-6),
            rope=_rope(keys, max_positions),
            sliding_window=window,
            tie_word_embeddings=bool(keys.get("tie_word_embeddings", bool)),
            attention_bias=biased,
            attention_out_bias=biased,  # transformers' LlamaAttention has one switch for all four
            mlp_bias=llama and bool(keys.get("mlp_bias", bool)),
            bos_token_id=keys.get("bos_token_id", int) if "bos_token_id" in keys else 1,
            eos_token_ids=ends if ends or "eos_token_id" in keys else (2,),
            name=directory.resolve().name,
        )
    except ConfigError as error:
        source = ends_of if error.field == "eos_token_ids" else keys
        raise source.error(_KEYS.get(error.field, error.field), error.found, error.expected) from None


def refuse_other_architectures(directory: Path) -> None:
    """Raise ModelFormatError where config.json names what this library does not run; its other faults are for later."""
    path = directory / "config.json"
    try:
        keys = Fields(path, read_json_object(path, MAX_CONFIG_BYTES))
    except ModelFormatError:
        return
    if "architectures" in keys or "model_type" in keys:
        _model_type(keys)
    refuse_settings(keys)
    _check_supported(keys)


def _model_type(keys: Fields) -> str:
    """One of MODEL_TYPES' values, from `architectures` and `model_type`, which must not contradict each other."""
    architectures = keys.get("architectures", list)
    model_type = keys.get("model_type", str)
    if not architectures:
        if model_type is None or model_type not in MODEL_TYPES.values():
            raise keys.error("model_type", model_type, "'llama' or 'mistral'")
        return model_type
    expected = MODEL_TYPES.get(architectures[0]) if isinstance(architectures[0], str) else None
    if expected is None:
        raise keys.error("architectures", ", ".join(map(str, architectures)), " or ".join(MODEL_TYPES))
    if model_type not in (None, expected):
        raise keys.error("model_type", model_type, f"{expected!r}, to agree with {architectures[0]}")
    return expected


def _check_supported(keys: Fields) -> None:
    """Refuse by name what would need other kernels."""
    activation = keys.default("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise keys.error("hidden_act", activation, "'silu'")


def _check_layer_types(keys: Fields, window: int | None) -> None:
    """All layers of this library attend alike: refuse a list of layer types that says otherwise."""
    expected = "full_attention" if window is None else "sliding_attention"
    for kind in keys.get("layer_types", list) or []:
        if kind != expected:
            raise keys.error("layer_types", kind, f"{expected!r} in every layer")


def _rope(keys: Fields, max_positions: int) -> RopeConfig:
    """Rotary parameters, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

    As in transformers, a `rope_scaling` that is not empty comes before `rope_parameters`, and values within them
    come before those beside them.
    """
    where = "rope_scaling" if keys.get("rope_scaling", dict) else "rope_parameters"
    rope = Fields(keys.path, keys.get(where, dict) or {}, prefix=f"{where}.")
    kind = rope.get("rope_type", str) or rope.get("type", str)
    factor = rope.get("factor", float)
    if kind is None:
        if any(isinstance(value, dict) for value in rope.values.values()):
            raise rope.error("rope_type", "another for each layer type", "one for all layers")
        if factor not in (None, 1.0):
            raise rope.error("rope_type", "no such key", "the type of scaling that `factor` belongs to")
        kind = "default"
    if kind not in ("default", "linear", "ntk", "llama3"):
        raise rope.error("rope_type", kind, "'default', 'linear', 'ntk' or 'llama3'")
    for holder in (keys, rope):
        partial = holder.get("partial_rotary_factor", float)
        if partial not in (None, 1.0):
            raise holder.error("partial_rotary_factor", partial, "1.0: all of a head is rotated")
    theta = rope.get("rope_theta", float)
    if theta is None:
        theta = keys.get("rope_theta", float)
    theta = 10000.0 if theta is None else theta
    original = keys.get("original_max_position_embeddings", int)
    if original is None:
        original = rope.get("original_max_position_embeddings", int)
    try:
        if kind == "default":
            return RopeConfig(theta=theta)
        factor = rope.require("factor", float)
        if kind in ("linear", "ntk"):
            return RopeConfig(theta=theta, scaling=kind, factor=factor)
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=factor,
            low_freq_factor=rope.require("low_freq_factor", float),
            high_freq_factor=rope.require("high_freq_factor", float),
            original_max_position=max_positions if original is None else original,
        )
    except ConfigError as error:
        key = _KEYS.get(error.field, error.field.removeprefix("rope."))
        raise rope.error(key, error.found, error.expected) from None
